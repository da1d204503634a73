"""The demo: the same honest and hostile tasks on stock Ray and in the sandbox.

`hostile` is what the attacker sends, `attacks` the list of attacks with the walls
that stop them, `honest` what ordinary work costs, `driver` the process that runs
one side of it against a Ray of its own, `compare` both sides.
"""

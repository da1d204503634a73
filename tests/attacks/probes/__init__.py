"""The probes: what an attacker with full control of a jail's code would try.

Each probe is a plain function of the context that returns if the attack got
through, raises :class:`OSError` if the kernel refused it, and raises
:class:`~tests.attacks.probes.base.Blocked` if nothing failed and nothing was
won either.  The same function runs outside the jail, where it must succeed.
Only the standard library is used: inside the jail nothing else may be there.
"""

"""What runs behind the walls: the zygote, and in each jail the runner.

Standard library only, and little of it: every module here is in the memory of
every jail, and in the time of every fork.
"""

"""The trusted side: what runs in a Ray worker process.

``hook`` installs it, ``seams`` is the only module that knows Ray's internals,
``pool`` keeps zygotes and jails, ``output`` forwards what jails print.
"""

"""The node's policy: what its operator allows, whatever a client asks for."""

from __future__ import annotations

from raysandbox.policy.decide import (
    LOADER_VARIABLES,
    RAY_VARIABLES,
    Decision,
    Request,
    decide,
    jail_variables,
    runtime_env_refusals,
    variable_kind,
)
from raysandbox.policy.load import (
    ENV,
    SITE_FILE,
    Node,
    check,
    find,
    load,
    load_node,
    lower,
    unseal,
)
from raysandbox.policy.schema import (
    STRICTEST,
    Audit,
    Ceilings,
    ObjectStore,
    Percent,
    Policy,
    Rule,
    RuntimeEnv,
    Totals,
    Worker,
    json_schema,
)

__all__ = [
    "ENV",
    "LOADER_VARIABLES",
    "RAY_VARIABLES",
    "SITE_FILE",
    "STRICTEST",
    "Audit",
    "Ceilings",
    "Decision",
    "Node",
    "ObjectStore",
    "Percent",
    "Policy",
    "Request",
    "Rule",
    "RuntimeEnv",
    "Totals",
    "Worker",
    "check",
    "decide",
    "find",
    "jail_variables",
    "json_schema",
    "load",
    "load_node",
    "lower",
    "runtime_env_refusals",
    "unseal",
    "variable_kind",
]

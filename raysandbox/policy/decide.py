"""Which profile a task gets: a request against a node's rules.

Pure: what the GCS, Ray and the kernel have to say was asked before. The first
rule whose conditions all hold decides alone. Where none holds, and wherever
something is missing, it is ``strict`` or a refusal, never anything laxer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from raysandbox.errors import ProfileError
from raysandbox.policy.schema import (
    IMAGE_PREFIX,
    JOBS_NAMESPACE,
    MOST_AT_ONCE,
    NEVER,
    PROFILERS,
    STRICTEST,
    TAG_PREFIX,
    Policy,
    Rule,
    RuntimeEnv,
    python_of,
)

__all__ = [
    "LOADER_VARIABLES",
    "RAY_VARIABLES",
    "Decision",
    "Request",
    "amount_of",
    "decide",
    "image_of",
    "jail_variables",
    "runtime_env_refusals",
    "tag_of",
    "variable_kind",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is known of the one who asks, and what is asked for.

    Attributes:
        tag: The profile that the task's resources name, or None.
        amount: How much of that resource it takes.
        namespace: Ray namespace of the job, from the GCS's job table.
        metadata: The job's metadata, from there too.
        signer: Who signed the code, if a signature was verified.
    """

    tag: str | None = None
    amount: float = 1.0
    namespace: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    signer: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What became of a request.

    Attributes:
        profile: The profile that the task runs under, or None: refused.
        rule: Name of the rule that decided, or ``""`` if none was for this job.
        why: A sentence for the task's owner and for ``policy explain``.
        remedy: What the owner or the operator can change, if it was refused.
        skipped: Rules that came before, each with what did not match.
    """

    profile: str | None
    rule: str
    why: str
    remedy: str = ""
    skipped: tuple[str, ...] = ()


# Ray's names for resources that a placement group reserved.
_IN_GROUP = re.compile(r"(.+?)_group_(?:\d+_)?[0-9a-f]{16,}")


def tag_of(resources: Mapping[str, Any]) -> str | None:
    """Return the profile that a task's resources name, or None without a tag.

    Raises:
        ProfileError: Two tags.
    """
    names = {_profile_of(resource) for resource in resources} - {""}
    if len(names) > 1:
        raise ProfileError(
            source="<tags>",
            value=", ".join(sorted(names)),
            reason="a task takes one sandbox tag",
        )
    return names.pop() if names else None


def amount_of(resources: Mapping[str, float]) -> float:
    """Return how much of a tag a task's resources have; 1 without one."""
    # In a placement group it stands there twice, once with the bundle's number.
    amounts = [amount for name, amount in resources.items() if _profile_of(name)]
    return max(amounts, default=1.0)


def _profile_of(resource: str) -> str:
    """Return the profile that a resource stands for, or "" if it is no tag."""
    match = _IN_GROUP.fullmatch(resource)
    plain = match[1] if match else resource
    return plain.removeprefix(TAG_PREFIX) if plain.startswith(TAG_PREFIX) else ""


def decide(policy: Policy, request: Request) -> Decision:
    """Return which profile the request gets under this policy."""
    found = _decide(policy, request)
    count = policy.offer.get(request.tag or "", MOST_AT_ONCE)
    if found.profile is None or request.amount >= 1 or count == MOST_AT_ONCE:
        return found
    return replace(
        found,
        profile=None,
        why=f"it takes {request.amount:g} of the tag, and the policy offers {count} of "
        f"{request.tag!r} at once",
        remedy=f"take a whole one: raysandbox.tag({request.tag!r})",
    )


def _decide(policy: Policy, request: Request) -> Decision:
    skipped: list[str] = []
    own = policy.jobs.entrypoint
    if own is not None and (own, JOBS_NAMESPACE) == (request.tag, request.namespace):
        return Decision(profile=own, rule="", why=f"jobs.entrypoint = {own!r}")
    for rule in policy.rules:
        mismatch = _mismatch(rule, request)
        if mismatch:
            skipped.append(f"{rule.name}: {mismatch}")
            continue
        return _by_rule(policy, rule, request, tuple(skipped))
    if request.tag in (None, STRICTEST):
        asked = "no tag" if request.tag is None else f"tag {request.tag!r}"
        return Decision(
            profile=STRICTEST,
            rule="",
            why=f"no rule is for this job; {asked}: the strictest profile",
            skipped=tuple(skipped),
        )
    return Decision(
        profile=None,
        rule="",
        why=f"no rule is for this job, so it may use {STRICTEST!r} alone",
        remedy=f"ask for {STRICTEST!r}, or have the operator add a rule for "
        f"{_whose(request)} with profiles = [{request.tag!r}]",
        skipped=tuple(skipped),
    )


def _by_rule(
    policy: Policy, rule: Rule, request: Request, skipped: tuple[str, ...]
) -> Decision:
    if request.tag is None:
        wanted = rule.untagged or policy.untagged
        source = "the rule's" if rule.untagged else "the policy's"
        if rule.may_use(wanted):
            why = f"no tag: {source} untagged = {wanted!r}"
        else:
            why = f"no tag: the rule does not allow {source} untagged = {wanted!r}"
            wanted = STRICTEST
        return Decision(profile=wanted, rule=rule.name, why=why, skipped=skipped)
    if rule.may_use(request.tag):
        return Decision(
            profile=request.tag,
            rule=rule.name,
            why=f"rule {rule.name!r} allows {request.tag!r}",
            skipped=skipped,
        )
    allowed = ", ".join(dict.fromkeys([STRICTEST, *rule.profiles]))
    return Decision(
        profile=None,
        rule=rule.name,
        why=f"rule {rule.name!r} is for this job and allows {allowed}",
        remedy=f"ask for one of {allowed}, or have the operator add "
        f"{request.tag!r} to the rule's profiles",
        skipped=skipped,
    )


def _mismatch(rule: Rule, request: Request) -> str:
    """Say which condition does not hold, or ``""`` if all do."""
    if rule.namespaces and not _any(rule.namespaces, request.namespace):
        return (
            f"namespace {request.namespace!r} is none of {', '.join(rule.namespaces)}"
        )
    for key, pattern in rule.metadata.items():
        value = request.metadata.get(key)
        if value is None:
            return f"the job has no metadata {key!r}"
        if not fnmatchcase(value, pattern):
            return f"metadata {key} = {value!r} is not {pattern!r}"
    if rule.signers and not (request.signer and _any(rule.signers, request.signer)):
        if request.signer is None:
            return "the code has no verified signature"
        return f"signer {request.signer!r} is none of {', '.join(rule.signers)}"
    return ""


def _any(patterns: tuple[str, ...], value: str) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in patterns)


def _whose(request: Request) -> str:
    return f"namespace {request.namespace!r}"


# --- runtime environments -----------------------------------------------------------

# Ray's key to ours; Ray stores some under another name than users write.
_INSTALLERS = {"pip": "pip", "uv": "uv", "java_jars": "java_jars"}
# What stands in the place of the worker's interpreter, or around it.
_INTERPRETERS = {
    "py_executable": "py_executable",
    "conda": "conda",
    "image_uri": "image_uri",
    "container": "container",
    **{name + key: key for key in PROFILERS for name in ("", "_")},
}
_PACKAGES = frozenset(("working_dir", "py_modules"))
# What `ray.init(working_dir=DIRECTORY)` makes, and no other name: with "...zip" Ray's
# agent replaces the directory of all packages, and with ".tar.gz" for ".zip" another
# job's package.
_UPLOADED = re.compile(r"gcs://_ray_pkg_[0-9a-f]+\.zip")
_WHEEL = re.compile(r"[A-Za-z0-9][\w.+!]*(-[\w.+!]+){2,5}\.whl", re.ASCII)
_REMOTE = re.compile(r"(https?|s3|gs|azure|abfss)://[!-~]+")
_HARMLESS = frozenset(
    (
        "excludes",
        "env_vars",
        "config",
        "worker_process_setup_hook",
        "_ray_release",
        "_ray_commit",
        "_inject_current_ray",
    )
)
#: Variables that steer the dynamic loader or Python.
LOADER_VARIABLES = ("LD_*", "PYTHON*", "GLIBC_TUNABLES", "MALLOC_*", "GCONV_PATH")
#: Variables of Ray's and ours.
RAY_VARIABLES = ("RAY_*", "__RAY_*", "RAYSANDBOX_*", "_RAY_*")


def runtime_env_refusals(
    policy: Policy, runtime_env: Mapping[str, Any], *, own_hook: str = ""
) -> list[str]:
    """Say what a runtime_env asks for that the policy refuses; empty if nothing.

    Args:
        policy: The node's.
        runtime_env: As Ray's agent or worker has it, parsed.
        own_hook: The setup hook that is raysandbox's own.

    Returns:
        One sentence each, with the policy's key that would allow it, or with why
        none does.
    """
    answers, found = policy.runtime_env, []

    def refuse(key: str, ours: str, allowing: str = "allow") -> None:
        why = f'runtime_env.{ours} = "{allowing}" would allow it'
        if ours in NEVER:
            why = f"no value of runtime_env.{ours} allows it: {NEVER[ours]}"
        found.append(f"runtime_env key {key!r}: refused by this node's policy ({why})")

    for key, value in runtime_env.items():
        if value is None or value in ("", {}, []):
            continue
        if key in _PACKAGES:
            for uri in value if isinstance(value, list) else [value]:
                if why := _package_problem(uri, answers):
                    found.append(
                        f"runtime_env key {key!r}: {_scheme(uri)} refused by this "
                        f"node's policy ({why})"
                    )
        elif key in _INTERPRETERS:
            if why := _interpreter_problem(_INTERPRETERS[key], value, answers):
                found.append(
                    f"runtime_env key {key!r}: refused by this node's policy ({why})"
                )
        elif key in _INSTALLERS:
            if getattr(answers, _INSTALLERS[key]) == "refuse":
                refuse(key, _INSTALLERS[key])
        elif key not in _HARMLESS and answers.other == "refuse":
            refuse(key, "other")
    if len(both := _interpreter_keys(runtime_env)) > 1:
        found.append(f"runtime_env keys {', '.join(map(repr, both))}: one interpreter")
    hook = runtime_env.get("worker_process_setup_hook")
    if hook and hook != own_hook and answers.setup_hook == "refuse":
        refuse("worker_process_setup_hook", "setup_hook", "jail")
    variables = runtime_env.get("env_vars") or {}
    for name in sorted(map(str, variables)):
        kind = variable_kind(name)
        if kind == "loader" and answers.loader_variables == "refuse":
            refuse(f"env_vars.{name}", "loader_variables", "jail")
        elif kind == "ray" and answers.ray_variables == "refuse":
            refuse(f"env_vars.{name}", "ray_variables", "drop")
    return found


def _interpreter_keys(runtime_env: Mapping[str, Any]) -> list[str]:
    """Return the keys that say what the worker's interpreter is.

    An installer makes one, too: with the packages beside another they would be lost.
    """
    keys = [key for key in (*_INTERPRETERS, "pip", "uv") if runtime_env.get(key)]
    return keys if any(key in _INTERPRETERS for key in keys) else []


def _interpreter_problem(key: str, value: object, answers: RuntimeEnv) -> str:
    """Say why something is not put in the place of the node's Python; "" if it is."""
    if key == "py_executable":
        if value in answers.py_executable:
            return ""
        if named := ", ".join(answers.py_executable):
            return f"runtime_env.py_executable allows {named} alone"
        return (
            "runtime_env.py_executable = [PATH] would allow one that the operator made"
        )
    if key == "conda":
        if not isinstance(value, str):
            return (
                "no value of runtime_env.conda allows a specification: its installer "
                "would run the job's code on the node; the operator can make the "
                "environment and name it there"
            )
        return _unnamed("conda", value, answers.conda, "{NAME = PREFIX}")
    if key in PROFILERS:
        if getattr(answers, key) is None:
            return f"runtime_env.{key} = PATH would allow one that the operator made"
        if value == "default":
            return ""
        return (
            f'runtime_env.{key} allows "default" alone: the options are the operator\'s'
        )
    if key == "container":
        if answers.container == "refuse":
            return (
                'runtime_env.container = "image_uri" would allow images that '
                "runtime_env.image_uri names"
            )
        if not isinstance(value, Mapping) or set(value) != {"image"}:
            return (
                "runtime_env.container allows {image = URI} alone: no container "
                "engine is used, and its options have no meaning"
            )
        value = value["image"]
    return _unnamed("image_uri", value, answers.image_uri, "{URI = DIRECTORY}")


def _unnamed(key: str, value: object, named: Mapping[str, Any], remedy: str) -> str:
    if isinstance(value, str) and value in named:
        return ""
    if named:
        return f"runtime_env.{key} allows {', '.join(named)} alone"
    return f"runtime_env.{key} = {remedy} would allow one that the operator made"


def image_of(runtime_env: Mapping[str, Any]) -> str:
    """Return the image that a runtime_env asks for, whichever key has it; "" if none.

    Of one that the policy allows.
    """
    container = runtime_env.get("container")
    inside = container.get("image") if isinstance(container, Mapping) else None
    return str(runtime_env.get("image_uri") or inside or "")


def as_made(policy: Policy, runtime_env: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what Ray's agent is to make of a runtime_env that is not refused.

    What the policy has under a name is asked for by its interpreter, which Ray's
    agent takes as it is: no plugin of its own runs for it.
    """
    keys = [key for key in _interpreter_keys(runtime_env) if key in _INTERPRETERS]
    if len(keys) != 1 or keys == ["py_executable"]:
        return runtime_env
    key, answers = keys[0], policy.runtime_env
    ours, value = _INTERPRETERS[key], runtime_env[key]
    if _interpreter_problem(ours, value, answers):
        return runtime_env
    if ours == "conda":
        asked = python_of(answers.conda[value])
    elif ours in PROFILERS:
        asked = f"{ours}:{getattr(answers, ours).program}"
    else:
        asked = f"{IMAGE_PREFIX}{image_of(runtime_env)}"
    rest = {name: each for name, each in runtime_env.items() if name != key}
    return {**rest, "py_executable": asked}


def _package_problem(uri: object, answers: RuntimeEnv) -> str:
    """Say why the agent may not read, fetch or install a package; "" if it may."""
    if not isinstance(uri, str):
        return "it is not text"
    if _UPLOADED.fullmatch(uri):
        return ""
    if not uri.startswith("gcs://") and not _REMOTE.fullmatch(uri):
        return (
            "no key of it allows this: the agent would read the node's own files, "
            "with the node's rights, for whoever asks. Give ray.init a directory or "
            ".zip file of the driver's, without a scheme: Ray uploads it"
        )
    if not uri.startswith("gcs://") and answers.remote_uris == "refuse":
        return 'runtime_env.remote_uris = "allow" would allow it'
    if ".whl" in uri.lower():
        # By any name: pip also builds what the wheel says that it needs.
        if answers.pip == "refuse":
            return (
                'a wheel is installed by pip: runtime_env.pip = "allow" would allow it'
            )
        if not _WHEEL.fullmatch(uri.rpartition("/")[2]):
            return "it is no name of a wheel"
    elif uri.startswith("gcs://"):
        return (
            "no key of it allows this: it is no name that Ray gives to a directory "
            "or .zip file that it uploads. Give ray.init one of these, without a "
            "scheme; tar archives are not taken"
        )
    return ""


def _scheme(uri: object) -> str:
    match = re.match(r"[A-Za-z][A-Za-z0-9+.-]{0,19}:", str(uri))
    return f"{match[0].lower()}//" if match else "a package without a scheme"


def variable_kind(name: str) -> str:
    """Return ``"ray"``, ``"loader"`` or ``""`` for a variable's name."""
    if any(fnmatchcase(name, pattern) for pattern in RAY_VARIABLES):
        return "ray"
    if any(fnmatchcase(name, pattern) for pattern in LOADER_VARIABLES):
        return "loader"
    return ""


def jail_variables(
    policy: Policy | None, variables: Mapping[str, Any]
) -> dict[str, str]:
    """Return those of a runtime_env's variables that its jails see."""
    hidden = {"ray"}
    if policy is not None and policy.runtime_env.loader_variables != "jail":
        hidden.add("loader")
    return {
        str(name): str(value)
        for name, value in variables.items()
        if variable_kind(str(name)) not in hidden
    }

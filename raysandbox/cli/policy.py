"""``raysandbox policy``: what this node's operator allows, and what a job gets."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from raysandbox import policy as policies
from raysandbox.cli.look import AsJson, application
from raysandbox.errors import ProfileError
from raysandbox.observe.text import shown
from raysandbox.profile import dump

__all__ = ["app"]

app = application(
    help="What a node's operator allows: write, check, show and explain the policy.",
)

PolicyFile = Annotated[
    str,
    typer.Option(
        "--policy",
        help="The policy's file; default: RAYSANDBOX_POLICY, else "
        "/etc/raysandbox/policy.toml.",
    ),
]


@app.command()
def init(
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write it.")
    ] = Path(policies.SITE_FILE),
    force: Annotated[
        bool, typer.Option("--force", help="Replace a file that is there.")
    ] = False,
) -> None:
    """Write a policy to start from, with every table explained.

    It offers strict and standard to everybody, lets nothing take the place of a
    worker, and leaves raylet and the GCS a tenth of the CPU, a fifth of the memory
    and half of the process ids.
    """
    template = Path(policies.__file__).with_name("default.toml").read_text()
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    flags |= os.O_TRUNC if force else os.O_EXCL
    try:
        output.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        fd = os.open(output, flags, 0o644)
    except FileExistsError:
        raise ProfileError(
            source=str(output), reason="is there already; --force replaces it"
        ) from None
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise ProfileError(
            source=str(output), reason=f"can't be written: {why}"
        ) from error
    with open(fd, "w") as file:
        os.fchmod(fd, 0o644)
        file.write(template)
    _, problems = policies.check(output)
    for problem in problems:
        print(problem)
    print(f"{output}: written")
    raise typer.Exit(1 if problems else 0)


@app.command()
def check(
    file: Annotated[
        str, typer.Argument(help="The policy's file; default: as for a node.")
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with a policy, one line each.

    Also loads every profile that it names, and says which of them ask for more
    than the ceilings allow: they run with less, and starts every interpreter that
    it names. Exit status 0 if a node would start with it, 1 if not.
    """
    path = policies.find(file)
    node, problems = policies.check(path)
    if node is not None and node.policy.runtime_env.interpreters():
        from raysandbox.node import interpreters

        try:
            interpreters.look(node.policy)
        except ProfileError as error:
            node, problems = None, [*problems, str(error)]
    lowered = {name: [str(e) for e in each] for name, each in _lowered(node).items()}
    if as_json:
        found = {"policy": str(path), "problems": problems, "lowered": lowered}
        print(json.dumps(found, indent=2))
    else:
        for problem in problems:
            print(problem)
        for name, excesses in lowered.items():
            for excess in excesses:
                print(f"{path}: profile {name}: lowered: {excess}")
        if node is not None:
            print(f"{path}: fine")
    raise typer.Exit(1 if problems else 0)


def _lowered(node: policies.Node | None) -> Any:
    return node.lowered if node is not None else {}


@app.command()
def show(policy: PolicyFile = "", as_json: AsJson = False) -> None:
    """Print a policy with every default, as TOML that would load to the same."""
    found = policies.load(policies.find(policy))
    if as_json:
        print(json.dumps(found.model_dump(mode="json", by_alias=True), indent=2))
        return
    print(f"# {found.source}")
    print(dump(found), end="")


@app.command()
def schema() -> None:
    """Print the JSON Schema of a policy, for editors."""
    print(json.dumps(policies.json_schema(), indent=2))


@app.command()
def explain(
    identifier: Annotated[
        str,
        typer.Argument(
            metavar="[JOB_OR_TASK]",
            help="Id of a job, actor or task of the running cluster.",
        ),
    ] = "",
    namespace: Annotated[
        str, typer.Option(help="Without an id: the job's Ray namespace.")
    ] = "",
    metadata: Annotated[
        list[str] | None,
        typer.Option(help="Without an id: KEY=VALUE of the job; repeatable."),
    ] = None,
    tag: Annotated[
        str, typer.Option(help="The profile asked for; default: the task's own, or no.")
    ] = "",
    signer: Annotated[str, typer.Option(help="Who signed the code, verified.")] = "",
    address: Annotated[
        str, typer.Option(help="The cluster's GCS; default: RAY_ADDRESS, or this node.")
    ] = "",
    policy: PolicyFile = "",
    as_json: AsJson = False,
) -> None:
    """Say which rule decides for a job or task, what it gets, and why.

    For an id the cluster is asked what it knows of it. The policy is this
    node's: other nodes may have another. Exit status 0 if it gets a profile, 1 if
    it is refused.

    \b
    raysandbox policy explain 03000000
    raysandbox policy explain --namespace team-a --metadata stage=prod --tag fast
    """  # noqa: D301 - \b keeps the lines of a paragraph apart
    node = policies.load_node(policies.find(policy))
    found: dict[str, Any] = {}
    if identifier:
        request, found = _of_cluster(identifier, address, tag, signer)
    else:
        request = policies.Request(
            tag=tag or None,
            namespace=namespace,
            metadata=dict(_pair(each) for each in metadata or ()),
            signer=signer or None,
        )
    decision = policies.decide(node.policy, request)
    found |= {
        "policy": node.policy.source,
        "namespace": request.namespace,
        "metadata": dict(request.metadata),
        "tag": request.tag,
        "allowed": decision.profile is not None,
        "profile": decision.profile,
        "rule": decision.rule or None,
        "why": decision.why,
        "remedy": decision.remedy or None,
        "skipped": list(decision.skipped),
    }
    if decision.profile is not None:
        found["gets"] = _gets(node, decision.profile)
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    raise typer.Exit(0 if decision.profile is not None else 1)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ProfileError(source="--metadata", value=text, reason="must be KEY=VALUE")
    return key, value


def _of_cluster(
    identifier: str, address: str, tag: str, signer: str
) -> tuple[policies.Request, dict[str, Any]]:
    from raysandbox.observe import gcs

    accessor = gcs.connect(gcs.find_address(address))
    subject = gcs.look_up(accessor, identifier)
    asked = tag or (policies.tag_of(subject.resources) if subject.resources else None)
    request = policies.Request(
        tag=asked,
        amount=policies.amount_of(subject.resources or {}) if asked else 1.0,
        namespace=subject.namespace,
        metadata=subject.metadata,
        signer=signer or None,
    )
    return request, {
        "id": identifier,
        "kind": subject.kind,
        "name": subject.name or None,
        "job": subject.job,
    }


def _gets(node: policies.Node, name: str) -> dict[str, Any]:
    """Return what running under a profile of this node comes to."""
    profile = node.profiles[name]
    plain = profile.model_dump(mode="json", by_alias=True)
    answers = node.policy.runtime_env.model_dump(exclude={"why"})
    allowed = [key for key, answer in answers.items() if answer == "allow"]
    return {
        "boundary": profile.boundary,
        "results": profile.results.mode,
        "network": profile.network.mode,
        "worker_connects": _connects(node.policy),
        "limits": {k: plain["limits"][k] for k in ("cpu", "memory", "pids")}
        | {"wall_time_s": profile.limits.wall_time_s},
        "lowered": [str(excess) for excess in node.lowered.get(name, [])],
        "at_once": node.policy.offer.get(name),
        "source": profile.source,
        "runtime_env": {
            "allows": [
                *("env_vars", "working_dir", "py_modules"),
                *allowed,
                *answers["py_executable"],
                *(f"conda {name}" for name in answers["conda"]),
                *(f"image_uri {uri}" for uri in answers["image_uri"]),
                *(key for key in ("nsight", "rocprof_sys") if answers[key]),
            ],
            "refuses": [key for key, answer in answers.items() if answer in _REFUSED],
        },
    }


_REFUSED: tuple[object, ...] = ("refuse", None, (), {})


def _connects(policy: policies.Policy) -> list[str]:
    """Return the TCP ports that the worker may connect to, whatever its profile."""
    if policy.worker.connect is None:
        return ["any port"]
    return ["this node's own ports", *map(str, policy.worker.connect)]


def _print(found: dict[str, Any]) -> None:
    def row(name: str, value: object) -> None:
        print(f"{name:<12} {shown(value, 500)}")

    if "id" in found:
        what = f"{found['kind']} {found['id']}"
        row("asks", f"{what} ({found['name']})" if found["name"] else what)
        row("job", found["job"])
    row("namespace", found["namespace"] or "(none)")
    for key, value in found["metadata"].items():
        row(f"metadata {shown(key, 60)}", value)
    row("tag", found["tag"] or "(none)")
    for each in found["skipped"]:
        row("not", each)
    row("rule", found["rule"] or "(none is for this job)")
    row("gets", found["profile"] or "nothing: refused")
    row("because", found["why"])
    if found["remedy"]:
        row("to fix", found["remedy"])
    for key, value in found.get("gets", {}).items():
        if isinstance(value, dict):
            value = ", ".join(
                f"{k} {' '.join(v) if isinstance(v, list) else v}"
                for k, v in value.items()
            )
        if isinstance(value, list):
            value = "; ".join(value)
        if value not in (None, ""):
            row(f"  {key}", value)
    row("policy", found["policy"])

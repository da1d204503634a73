"""`raysandbox cluster …`."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from raysandbox.cli import certs, nodes
from raysandbox.cli.look import AsJson, application
from raysandbox.cli.member import Dir, fail, opened, take_up
from raysandbox.cluster.audit import plain
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir
from raysandbox.errors import RaysandboxError

__all__ = ["app"]

app = application("A hardened cluster: identities, guard, nodes.")

DOWN = 3  # exit status of `status` for what does not run, as init scripts have it


@app.command()
def init(
    directory: Path,
    name: Annotated[str, typer.Option(help="The cluster's name.")] = "ray",
    head_address: Annotated[
        str, typer.Option(help="The head's IP address as nodes reach it.")
    ] = "127.0.0.1",
    head_name: Annotated[str, typer.Option(help="The head node's name.")] = "head",
    port: Annotated[
        int, typer.Option(help="The guard's port.", min=1, max=65535)
    ] = 6379,
    external_ca: Annotated[
        Optional[Path],  # noqa: UP045 - typer reads it at run time on Python 3.10
        typer.Option(help="Use this CA certificate; its key stays where it is."),
    ] = None,
) -> None:
    """Make a cluster directory with a CA, a token and the head's identity."""
    made = not directory.exists()
    try:
        if not made and (not directory.is_dir() or any(directory.iterdir())):
            raise ClusterError(
                where=str(directory), what="exists and is not an empty directory"
            )
        _init(directory, name, head_address, head_name, port, external_ca)
    except OSError as error:
        fail(ClusterError(where=str(error.filename), what=str(error.strerror)))
    except RaysandboxError as error:
        if made:
            shutil.rmtree(directory, ignore_errors=True)
        fail(error)
    print(f"cluster {name!r} made in {directory}")
    if external_ca is None:
        print(f"whoever has {directory}/ca can be anybody: keep it safe")
        print(f"next: raysandbox cluster up --cluster {directory}")
    else:
        print(
            f"next: `raysandbox cluster certs csr --cluster {directory}`, have your CA "
            "sign what is in pending, `certs import`, and `certs trust` its CRL"
        )


def _init(
    directory: Path, name: str, address: str, head_name: str, port: int,
    external_ca: Path | None,
) -> None:  # fmt: skip
    from raysandbox.cluster import inventory, pki
    from raysandbox.cluster.registry import Registry, check_member
    from raysandbox.cluster.settings import Settings, toml_text, validate, write_file

    check_member("head", head_name, [address])
    # JSON's strings are TOML's, so what is given can't become a key.
    text = "".join(
        f"{key} = {json.dumps(value)}\n"
        for key, value in (
            ("name", name),
            ("head_address", address),
            ("port", port),
            ("gcs_port", port + 10000 if port < 55000 else port - 10000),
        )
    )
    validate(directory / "cluster.toml", text, Settings)
    ca = pki.load_chain(external_ca)[0] if external_ca else None
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.chmod(directory, 0o700)
    write_file(directory / "cluster.toml", text, 0o644)
    cluster = ClusterDir(directory)
    write_file(
        directory / "member.toml",
        toml_text(_member("head", head_name, address)),
        0o644,
    )
    inventory.add(cluster, head_name, [address], {}, {}, head=True)
    write_file(cluster.token, secrets.token_hex(32))
    registry = Registry(cluster)
    if ca is None:
        registry.create()
        registry.issue("head", head_name, [address], directory)
    else:
        registry.adopt(ca)


def _member(role: Any, name: str, address: str) -> Any:
    from raysandbox.cluster.settings import Member

    return Member(role=role, name=name, addresses=(address,))


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what Ray prints to a file: it tells how to go on with a plain cluster.

    Our own lines in it, and all of it after a failure, go to stderr afterwards.
    """
    log = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    sys.stdout.flush()
    kept = os.dup(1), os.dup(2)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ours = ("raysandbox: ",)
    try:
        yield
    except BaseException:
        ours = ("",)
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for fd, old in enumerate(kept, 1):
            os.dup2(old, fd)
            os.close(old)
        os.close(log)
        for line in path.read_text(errors="replace").splitlines()[-40:]:
            if line.startswith(ours):
                print(plain(line), file=sys.stderr)


@app.command(context_settings={"ignore_unknown_options": True})
def up(
    cluster: Dir,
    arguments: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Argument(help="Further arguments of ray start, after --."),
    ] = None,
    policy: Annotated[
        str,
        typer.Option(help="The node's policy; else RAYSANDBOX_POLICY or the site's."),
    ] = "",
    as_json: AsJson = False,
) -> None:
    """Start this member: the head with its guard, or a node."""
    from raysandbox.cluster import running

    directory = opened(cluster)
    try:
        member, settings = directory.member(), directory.settings()
        if running.alive(directory):
            raise ClusterError(
                where=f"{member.role}/{member.name}",
                what="is up already",
                remedy="`raysandbox cluster down` first, or `cluster status`",
            )
        address = f"{settings.head_address}:{settings.port}"
        first = ["--head"] if member.role == "head" else [f"--address={address}"]
        began = time.monotonic()
        print(f"starting {member.role}/{member.name} …", file=sys.stderr, flush=True)
        directory.run.mkdir(mode=0o700, exist_ok=True)
        with _output_to(directory.run / "start.log"):
            from raysandbox.cluster.start import speak

            # The next import is Ray's too, which reads then who it is.
            speak(directory)
            from raysandbox.node.start import start as run

            run([*first, *(arguments or [])], policy=policy, cluster=directory)
    except RaysandboxError as error:
        fail(error)
    told = {
        "member": f"{member.role}/{member.name}",
        "address": address,
        "processes": dict(running.alive(directory)),
        "seconds": round(time.monotonic() - began, 1),
    }
    print(
        json.dumps(told)
        if as_json
        else f"{told['member']} is up after {told['seconds']} s; drivers connect to "
        f"{address} with `raysandbox cluster env`"
    )


@app.command()
def status(cluster: Dir, as_json: AsJson = False) -> None:
    """Say what runs here, what is open, and which certificates end soon.

    Exit status: 0 all is well, 1 there is a problem, 3 it is not running.
    """
    from raysandbox.cluster.report import member_report

    directory = opened(cluster)
    try:
        found = member_report(directory)
    except RaysandboxError as error:
        fail(error)
    if as_json:
        print(json.dumps(found))
    else:
        state = "up" if found["running"] else "DOWN"
        print(f"{found['member']} of {found['cluster']}: {state}")
        running = found["processes"].items() if found["running"] else ()
        for kind, pid in running:
            print(f"  {kind}: {'pid ' + str(pid) if pid else 'ENDED'}")
        for node in found["nodes"]:
            print(f"  node {node['name'] or '(unknown)'} {node['address']}")
        for kind in ("problems", "warnings"):
            for text in found[kind]:
                print(f"{kind[:-1]}: {text}")
    if not found["running"]:
        raise typer.Exit(DOWN)
    if found["problems"]:
        raise typer.Exit(1)


@app.command()
def down(cluster: Dir, as_json: AsJson = False) -> None:
    """End this member: its processes of Ray, then guard and helpers."""
    from raysandbox.cluster import running
    from raysandbox.cluster.start import down as end

    directory = opened(cluster)
    try:
        ended = running.stop(directory)
        if end(directory):
            ended.append("helpers")
    except PermissionError:
        fail(
            ClusterError(
                where=str(directory.path),
                what="its processes belong to another user",
                remedy="run this as the user that started them",
            )
        )
    if as_json:
        print(json.dumps({"ended": ended}))
    else:
        print(f"ended: {', '.join(ended)}" if ended else "nothing was running")


@app.command(context_settings={"ignore_unknown_options": True})
def env(
    cluster: Dir,
    command: Annotated[
        Optional[list[str]],  # noqa: UP045 - as above
        typer.Argument(help="Command to run; without one, print export lines."),
    ] = None,
) -> None:
    """Speak as this directory's driver, operator or observer."""
    import shlex

    from raysandbox.cluster import pki

    directory = opened(cluster)
    try:
        member, settings = directory.member(), directory.settings()
        component = pki.COMPONENTS[member.role][-1]
        for warning in pki.check_identity(directory, component):
            print(f"raysandbox: warning: {warning}", file=sys.stderr)
    except ClusterError as error:
        fail(error)
    if member.role == "driver" and not _raylet_here():
        print(
            "raysandbox: warning: no node of a cluster runs on this machine, and Ray's "
            "drivers work through one: start one here (`raysandbox start`, with "
            "--num-cpus=0 if it is to run no tasks), or submit a job",
            file=sys.stderr,
        )
    wanted = directory.tls_env(component)
    wanted["RAY_ADDRESS"] = f"{settings.head_address}:{settings.port}"
    if command:
        try:
            os.execvpe(command[0], command, {**os.environ, **wanted})  # noqa: S606
        except OSError as error:
            fail(ClusterError(where=command[0], what=str(error.strerror)))
    for key, value in wanted.items():
        print(f"export {key}={shlex.quote(value)}")


def _raylet_here() -> bool:
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "raylet\n":
                return True
        except OSError:
            continue
    return False


@app.command()
def reload(cluster: Dir) -> None:
    """Have the running helpers take up inventory, grants, certificates, CRLs."""
    try:
        if not take_up(opened(cluster)):
            print("nothing runs here")
    except ClusterError as error:
        fail(error)


app.command()(nodes.quarantine)
app.command()(nodes.release)
app.add_typer(nodes.app, name="nodes")
app.add_typer(certs.app, name="certs")

"""What a hardened start refuses and writes, before anything runs."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raysandbox.cluster import guard, running, sessions, start
from raysandbox.cluster.errors import ClusterError
from raysandbox.cluster.settings import ClusterDir, Inventory, Settings, validate
from raysandbox.cluster.start import _running, preflight, write_wrapper
from tests.unit.test_certificates import make_cluster

SUPERVISOR = "raysandbox.cluster.supervisor"


@pytest.fixture
def cluster(tmp_path: Path) -> ClusterDir:
    """A head's directory with a space in its name."""
    made = make_cluster(tmp_path / "our cluster")
    made.run.mkdir(mode=0o700)
    _set(made)
    return made


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _set(cluster: ClusterDir, *lines: str) -> None:
    text = [
        'name = "prod"', 'head_address = "127.0.0.1"', f"port = {_free_port()}",
        f"gcs_port = {_free_port()}", *lines,
    ]  # fmt: skip
    (cluster.path / "cluster.toml").write_text("\n".join(text))


def _start_flags(*more: str) -> list[str]:
    return ["--head", *more]


def test_start_of_a_good_head_is_not_refused(cluster: ClusterDir) -> None:
    """Positive control of the refusals below."""
    assert preflight(cluster, _start_flags()) == []
    config = '--system-config={"health_check_period_ms": 1000}'
    assert preflight(cluster, _start_flags(config)) == []


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ('{"USE_TLS": false}', "USE_TLS=false changes who may speak to whom"),
        ('{"auth_mode": "disabled"}', "auth_mode="),
        ('{"TLS_SERVER_KEY": "/x", "y": 1}', "TLS_SERVER_KEY="),
        ("{use_tls: 0}", "no JSON object"),
        ("[1]", "no JSON object"),
    ],
)
def test_system_config_takes_no_protection_away(
    cluster: ClusterDir, config: str, part: str
) -> None:
    """Ray's own settings come before the environment: they are looked at first."""
    (problem,) = preflight(cluster, _start_flags("--system-config", config))
    assert problem.startswith("--system-config")
    assert part in problem


def test_dashboard_is_where_its_front_leads(cluster: ClusterDir) -> None:
    """Another port, or somebody else's process on it, would be sent the token."""
    _set(cluster, f"dashboard_tls_port = {_free_port()}")
    (problem,) = preflight(cluster, _start_flags("--dashboard-port=9000"))
    assert "with dashboard_tls_port in cluster.toml it must be 8265" in problem
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(guard, "DASHBOARD_PORT", port)
            (problem,) = preflight(cluster, _start_flags())
    assert problem.startswith(f"port {port}, for the dashboard, is in use")


def test_directory_is_one_nodes(cluster: ClusterDir) -> None:
    """A second raylet would make the first one's workers those of before."""
    running.remember(cluster, [("gcs_server", os.getpid())])
    assert preflight(cluster, _start_flags()) == []
    running.remember(cluster, [("raylet", os.getpid())])
    (problem,) = preflight(cluster, _start_flags())
    assert f"runs already (pid {os.getpid()})" in problem
    assert "raysandbox cluster down" in problem


def test_directory_that_can_not_be_written_is_named(cluster: ClusterDir) -> None:
    """Before anything is started: nothing has to be ended again."""
    cluster.run.rmdir()
    cluster.run.write_text("what is no directory")
    with pytest.raises(ClusterError, match="nothing was started") as refused:
        start.start(cluster, _start_flags())
    assert refused.value.where == str(cluster.run)


def test_head_listens_at_addresses_that_it_has(cluster: ClusterDir) -> None:
    """Nowhere else, so an address of another machine is refused, by name."""
    _set(cluster, 'listen_addresses = ["192.0.2.7"]')
    (problem,) = preflight(cluster, _start_flags())
    assert problem.startswith("192.0.2.7, where the guard is to listen, is no address")


@pytest.mark.parametrize(
    ("more", "where"),
    [
        ({}, ["10.0.0.1", "127.0.0.1"]),
        ({"listen_addresses": ["10.0.0.5"]}, ["10.0.0.5", "127.0.0.1"]),
        ({"listen_addresses": ["10.0.0.5", "0.0.0.0"]}, ["0.0.0.0"]),
        ({"head_address": "localhost"}, ["127.0.0.1"]),
    ],
)
def test_guard_listens_where_the_settings_say(
    more: dict[str, Any], where: list[str]
) -> None:
    """At the head's own address and on loopback, unless others are named."""
    settings = Settings(**{"name": "c", "head_address": "10.0.0.1", **more})
    assert guard.listen_addresses(settings) == where
    found = guard.listeners(settings, Inventory(), Path("/run"), {"head": "CN=x"})
    main = found["resources"][0]
    bound = [main, *main["additional_addresses"]]
    assert [b["address"]["socket_address"]["address"] for b in bound] == where


def test_head_of_no_ipv4_address_is_refused() -> None:
    """The guard listens at no other, and nodes would wait for ever."""
    text = 'name = "c"\nhead_address = "fd00::1"'
    with pytest.raises(ClusterError, match="must be an IPv4 address"):
        validate(Path("cluster.toml"), text, Settings)
    gone = Settings(name="c", head_address="nowhere.invalid")
    with pytest.raises(ClusterError, match="has no IPv4 address"):
        guard.listen_addresses(gone)


def test_supervisor_of_another_cluster_is_not_ours(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """A pid that was ours is somebody else's by now; it is not signalled.

    Positive control: the same process is found by its own cluster's directory.
    """
    other = make_cluster(tmp_path / "other")
    other.run.mkdir(mode=0o700)
    code = "import time; print('up', flush=True); time.sleep(60)"
    for argument, whose in ((cluster.path, cluster), (tmp_path / "other", other)):
        process = subprocess.Popen(
            [sys.executable, "-c", code, "-m", SUPERVISOR, str(argument)],
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        for each in (cluster, other):
            (each.run / "supervisor.pid").write_text(str(process.pid))
            assert _running(each) == (process.pid if each is whose else 0)
        process.kill()
        process.communicate()


def test_worker_starts_in_a_directory_with_a_space(
    cluster: ClusterDir, tmp_path: Path
) -> None:
    """Its certificate is taken from the stock, and its program is run."""
    program = tmp_path / "a program's name"
    program.write_text('#!/bin/sh\necho "$RAY_TLS_SERVER_CERT" "$@"\n')
    program.chmod(0o700)
    for name in ("workers", "workers-used"):
        (cluster.run / name).mkdir()
    # One of an earlier raylet's is no worker's any more.
    (cluster.run / "workers" / "0-w.pem").write_text("x")
    session = sessions.begin(cluster.run)
    (cluster.run / "workers" / f"{session}-w.pem").write_text("x")
    wrapper = write_wrapper(cluster, str(program))
    out = subprocess.run([wrapper, "a b"], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    path = out.stdout.removesuffix(" a b\n")
    assert path.startswith(f"{cluster.run}/workers-used/")
    assert os.path.exists(path)
    assert (cluster.run / "workers" / "0-w.pem").exists()


AGENT = (
    "import ctypes, socket, sys, time\n"
    "ctypes.CDLL(None).prctl(15, sys.argv[1].encode())\n"
    "if 'listen' in sys.argv:\n"
    "    listener = socket.create_server(('127.0.0.1', 0))\n"
    "print('up', flush=True); time.sleep(60)\n"
)


@pytest.mark.parametrize(
    ("dashboard", "runtime_env", "silent"),
    [
        (["listen"], ["listen"], ""),
        (["listen"], [], "RuntimeEnv"),
        ([], ["listen"], "DashboardA"),
        (["--minimal"], ["listen"], ""),
    ],
)
def test_agent_that_opens_no_port_refuses_the_start(
    monkeypatch: pytest.MonkeyPatch,
    dashboard: list[str],
    runtime_env: list[str],
    silent: str,
) -> None:
    """What it will leave open is not known, so nobody goes on without it.

    Where Ray has no dashboard, that agent has no port to wait for.
    """
    started: list[tuple[str, subprocess.Popen[bytes]]] = []
    for name, more in (
        ("ray::DashboardA", dashboard),
        ("ray::RuntimeEnv", runtime_env),
    ):
        process = subprocess.Popen(
            [sys.executable, "-c", AGENT, name, *more], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        process.stdout.readline()
        started.append(("raylet", process))
    monkeypatch.setattr(start.seams, "started", lambda: started)
    monkeypatch.setattr(start, "AGENTS_S", 1)
    try:
        if silent:
            with pytest.raises(ClusterError, match=f"{silent}.* had yet to open"):
                start._refuse_open(head=False)
        else:
            start._refuse_open(head=False)
    finally:
        for _, process in started:
            process.kill()
            process.communicate()

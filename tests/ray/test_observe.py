"""What an operator sees of a running node, and can end: ps, top, events, kill."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from raysandbox.observe import live, state
from tests.ray.policed import Policed

POLICY = """
[offer]
strict = 8
standard = 8
trusted = 8
[[rules]]
name = "everybody"
profiles = ["standard", "trusted"]
"""

# Two jails to look at: an actor that waits, and a task that works until it is told
# to stop, with a name that would turn a terminal red.
BODY = r"""
@ray.remote(max_restarts=0, max_task_retries=0, resources={"sandbox:standard": 1})
class Keeper:
    def pid(self):
        return 1


@ray.remote(max_retries=0, resources={"sandbox:strict": 1}, num_cpus=0.1)
def busy(seconds):
    import socket, time
    try:
        socket.socket()
    except OSError:
        pass
    block = bytearray(32 << 20)
    time.sleep(seconds)
    return len(block)


keeper = Keeper.remote()
ray.get(keeper.pid.remote())
named = busy.options(name="a\x1b[31mred\n[bold]")
task = named.remote(60)
job = ray.get_runtime_context().get_job_id()
spoken({"actor": keeper._actor_id.hex(), "task": task.task_id().hex(), "job": job})
result = {
    "task": told(lambda: ray.get(task, timeout=30)),
    "actor": told(lambda: ray.get(keeper.pid.remote(), timeout=30)),
}
"""


@pytest.fixture(scope="module")
def node() -> Iterator[Policed]:
    """A node with a policy."""
    tags = {f"sandbox:{name}": 8.0 for name in ("strict", "standard", "trusted")}
    made = Policed(POLICY, tags, {}, {"RAY_metrics_report_interval_ms": "1000"})
    yield made
    made.close()


class Driver:
    """A driver in the middle of its work."""

    def __init__(self, node: Policed) -> None:
        self.process = node.driver(BODY)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate()[1]
        self.told: dict[str, str] = json.loads(line)

    def finish(self) -> dict[str, Any]:
        """Let it go on; return what became of its task and actor."""
        out, err = self.process.communicate("\n", timeout=60)
        assert self.process.returncode == 0, err
        found: dict[str, Any] = json.loads(out.splitlines()[-1])
        return found


@pytest.fixture
def driver(node: Policed) -> Iterator[Driver]:
    """A driver with one idle and one running jail."""
    made = Driver(node)
    yield made
    made.process.kill()
    made.process.wait()


def _ps(node: Policed) -> list[dict[str, Any]]:
    """What `ps` prints, without starting it each time."""
    return [row.as_json() for row in live.rows() if row.node == node.node]


def _until(look: Callable[[], Any], seconds: float = 60) -> Any:
    """Return the first thing that ``look`` finds."""
    end = time.monotonic() + seconds
    while not (found := look()) and time.monotonic() < end:
        time.sleep(0.1)
    assert found
    return found


def _jails(node: Policed, driver: Driver) -> dict[str, dict[str, Any]]:
    """This driver's jails by state, once both are there."""

    def look() -> dict[str, dict[str, Any]]:
        rows = [r for r in _ps(node) if r["job"] == driver.told["job"]]
        found = {r["state"]: r for r in rows if r["kind"] == "jail"}
        return found if found.keys() == {"running", "idle"} else {}

    found: dict[str, dict[str, Any]] = _until(look)
    return found


def test_ps_shows_jails_with_what_the_kernel_says(node, driver):
    """ps lists each jail with its ids and profile, and with usage from its group.

    What a jail chose is printed escaped: no name gets an escape sequence, a new
    line or markup onto the terminal, to hide its task or others.
    """
    jails = _jails(node, driver)
    running, idle = jails["running"], jails["idle"]
    assert running["task"] == driver.told["task"]
    assert running["profile"] == "strict"
    assert running["name"] == "a\x1b[31mred\n[bold]"
    assert idle["actor"] == driver.told["actor"]
    assert idle["profile"] == "standard"
    assert idle["calls"] == 2
    assert running["memory_limit_bytes"] == 1 << 30
    assert running["pids"] >= 1
    _until(lambda: _jails(node, driver)["running"]["memory_bytes"] > 32 << 20)
    _until(lambda: _jails(node, driver)["running"]["denials"] == 1)
    workers = {r["pid"]: r for r in _ps(node) if r["kind"] == "worker"}
    assert workers[running["pid"]]["state"] == "running"
    assert workers[idle["pid"]]["state"] == "idle"
    told = node.command("ps", "--json", "--node", node.node, "--profile", "strict")
    assert [row["id"] for row in json.loads(told.stdout)] == [running["id"]]
    for command in (["ps"], ["top", "-n", "1"]):
        shown = node.command(*command, "--node", node.node).stdout
        assert "\x1b[31m" not in shown
        assert "a\\x1b[31mred\\n[bold]" in shown


def test_a_killed_task_tells_its_owner_and_the_log(node, driver):
    """kill by a task's id ends its jail alone; the owner reads by whom, and why."""
    running = _jails(node, driver)["running"]
    done = node.command("kill", driver.told["task"], "--reason", "too hungry")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"jail {running['id']}: ended by worker" in done.stdout
    found = driver.finish()
    assert found["task"]["error"] == "TaskKilled"
    assert "ended by the operator (root: too hungry)" in found["task"]["text"]
    assert found["actor"] == 1
    lines = node.command("events", "--json", "--job", driver.told["job"]).stdout
    ended = [e for e in map(json.loads, lines.splitlines()) if e.get("ended_by")]
    assert [e["ended_by"] for e in ended] == ["root: too hungry"]
    assert node.command("kill", running["id"]).returncode == 1


def test_an_idle_actor_s_jail_can_be_killed(node, driver):
    """kill also ends a jail that waits for its next call."""
    idle = _jails(node, driver)["idle"]
    assert node.command("kill", idle["id"]).returncode == 0
    node.command("kill", driver.told["task"])
    assert driver.finish()["actor"]["error"] in ("TaskKilled", "RayActorError")


def test_a_worker_that_does_not_react_loses_its_jail_all_the_same(node, driver):
    """A stopped worker can't end its jail; the kernel does, by the jail's group."""
    running = _jails(node, driver)["running"]
    os.kill(running["pid"], signal.SIGSTOP)
    try:
        done = node.command("kill", running["id"], "--wait", "0.5")
        assert f"jail {running['id']}: ended by kernel" in done.stdout
    finally:
        os.kill(running["pid"], signal.SIGCONT)
    assert driver.finish()["task"]["error"] == "TaskKilled"


def test_a_killed_worker_is_ended_with_its_jails(node, driver):
    """kill of a worker ends it and its jail; what it left is no longer listed."""
    running = _jails(node, driver)["running"]
    done = node.command("kill", str(running["pid"]), "--json")
    assert json.loads(done.stdout)[0]["by"] in ("SIGTERM", "SIGKILL"), done.stderr
    assert driver.finish()["task"]["error"] == "WorkerCrashedError"
    assert running["pid"] not in {row["pid"] for row in _ps(node)}
    lines = node.command("events", "--event", "worker_ended", "--json").stdout
    assert running["worker"] in lines


def test_a_worker_that_is_its_own_boundary_is_seen_and_can_be_killed(node):
    """With boundary = "worker" the process itself is listed, with its group's usage."""
    body = """
    @ray.remote(max_retries=0, resources={"sandbox:trusted": 1})
    def inside():
        import time
        block = bytearray(16 << 20)
        time.sleep(60)
    task = inside.remote()
    spoken(task.task_id().hex())
    result = told(lambda: ray.get(task, timeout=30))
    """
    with node.driver(body) as process:
        assert process.stdout is not None
        task = json.loads(process.stdout.readline())
        (row,) = _until(lambda: [r for r in _ps(node) if r["task"] == task])
        assert (row["profile"], row["kind"]) == ("trusted", "jail")
        assert row["memory_bytes"] > 0
        done = node.command("kill", task, "--wait", "0.5")
        assert f"jail {row['id']}: ended by kernel" in done.stdout
        out, err = process.communicate("\n", timeout=60)
    assert json.loads(out.splitlines()[-1])["error"] == "WorkerCrashedError", err


def test_only_jails_and_workers_can_be_killed(node):
    """An id that is none of ours is refused, whatever process has that pid.

    Guards against a kill that takes a number for what it was a moment ago.
    """
    raylet = next(
        int(name)
        for name in os.listdir("/proc")
        if name.isdigit() and _is_raylet_of(int(name), str(node.session))
    )
    with subprocess.Popen(["sleep", "60"]) as other:
        for pid in (raylet, other.pid, os.getpid(), 1):
            done = node.command("kill", str(pid))
            assert done.returncode == 1
            assert "no jail or worker of raysandbox" in done.stdout
        assert other.poll() is None
        other.kill()


def _is_raylet_of(pid: int, session: str) -> bool:
    try:
        with open(f"/proc/{pid}/comm") as name, open(f"/proc/{pid}/cmdline") as line:
            return name.read() == "raylet\n" and session in line.read()
    except OSError:
        return False


def test_a_state_file_that_claims_another_process_kills_nobody(node):
    """Whose file it is says the kernel, by its lock, not the file's content.

    Guards against code in a worker that points the operator's kill at others.
    """
    with subprocess.Popen(["sleep", "60"]) as victim:
        path = node.session / "logs" / "raysandbox_state-ffffffff.bin"
        pid = os.fork()
        if pid == 0:
            about = {"worker": "f" * 56, "node": "", "pid": victim.pid}
            board = state.Board(str(path.parent), "f" * 8, about)
            board.memory[12:16] = victim.pid.to_bytes(4, "little")
            time.sleep(60)
            os._exit(0)
        try:
            found = _until(
                lambda: [s for s in state.read(str(path.parent)) if s.pid == pid]
            )
            assert found[0].pid == pid
            for wanted in ("f" * 8, str(victim.pid), str(pid)):
                assert node.command("kill", wanted).returncode == 1
            assert victim.poll() is None
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            path.unlink()
            victim.kill()


def test_top_says_who_is_busy(node):
    """top --json has one line for each look, with the CPU between two in percent."""
    body = """
    @ray.remote(resources={"sandbox:strict": 1}, max_retries=0)
    def spin(seconds):
        import time
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            pass
    task = spin.remote(6)
    spoken("started")
    ray.get(task)
    result = 0
    """
    with node.driver(body) as process:
        assert process.stdout is not None
        process.stdout.readline()

        def look() -> list[Any]:
            lines = node.command("top", "--json", "-n", "2", "-d", "0.5").stdout
            rows = json.loads(lines.splitlines()[-1])["rows"]
            return [r for r in rows if r["name"] == "spin" and r["cpu_percent"]]

        assert _until(look)[0]["cpu_percent"] > 10
        process.communicate("\n")


def test_events_can_be_filtered_and_followed(node):
    """events --follow prints what comes, as it comes, if the filter takes it."""
    command = ["events", "--follow", "--json", "--task", "wan*", "--outcome", "ok"]
    with subprocess.Popen(
        [sys.executable, "-m", "raysandbox", *command],
        stdout=subprocess.PIPE,
        text=True,
    ) as following:
        node.drive("""
            def wanted(): pass
            def other(): pass
            for run in (other, wanted):
                ray.get(ray.remote(resources={"sandbox:strict": 1})(run).remote())
            result = 0
            """)
        assert following.stdout is not None
        assert json.loads(following.stdout.readline())["tasks"] == ["wanted"]
        following.kill()


def test_state_of_a_dead_worker_is_swept(node):
    """A file whose worker is gone is not read, and removed by the next sweep."""
    directory = str(node.session / "logs")
    path = os.path.join(directory, "raysandbox_state-00000000.bin")
    with open(path, "wb") as file:
        file.write(bytes(4096 + 16 * 512))
    os.utime(path, (1, 1))
    assert all(found.path != path for found in state.read(directory))
    assert path in state.sweep(directory)
    assert not os.path.exists(path)


def test_metrics_come_out_of_ray_s_own_pipeline(node):
    """Ray's metrics port has what became of jails, by profile and outcome.

    Labels are the operator's words and ours: no task's name makes a series.
    """
    found = node.drive("""
        import urllib.request

        def good(): pass
        def bad(): raise type("Evil", (Exception,), {})("x")
        def denied():
            import socket
            try:
                socket.socket()
            except OSError:
                pass
        def large(): return bytes(300 << 20)

        strict = {"sandbox:strict": 1}
        for run in (good, bad, denied, large):
            task = ray.remote(resources=strict, max_retries=0)(run)
            told(lambda: ray.get(task.options(name="a name").remote(), timeout=60))
        here = ray.nodes()[0]
        url = f"http://{here['NodeManagerAddress']}:{here['MetricsExportPort']}/metrics"
        job = ray.get_runtime_context().get_job_id()
        result, end, text = {}, time.monotonic() + 60, ""
        # Each worker hands on its own, when its turn comes.
        wanted = ('outcome="ok"', 'outcome="exception"', "raysandbox_denials")
        while time.monotonic() < end and not (
            len(result) >= 6 and all(each in text for each in wanted)
        ):
            time.sleep(1)
            text = urllib.request.urlopen(url).read().decode()
            lines = [l for l in text.splitlines() if l.startswith("ray_raysandbox_")]
            result = {}
            for line in lines:
                name = line.partition("{")[0].removeprefix("ray_raysandbox_")
                if not name.endswith(("_bucket", "_sum")):
                    result.setdefault(name, []).append(line)
        """)
    assert found.keys() >= {
        "jails_started_total", "jails_ended_total", "jail_wait_s_count",
        "denials_total", "quota_refusals_total", "walls_total",
    }  # fmt: skip
    ended = " ".join(found["jails_ended_total"])
    assert 'outcome="ok"' in ended
    assert 'outcome="exception"' in ended
    assert 'limit="object_store.max_result"' in found["quota_refusals_total"][0]
    assert any('wall="seccomp"' in line for line in found["walls_total"])
    assert any('state="enforced"' in line for line in found["walls_total"])
    assert not any(
        "Evil" in line or "a name" in line for lines in found.values() for line in lines
    )

"""A node on real Ray: nothing that a client says takes a worker out of its wall.

Code that runs in a worker process gives itself away by calling home: a worker
is on the host's network, a jail has none.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.node.home import CALL, SAFE, Home
from tests.node.nodes import PLAIN, ROOT, Node, free_port

pytestmark = [pytest.mark.ray, pytest.mark.root]


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    made = Node()
    try:
        yield made
    finally:
        made.close()


def _wait(what: str, check, timeout_s: float = 30) -> None:
    end = time.monotonic() + timeout_s
    while True:
        # A group may go while it is looked at.
        with contextlib.suppress(FileNotFoundError):
            if check():
                return
        assert time.monotonic() < end, f"not seen in time: {what}"
        time.sleep(0.1)


OPT_OUT = """
import json, pathlib
from ray._private.runtime_env import packaging

def look():
    safe_call(WHAT)
    return [os.getpid(), os.path.exists("/run/raysandbox"),
            os.environ.get("HOOKED"), "LD_PRELOAD" in os.environ,
            "RAYSANDBOX_X" in os.environ]

class Evil:
    def __reduce__(self):
        return (safe_call, ("argument",))

found = {}

def attempt(name, start):
    global WHAT
    WHAT = name
    try:
        found[name] = start()
    except BaseException as error:
        found[name] = f"{type(error).__name__}: {error}"[:600]

def task(**options):
    return lambda: ray.get(ray.remote(look).options(**options).remote(), timeout=45)

def actor(**options):
    class Looker:
        def __init__(self):
            safe_call("constructor")
        def look(self):
            return look()
    def start():
        made = ray.remote(Looker).options(**options).remote()
        return ray.get(made.look.remote(), timeout=45)
    return start

def group():
    made = ray.util.placement_group([{"CPU": 1}])
    ray.get(made.ready(), timeout=45)
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    try:
        return task(scheduling_strategy=PlacementGroupSchedulingStrategy(made))()
    finally:
        ray.util.remove_placement_group(made)

def argument():
    return ray.get(ray.remote(lambda _: look()).remote(Evil()), timeout=45)

def function():
    evil = Evil()
    return ray.get(ray.remote(lambda: evil and look()).remote(), timeout=45)

safe_call("control")
attempt("untagged", task())
attempt("argument", argument)
attempt("function", function)
attempt("tagged", task(resources={"sandbox:standard": 1}))
attempt("actor", actor())
attempt("detached", actor(name="stays", lifetime="detached"))
attempt("placement_group", group)
attempt("variables", task(runtime_env={"env_vars": {
    "LD_PRELOAD": "/nonexistent/evil.so", "PYTHONPATH": "/tmp", "RAYSANDBOX_X": "1",
    "RAY_AUTH_MODE": "disabled", "RAYSANDBOX_PROFILE_PATH": "/tmp"}}))
# As ray.init would; a task's own are not uploaded by Ray.
WORKING = pathlib.Path(WORKING)
uploaded = packaging.get_uri_for_package(WORKING)
packaging.upload_package_to_gcs(uploaded, WORKING.read_bytes())
attempt("working_dir", task(runtime_env={"working_dir": uploaded}))
attempt("py_modules", task(runtime_env={"py_modules": [uploaded]}))
attempt("py_executable", task(runtime_env={"py_executable": sys.executable + " -u"}))
attempt("nested", task(runtime_env={"env_vars": {"A": "1"},
    "config": {"setup_timeout_seconds": 30}, "py_executable": "bash -c true"}))
attempt("image_uri", task(runtime_env={"image_uri": "x"}))
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def working_dir(home: Home, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A job's directory whose modules call home when they are imported."""
    archive = tmp_path_factory.mktemp("working") / "working.zip"
    call = (CALL + SAFE).format(port=home.port)
    hook = "def hook():\n    import os\n    os.environ['HOOKED'] = str(os.getpid())\n"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("sitecustomize", "usercustomize", "msgpack", "raysandbox", "evil"):
            info = zipfile.ZipInfo(f"{name}.py")
            info.external_attr = 0o644 << 16
            file.writestr(info, f"{call}{hook}safe_call({name!r})\n")
    return str(archive)


@pytest.fixture(scope="module")
def attempts(node: Node, home: Home, working_dir: str) -> dict[str, object]:
    """What became of each way to opt out."""
    call = (CALL + SAFE).format(port=home.port)
    out = node.drive(f"WORKING = {working_dir!r}\n{call}{OPT_OUT}")
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


RUNS = ["untagged", "argument", "tagged", "actor", "detached", "placement_group",
        "variables", "working_dir", "py_modules"]  # fmt: skip
REFUSED = {"py_executable": "py_executable", "nested": "py_executable"}


@pytest.mark.parametrize("name", RUNS)
def test_what_runs_runs_in_a_jail(attempts, name):
    """Pid 1 of its own, and no way to what the worker has."""
    assert isinstance(attempts[name], list), attempts[name]
    pid, secrets, _, _, ours = attempts[name]
    assert pid == 1
    assert not secrets
    assert not ours


def test_no_code_of_a_client_ran_in_a_worker(attempts, home):
    """The control was heard, and nothing else."""
    assert set(home.heard) == {"control"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_other_interpreters_are_refused_by_name(attempts, name):
    """The error names the runtime_env's key and says what is possible instead."""
    said = str(attempts[name])
    assert REFUSED[name] in said
    assert "runtime_env.py_executable" in said


def test_a_container_around_the_worker_does_not_run(attempts):
    """Whatever the agent makes of it."""
    assert isinstance(attempts["image_uri"], str), attempts["image_uri"]


HOOK = """
def hook():
    import os
    os.environ["HOOKED"] = str(os.getpid())
    safe_call("hook")
options["runtime_env"] = {"worker_process_setup_hook": HOW}
"""
HOOKED = """
def look():
    import evil
    return [os.getpid(), os.environ.get("HOOKED"), evil.__name__]
print(ray.get(ray.remote(look).remote(), timeout=60))
"""


@pytest.mark.parametrize("how", ["hook", "'evil.hook'"])
def test_a_jobs_own_hook_runs_in_the_jail(node, home, working_dir, how):
    """It has its effect there, and only there; a function, or a module's."""
    call = (CALL + SAFE).format(port=home.port)
    first = HOOK.replace("HOW", f"{how}, 'working_dir': {working_dir!r}")
    out = node.drive(HOOKED, call + first)
    expected = "[1, '1', 'evil']"
    assert out.splitlines()[-1] == expected
    assert set(home.heard) <= {"control"}


def test_loader_variables_reach_the_jail_alone(attempts, node):
    """The task sees them; no worker process was started with one."""
    assert attempts["variables"][3] is True
    for pid, command in node.processes().items():
        if "ray::" in command or "default_worker" in command:
            assert b"\0LD_PRELOAD=" not in Path(f"/proc/{pid}/environ").read_bytes()


SECRETS = """
import json
def hunt():
    needle = ("fedcba9876543210" * 4)[::-1].encode()
    skipped = ("/usr", "/proc", "/sys", "/dev")
    found = []
    for at, directories, files in os.walk("/", followlinks=False):
        directories[:] = [d for d in directories if "site-packages" not in d
                          and os.path.join(at, d) not in skipped]
        for name in files:
            try:
                with open(os.path.join(at, name), "rb") as file:
                    if needle in file.read(1 << 20):
                        found.append(os.path.join(at, name))
            except OSError:
                pass
    for pid in filter(str.isdigit, os.listdir("/proc")):
        for name in ("environ", "cmdline"):
            try:
                with open(f"/proc/{pid}/{name}", "rb") as file:
                    if needle in file.read():
                        found.append(f"{pid}/{name}")
            except OSError:
                pass
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", 0) as memory:
        for line in maps:
            span, rights = line.split()[:2]
            if rights[0] != "r" or "[v" in line:
                continue
            low, high = (int(part, 16) for part in span.split("-"))
            try:
                memory.seek(low)
                chunk = memory.read(min(high - low, 256 << 20))
            except (OSError, ValueError, OverflowError):
                continue
            index = chunk.find(needle)
            while index >= 0:
                # Our own needle is there once or twice, made at run time.
                found.append(f"memory {line.split()[-1]}")
                index = chunk.find(needle, index + 1)
    return found, sorted(os.environ), [os.readlink(f"/proc/self/fd/{n}")
        for n in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{n}")]

print(json.dumps(ray.get(ray.remote(hunt).options(
    resources={"sandbox:standard": 1}).remote(), timeout=90)))
"""


def test_no_secret_in_a_jail(node):
    """Not by path, environment, /proc, descriptor or memory."""
    found, names, links = json.loads(node.drive(SECRETS).splitlines()[-1])
    assert not [place for place in found if not place.startswith("memory")]
    # The needle and its copy in a read buffer: all in the task's own heap.
    assert len(found) <= 4, found
    assert not [n for n in names if n.startswith(("RAY_AUTH", "RAY_TLS"))]
    assert not [link for link in links if "secret" in link or "token" in link]


def test_spilled_objects_come_back(node):
    """Workers that spill have a directory, and share it."""
    out = node.drive(
        """
        import numpy
        refs = [ray.put(numpy.full(8_000_000, i)) for i in range(5)]  # 320 MB of 200
        print([int(ray.get(ref, timeout=60)[5]) for ref in refs])
        """
    )
    assert out.split("\n")[-2] == "[0, 1, 2, 3, 4]"
    spilled = list(node.session.glob("ray_spilled_objects_*"))
    assert spilled
    assert all(os.stat(path).st_uid > 65535 for path in spilled)


def test_other_languages_are_refused_and_raylet_lives(node):
    """A task in C++ or Java starts no worker, and does not end raylet."""
    raylet = node.raylet
    node.drive(
        """
        from ray import cross_language
        ref = cross_language.cpp_function("f").remote()
        from pathlib import Path
        node = ray._private.worker._global_node
        err = Path(node.get_logs_dir_path(), "raylet.err")
        until = time.monotonic() + 60
        while "in this language" not in err.read_text() and time.monotonic() < until:
            ray.wait([ref], timeout=0.5)
        """,
        "options['job_config'] = ray.job_config.JobConfig(code_search_path=['/tmp'])",
    )
    assert node.raylet == raylet
    said = (node.session / "logs" / "raylet.err").read_text()
    assert "the node's policy has no workers in this language" in said


BUSY = """
def stay():
    time.sleep(300)
refs = [ray.remote(stay).remote() for _ in range(2)]
time.sleep(300)
"""


@contextlib.contextmanager
def _busy(node: Node) -> Iterator[tuple[subprocess.Popen[bytes], list[int]]]:
    """A driver with two workers in the middle of a task; those, too."""
    before = set(_workers(node))
    code = f"import os, sys, time, ray\nray.init(address={node.address!r})\n{BUSY}"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=node.environment,
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        _wait("busy workers", lambda: len(set(_workers(node)) - before) == 2, 60)
        yield process, sorted(set(_workers(node)) - before)
    finally:
        process.kill()
        process.wait()


def _workers(node: Node) -> list[int]:
    return [
        pid
        for pid, command in node.processes().items()
        if command.startswith("ray::") and "IDLE" not in command
    ]


def _groups_of(pids: list[int]) -> list[Path]:
    return [
        path
        for pid in pids
        for path in Path("/sys/fs/cgroup").rglob(f"raysandbox-*-{pid}-*-w*")
    ]


def _jails_in(workers: list[int]) -> set[int]:
    """Processes in the groups of workers besides themselves."""
    return {
        int(pid)
        for path in _groups_of(workers)
        for procs in path.rglob("cgroup.procs")
        for pid in procs.read_text().split()
    } - set(workers)


def test_killed_driver_and_worker_leave_nothing(node):
    """Their jails and groups go, raylet stays and serves the next."""
    raylet = node.raylet
    with _busy(node) as (driver, workers):
        _wait("jails", lambda: _jails_in(workers))
        os.kill(workers[0], signal.SIGKILL)
        _wait("the killed worker's group is gone", lambda: not _groups_of(workers[:1]))
        driver.kill()
        _wait("the driver's worker is gone", lambda: not _groups_of(workers[1:]))
    assert node.raylet == raylet
    assert "7" in node.drive(
        "print(ray.get(ray.remote(lambda: 7).remote(), timeout=40))"
    )


@pytest.mark.timeout(200)
def test_killed_raylet_leaves_nothing():
    """Workers, jails, groups, and the node's own group."""
    node = Node()
    try:
        with _busy(node) as (_, workers):
            raylet, starter = node.raylet, node.process.pid
            _wait("jails", lambda: _jails_in(workers))
            everybody = _jails_in(workers) | set(workers)
            os.kill(raylet, signal.SIGKILL)
            _wait(
                "workers and jails are gone",
                lambda: not any(os.path.exists(f"/proc/{pid}") for pid in everybody),
            )
            _wait("groups are gone", lambda: not node.groups(raylet))
            pattern = f"raysandbox-node-{starter}-*"
            _wait(
                "the node's group is gone",
                lambda: not list(Path("/sys/fs/cgroup").rglob(pattern)),
            )
    finally:
        node.close()


def test_a_plain_ray_start_is_walled_by_the_variable():
    """RAYSANDBOX=1 and the line in the installed wheel's .pth, before Ray's own."""
    node = Node(PLAIN, RAYSANDBOX="1")
    try:
        out = node.drive(
            """
            print(ray.cluster_resources().get("sandbox:strict"))
            print(ray.get(ray.remote(lambda: os.getpid()).remote(), timeout=40))
            """
        )
        assert out.split("\n")[-3:-1] == ["3.0", "1"]
    finally:
        node.close()


def _refusal(
    *arguments: str,
    policy: Path | None,
    python: str = sys.executable,
    modules: str = str(ROOT),
) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY")}
    environment["PYTHONPATH"] = modules
    if policy is not None:
        environment["RAYSANDBOX_POLICY"] = str(policy)
    done = subprocess.run(
        [python, "-m", "raysandbox", "start", "--head", *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode != 0
    return done.stderr


def test_start_refuses_without_a_policy_that_only_its_owner_can_write(node):
    """Missing, or writable by others: nothing is started."""
    assert "there is no policy" in _refusal(policy=Path("/nonexistent/policy.toml"))
    loose = node.site / "loose.toml"
    loose.write_text("")
    loose.chmod(0o666)
    assert "group or others" in _refusal(policy=loose)


def test_start_refuses_a_python_that_workers_can_t_start(node):
    """Named, with the remedy: raylet would start one worker after the other."""
    with tempfile.TemporaryDirectory(prefix="rsn-", dir=Path.home()) as home:
        venv = [sys.executable, "-m", "venv", "--without-pip", f"{home}/python"]
        subprocess.run(venv, check=True)
        os.chmod(f"{home}/python", 0o700)
        modules = ":".join([str(ROOT), *(p for p in sys.path if "site-packages" in p)])
        said = _refusal(
            f"--temp-dir={home}/r",
            f"--port={free_port()}",
            policy=node.site / "policy.toml",
            python=f"{home}/python/bin/python",
            modules=modules,
        )
    assert f"the worker's Python, {home}/python/bin/python" in said, said
    assert f"{home}/python is its owner's alone" in said
    assert "chmod o+rx" in said

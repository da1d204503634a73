"""A node on real Ray: nothing that a client says takes a worker out of its wall.

Code that runs in a worker process gives itself away by calling home: a worker
is on the host's network, a jail has none. Once on a node of root's and once on
one of an ordinary user's; by a driver, and from inside a worker that is its own
boundary.
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
from typing import Any

import pytest

from tests.attacks.conftest import USER
from tests.node.home import CALL, SAFE, Home
from tests.node.nodes import PLAIN, ROOT, Node, free_port, policy

pytestmark = [pytest.mark.ray, pytest.mark.root]

POLICY = policy("\n[worker]\npids = 512\n", strict=4, standard=4, trusted=3)
# What workers import when they start, if there is such a module.
PRELOADED = "preloaded"


@pytest.fixture(scope="module", params=["root", "user"])
def node(request: pytest.FixtureRequest) -> Iterator[Node]:
    """A node of root's, then one of an ordinary user's with delegated groups."""
    uid = USER if request.param == "user" else 0
    with Node(policy=POLICY, uid=uid, RAY_preload_python_modules=PRELOADED) as made:
        yield made


of_root = pytest.mark.parametrize("node", ["root"], indirect=True)


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
from ray.runtime_env import RuntimeEnv

class Evil:
    def __reduce__(self):
        return (safe_call, ("argument",))

def opt_out(uploaded, where):
    found, started, kept = {}, {}, []

    def look():
        safe_call("task")
        return [os.getpid(), os.path.exists("/run/raysandbox"),
                os.environ.get("HOOKED"), "LD_PRELOAD" in os.environ,
                "RAYSANDBOX_X" in os.environ, "preloaded" in sys.modules]

    class Looker:
        def __init__(self):
            safe_call("constructor")
        def look(self):
            return look()

    def attempt(name, start):
        try:
            started[name] = start()
        except BaseException as error:
            found[name] = f"{type(error).__name__}: {error}"[:900]

    def environment(**options):
        # A hostile driver doesn't check its own.
        return {"runtime_env": RuntimeEnv(**options, _validate=False)}

    def task(what, **options):
        attempt(what, lambda: ray.remote(look).options(**options).remote())

    def actor(what, **options):
        def start():
            kept.append(ray.remote(Looker).options(**options).remote())
            return kept[-1].look.remote()
        attempt(what, start)

    def group():
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
        group = ray.util.placement_group([{"CPU": 1}])
        ray.get(group.ready(), timeout=45)
        task("placement_group",
             scheduling_strategy=PlacementGroupSchedulingStrategy(group))
        return group

    def argument():
        return ray.remote(lambda _: look()).remote(Evil())

    def jailed():
        free = {"runtime_env": {"py_executable": "bash"}}
        return ray.remote(look).options(**free).remote()

    def function():
        evil = Evil()
        return ray.remote(lambda: (evil, look())[1]).remote()

    def collect():
        for name, reference in list(started.items()):
            try:
                found[name] = ray.get(reference, timeout=90)
            except BaseException as error:
                found[name] = f"{type(error).__name__}: {error}"[:900]
        started.clear()

    task("untagged")
    actor("actor")
    if where == "driver":
        attempt("argument", argument)
        attempt("function", function)
        attempt("from a jail", lambda: ray.remote(jailed).remote())
        task("tagged", resources={"sandbox:standard": 1})
        actor("detached", name="stays", lifetime="detached")
        made = group()
        collect()
        ray.util.remove_placement_group(made)
        task("working_dir", **environment(working_dir=uploaded))
        task("py_modules", **environment(py_modules=[uploaded]))
    task("variables", **environment(env_vars={
        "LD_PRELOAD": "/nonexistent/evil.so", "PYTHONPATH": "/tmp",
        "RAYSANDBOX_X": "1", "RAY_AUTH_MODE": "disabled",
        "RAYSANDBOX_PROFILE_PATH": "/tmp"}))
    task("hook", **environment(working_dir=uploaded,
         worker_process_setup_hook="evil.hook",
         env_vars={"__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR": "evil.hook"}))
    collect()
    for each in kept:
        ray.kill(each)
    python = sys.executable + " -u"
    for name, options in {
        "py_executable": {"py_executable": python},
        "config": {"py_executable": "bash -c true", "env_vars": {"A": "1"},
                   "config": {"setup_timeout_seconds": 30}},
        "image_uri": {"image_uri": "x"},
        "container": {"container": {"image": "x", "run_options": ["-v /:/host"]}},
        "nsight": {"nsight": "default"},
        "rocprof_sys": {"rocprof_sys": {"args": {"-o": "/tmp/x"}}},
        "conda": {"conda": "base"},
        "conda specification": {"conda": {"dependencies": ["pip"]}},
        "pip": {"pip": {"packages": ["evil"], "pip_check": False}},
        "uv": {"uv": {"packages": ["evil"]}},
        "java_jars": {"java_jars": [uploaded]},
        "unknown": {"mpi": {"args": []}},
    }.items():
        task(name, **environment(**options))
    collect()
    return found

safe_call("control")
# As ray.init would; a task's own are not uploaded by Ray.
WORKING = pathlib.Path(WORKING)
uploaded = packaging.get_uri_for_package(WORKING)
packaging.upload_package_to_gcs(uploaded, WORKING.read_bytes())
inside = ray.remote(max_retries=0, num_cpus=0, resources={"sandbox:trusted": 1})(
    lambda: (os.getpid(), opt_out(uploaded, "inside")))
found = {"driver": opt_out(uploaded, "driver")}
pid, found["inside"] = ray.get(inside.remote(), timeout=150)
assert pid > 10, pid
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def working_dir(node: Node, home: Home) -> str:
    """A job's directory whose modules call home when they are imported."""
    archive = node.site / "working.zip"
    call = (CALL + SAFE).format(port=home.port)
    hook = "def hook():\n    import os\n    os.environ['HOOKED'] = str(os.getpid())\n"
    names = ("sitecustomize", "usercustomize", "msgpack", "raysandbox", "evil")
    with zipfile.ZipFile(archive, "w") as file:
        for name in (*names, PRELOADED):
            info = zipfile.ZipInfo(f"{name}.py")
            info.external_attr = 0o644 << 16
            file.writestr(info, f"{call}{hook}safe_call({name!r})\n")
    return str(archive)


@pytest.fixture(scope="module")
def attempts(node: Node, home: Home, working_dir: str) -> dict[str, Any]:
    """What became of each way to opt out, by who tried."""
    home.heard.clear()
    call = (CALL + SAFE).format(port=home.port)
    out = node.drive(f"WORKING = {working_dir!r}\n{call}{OPT_OUT}", limit_s=240)
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


NESTED = ["untagged", "actor", "variables", "hook"]
RUNS = [
    *[("inside", name) for name in NESTED],
    *[("driver", name) for name in NESTED],
    *[("driver", name) for name in ("argument", "function", "tagged", "detached",
                                    "placement_group", "working_dir", "py_modules")],
]  # fmt: skip
#: Attempt to the runtime_env's key that is refused, and the policy's.
REFUSED = {
    "py_executable": ("py_executable", "py_executable = [PATH]"),
    "config": ("py_executable", "py_executable = [PATH]"),
    "image_uri": ("image_uri", "image_uri = {URI = DIRECTORY}"),
    "container": ("container", 'container = "image_uri"'),
    "nsight": ("_nsight", "nsight = PATH"),
    "rocprof_sys": ("_rocprof_sys", "rocprof_sys = PATH"),
    "conda": ("conda", "conda = {NAME = PREFIX}"),
    "conda specification": ("conda", "conda"),
    "pip": ("pip", 'pip = "allow"'),
    "uv": ("uv", 'uv = "allow"'),
    "java_jars": ("java_jars", "java_jars"),
    "unknown": ("mpi", 'other = "allow"'),
}
by_whom = pytest.mark.parametrize("who", ["driver", "inside"])


@pytest.mark.parametrize(("who", "name"), RUNS)
def test_what_runs_runs_in_a_jail(attempts, who, name):
    """Pid 1 of its own, and no way to what the worker has."""
    found = attempts[who][name]
    assert isinstance(found, list), found
    pid, secrets, _, _, ours, _ = found
    assert pid == 1
    assert not secrets
    assert not ours


def test_no_code_of_a_client_ran_in_a_worker(attempts, home):
    """The control was heard, and nothing else."""
    assert set(home.heard) == {"control"}


@by_whom
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_replaces_or_wraps_the_worker_is_refused_by_name(attempts, who, name):
    """The error names the runtime_env's key and says what is possible instead."""
    said = str(attempts[who][name])
    key, ours = REFUSED[name]
    assert f"runtime_env key {key!r}: refused by this node's policy" in said
    assert f"runtime_env.{ours}" in said


def test_a_jail_starts_no_task(attempts):
    """It has no connection to the cluster, whatever it asks for."""
    said = attempts["driver"]["from a jail"]
    assert "remote() is not available in a jail" in said


@by_whom
def test_what_workers_preload_is_imported_in_the_jail(attempts, who, home):
    """Where the job has such a module, and never in the worker itself."""
    assert attempts[who]["hook"][5] is True
    assert attempts[who]["untagged"][5] is False
    assert PRELOADED not in home.heard


@by_whom
def test_a_setup_hook_s_variable_has_its_effect_in_the_jail(attempts, who):
    """Of a task's own runtime_env, where Ray takes no function."""
    assert attempts[who]["hook"][2] == "1"


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
    assert [found["variables"][3] for found in attempts.values()] == [True, True]
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


@of_root
def test_no_secret_in_a_jail(node):
    """Not by path, environment, /proc, descriptor or memory."""
    found, names, links = json.loads(node.drive(SECRETS).splitlines()[-1])
    assert not [place for place in found if not place.startswith("memory")]
    # The needle and its copy in a read buffer: all in the task's own heap.
    assert len(found) <= 4, found
    assert not [n for n in names if n.startswith(("RAY_AUTH", "RAY_TLS"))]
    assert not [link for link in links if "secret" in link or "token" in link]


@of_root
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


@of_root
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


@of_root
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


@of_root
def test_start_refuses_without_a_policy_that_only_its_owner_can_write(node):
    """Missing, or writable by others: nothing is started."""
    assert "there is no policy" in _refusal(policy=Path("/nonexistent/policy.toml"))
    loose = node.site / "loose.toml"
    loose.write_text("")
    loose.chmod(0o666)
    assert "group or others" in _refusal(policy=loose)


@of_root
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

"""What stands in the place of a worker's interpreter, or around it, by the policy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.node import rootfs
from tests.node.nodes import Node

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(300)]

URI = "docker.example/team/tools:1"
POLICY = """
[offer]
strict = 3
standard = 3
trusted = 3

[[rules]]
name = "everybody"
profiles = ["standard", "trusted"]

[ceilings]
boundary = "worker"

[totals]
cpu = "100%"
memory = "80%"
pids = "90%"

[object_store]
max_task = "20MiB"

[runtime_env]
why = "They are ours."
image_uri = {"URI" = {root = "SITE/root", python = "PYTHON"}}
container = "image_uri"
nsight = {program = "SITE/profiled", read = ["SITE/tools"], write = ["SITE/reports"]}
rocprof_sys = {program = "SITE/rocm", read = ["SITE/tools"], write = ["SITE/reports"]}
"""
# As nsys does, it starts Python, waits for it, and writes what it saw.
PROFILED = """#!/bin/sh
. SITE/tools/settings
"PYTHON" "$@"
status=$?
echo "$$ $WORD $status" > SITE/reports/$$
exit $status
"""


@pytest.fixture(scope="module")
def site() -> Iterator[Path]:
    """The operator's directory, which others may not even look at."""
    made = Path(tempfile.mkdtemp(prefix="rsn-", dir="/srv"))
    try:
        made.chmod(0o711)
        rootfs.make(made / "root", "of the image")
        (made / "tools").mkdir()
        (made / "tools" / "settings").write_text("WORD=seen\n")
        (made / "reports").mkdir()
        (made / "reports").chmod(0o1777)
        yield made
    finally:
        shutil.rmtree(made)


@pytest.fixture(scope="module")
def node(site: Path) -> Iterator[Node]:
    words = {"SITE": str(site), "PYTHON": rootfs.PYTHON, "URI": URI}
    policy = POLICY
    for name, word in words.items():
        policy = policy.replace(name, word)
    script = PROFILED.replace("SITE", str(site)).replace("PYTHON", sys.executable)
    for name in ("profiled", "rocm"):
        (site / name).write_text(script.replace("$WORD", f"{name}.$WORD"))
        (site / name).chmod(0o755)
    made = Node(policy=policy)
    yield made
    made.close()


LOOK = f"""
import json
from raysandbox import tag

IMAGE = {{"image_uri": {URI!r}}}

def read(path):
    try:
        with open(path) as file:
            return file.read()
    except OSError as error:
        return type(error).__name__

def write(path):
    try:
        open(path, "w").close()
    except OSError as error:
        return error.errno
    return 0

def look():
    import sys
    try:
        import only_there
    except ImportError:
        return None
    return {{
        "words": only_there.WORDS,
        "data": read("/srv/data/words"),
        "python": sys.executable,
        "programs": sorted(os.listdir("/usr/bin")),
        "types": read("/etc/mime.types"),
        "host": read("/srv/host/shadow") + read("/srv/host/hostname"),
        "pid": os.getpid(),
        "write": [write("/srv/data/words"), write("/opt/py/x"), write("/tmp/x")],
    }}
"""


def ask(node: Node, code: str, **variables: str) -> Any:
    """Return what the last line of a driver says."""
    return json.loads(node.drive(LOOK + code, **variables).splitlines()[-1])


def test_a_worker_and_its_jails_see_the_image(node):
    """Python, modules and files are the image's, none of it can be changed."""
    seen, actor, none = ask(
        node,
        """
task = ray.remote(resources=tag("standard"))(look)

@ray.remote(resources=tag("standard"), runtime_env=IMAGE)
class There:
    def look(self):
        return look()

there = There.remote()
found = [task.options(runtime_env=IMAGE).remote(), there.look.remote(), task.remote()]
print(json.dumps([ray.get(each, timeout=90) for each in found]))
""",
    )
    assert none is None  # for who did not ask for it
    events = (node.session / "logs" / "raysandbox_events.jsonl").read_text()
    (started,) = map(json.loads, events.splitlines())
    assert f"image_uri:{URI}" in started["interpreters"]
    for each in (seen, actor):
        assert each["words"] == each["data"] == "of the image"
        assert each["python"].startswith("/opt/py/bin/python3")
        assert each["programs"] == ["sh"]
        assert each["pid"] < 10
        assert all(number != 0 for number in each["write"][:2])
        assert each["write"][2] == 0


def test_a_job_s_image_is_that_of_all_its_tasks(node):
    """Of ``ray.init``: in jails and in workers, actors and what a task starts, too."""
    driver = """
inside = tag("trusted")

@ray.remote(resources=tag("standard"))
class There:
    def look(self):
        return look()

def nested():
    task = ray.remote(resources=tag("strict"), num_cpus=0)(look)
    return look(), ray.get(task.remote(), timeout=60)

there = There.remote()
found = [ray.remote(resources=tag("strict"))(look).remote(), there.look.remote(),
         ray.remote(resources=inside)(look).remote()]
found = [ray.get(each, timeout=90) for each in found]
found += ray.get(ray.remote(resources=inside)(nested).remote(), timeout=90)
print(json.dumps(found))
"""
    options = f"options['runtime_env'] = {{'image_uri': {URI!r}}}"
    jailed, actor, inside, outer, inner = json.loads(
        node.drive(LOOK + driver, options).splitlines()[-1]
    )
    for each in (jailed, actor, inside, outer, inner):
        assert each["words"] == each["data"] == "of the image"
        assert each["python"].startswith("/opt/py/bin/python3")
        assert each["programs"] == ["sh"]
        assert all(number != 0 for number in each["write"][:2])
    assert all(each["pid"] < 10 for each in (jailed, actor, inner))
    assert all(each["pid"] > 10 for each in (inside, outer))


def test_links_of_an_image_lead_nowhere_outside(node):
    """Not where they would with the host's root."""
    assert os.path.exists("/etc/passwd")
    seen = ask(
        node,
        """
task = ray.remote(resources=tag("standard"), runtime_env=IMAGE)(look)
print(json.dumps(ray.get(task.remote(), timeout=90)))
""",
    )
    assert seen["types"] == "FileNotFoundError"
    # /srv/host is /etc: in there, what every jail has.
    assert seen["host"] == "FileNotFoundErrorjail\n"
    assert "root:" not in json.dumps(seen)


def test_a_task_in_the_worker_itself_sees_it(node):
    """With boundary = "worker", too."""
    seen = ask(
        node,
        """
task = ray.remote(resources=tag("trusted"), runtime_env=IMAGE)(look)
print(json.dumps(ray.get(task.remote(), timeout=90)))
""",
        RAYSANDBOX="1",
    )
    assert seen["words"] == seen["data"] == "of the image"
    assert seen["programs"] == ["sh"]
    assert all(number != 0 for number in seen["write"][:2])


def test_an_image_by_the_old_key_and_no_other(node):
    """Each refusal says what would be allowed."""
    words, *refused = ask(
        node,
        """
import ray.runtime_env
task = ray.remote(resources=tag("standard"))(look)

def attempt(**environment):
    try:
        return ray.get(task.options(runtime_env=environment).remote(), timeout=60)
    except Exception as error:
        return str(error)

old = {"image": IMAGE["image_uri"]}
print(json.dumps([
    attempt(container=old)["words"],
    attempt(container={**old, "run_options": ["-v /:/host"]}),
    attempt(image_uri="docker.example/other"),
    attempt(nsight={"o": "/tmp/x"}),
    attempt(rocprof_sys={"args": {"-o": "/tmp/x"}}),
]))
""",
    )
    assert words == "of the image"
    for text, says in zip(
        refused,
        (
            "runtime_env.container allows {image = URI} alone",
            f"runtime_env.image_uri allows {URI} alone",
            'runtime_env.nsight allows "default" alone',
            'runtime_env.rocprof_sys allows "default" alone',
        ),
        strict=True,
    ):
        assert says in text


@pytest.mark.parametrize(
    ("key", "program"), [("nsight", "profiled"), ("rocprof_sys", "rocm")]
)
def test_a_profiler_of_the_operator_s_starts_the_worker(node, site, key, program):
    """It sees what it needs, and writes its report when the worker has ended."""
    reports = site / "reports"
    before = {*reports.iterdir()}  # of the look before the node's start
    pids = ask(
        node,
        f"""
@ray.remote(resources=tag("standard"), runtime_env={{{key!r}: "default"}})
class Profiled:
    def look(self):
        return os.getpid(), look()

there = Profiled.remote()
found = ray.get(there.look.remote(), timeout=90)
del there
print(json.dumps(found))
""",
    )
    assert pids[0] < 10
    assert pids[1] is None
    until = time.monotonic() + 60
    while not (written := {*reports.iterdir()} - before):
        assert time.monotonic() < until
        time.sleep(0.2)
    (report,) = written
    pid, word, _ = report.read_text().split()
    assert word == f"{program}.seen"
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < until
        time.sleep(0.2)


CONNECT = """
import subprocess, sys
CHILD = '''
import os, socket, sys
from ray._private.worker import global_worker
with socket.socket(socket.AF_UNIX) as end:
    end.connect(sys.argv[1])
    end.settimeout(5)
    try:
        print(len(end.recv(1)))  # 0: it was closed
    except TimeoutError:
        print("connected")
'''

def child():
    path = ray._private.worker.global_worker.node.raylet_socket_name
    done = subprocess.run(
        [sys.executable, "-c", CHILD, path], capture_output=True, text=True
    )
    return done.stdout.strip() or done.stderr
"""


@pytest.mark.parametrize(
    "environment", [{}, {"nsight": "default"}, {"rocprof_sys": "default"}]
)
def test_a_child_of_a_worker_is_none_itself(node, environment):
    """Also where a profiler may start one: that one alone, and not what it starts."""
    answer = ask(
        node,
        CONNECT
        + f"""
task = ray.remote(resources=tag("trusted"), runtime_env={environment!r})(child)
print(json.dumps(ray.get(task.remote(), timeout=90)))
""",
        RAYSANDBOX="1",
    )
    assert answer == "0"
    (log,) = (node.session / "logs").glob("raysandbox_store-*.jsonl")
    assert "not a process that raylet started" in log.read_text()


def test_the_policy_s_limit_of_a_task_holds_inside_too(node):
    """For ``boundary = "worker"``: the lower of profile and policy, with its name."""
    kept, says = ask(
        node,
        """
def fill():
    kept = []
    try:
        for _ in range(5):
            kept.append(ray.put(bytes(6 << 20)))
    except Exception as error:
        return len(kept), str(error)
    return len(kept), ""

task = ray.remote(resources=tag("trusted"))(fill)
print(json.dumps(ray.get(task.remote(), timeout=90)))
""",
        RAYSANDBOX="1",
    )
    assert kept == 3
    assert "object_store.max_task of the node's policy" in says


def test_a_profiled_worker_ends_with_its_raylet(node):
    """Though it is no child of it; the last test of this node."""
    out = node.drive(
        LOOK
        + """
@ray.remote(resources=tag("trusted"), runtime_env={"nsight": "default"})
class Profiled:
    def pids(self):
        return os.getpid(), os.getppid()

there = Profiled.options(lifetime="detached", name="p", namespace="p").remote()
print(json.dumps(ray.get(there.pids.remote(), timeout=90)))
""",
        RAYSANDBOX="1",
    )
    pid, parent = json.loads(out.splitlines()[-1])
    (status,) = Path(f"/proc/{parent}/status").read_text().split("PPid:")[1:]
    assert int(status.split()[0]) == node.raylet
    os.kill(node.raylet, signal.SIGKILL)
    until = time.monotonic() + 5
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < until, "it lives on"
        time.sleep(0.1)

"""The sealed data path: a worker opens nothing that came from a user.

Each payload, when it is unpickled, appends the pid and the command line of the
process that opened it to a file. On stock Ray the worker is among them (the
positive control); here no process of Ray's is.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# A driver of its own for each side: what it prints is what was seen.
DRIVER = '''
import json, os, pickle, sys, time
import ray
from ray import cloudpickle

SIDE, DIRECTORY, *PLACES = sys.argv[1:]
RECORD = os.path.join(DIRECTORY, "record")


class Payload:
    """Unpickling it writes down who did."""

    def __init__(self, where):
        self.where = where

    def __reduce__(self):
        code = (
            "import os;"
            f"where = {self.where!r};"
            "line = open('/proc/self/cmdline','rb').read();"
            "line = line.replace(bytes(1), b' ');"
            "path = os.environ.get('RSX_RECORD', '/scratch/record');"
            "file = open(path, 'ab');"
            "file.write(where.encode() + b' ' + line + chr(10).encode());"
            "file.close()"
        )
        return exec, (code,)


os.environ["RSX_RECORD"] = RECORD
open(RECORD, "w").close()
os.chmod(RECORD, 0o666)
options = dict(
    num_cpus=1,
    include_dashboard=False,
    logging_level="ERROR",
    log_to_driver=False,
    _temp_dir=os.path.join(DIRECTORY, "ray"),
    runtime_env={"env_vars": {"RSX_RECORD": RECORD}},
)
if SIDE == "stock":
    ray.init(**options)
    tag = {}
else:
    import raysandbox

    raysandbox.init(**options)
    tag = raysandbox.tag(SIDE)

me = os.getpid()


def opened():
    """Commands, other than this driver, that opened a payload."""
    return [
        line.split(" ", 1)[1].strip()
        for line in open(RECORD).read().splitlines()
        if "driver.py" not in line
    ]


def attempt(run):
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:4000]}"
    return "no error"


def plain(*_args, **_kwargs):
    return 1


def run_argument():
    ray.get(ray.remote(resources=tag)(plain).remote(Payload("argument")))


def run_keyword():
    ray.get(ray.remote(resources=tag)(plain).remote(value=Payload("keyword")))


def run_reference():
    ref = ray.put(Payload("reference"))
    ray.get(ray.remote(resources=tag)(plain).remote(ref))


class Closure:
    def __init__(self):
        self.payload = Payload("function")

    def __call__(self):
        return 1


def run_function():
    held = Payload("function")

    def uses():
        return held is None

    ray.get(ray.remote(resources=tag)(uses).remote())


def run_class():
    held = Payload("class")

    class Actor:
        def ping(self):
            return held is None

    ray.get(ray.remote(resources=tag)(Actor).remote().ping.remote())


def run_method_argument():
    class Actor:
        def ping(self, value):
            return 1

    ray.get(ray.remote(resources=tag)(Actor).remote().ping.remote(Payload("method")))


def run_table():
    """The function table's entry itself, outer dict and all."""
    from ray._private.ray_constants import KV_NAMESPACE_FUNCTION_TABLE as SPACE
    from ray.experimental import internal_kv

    task = ray.remote(resources=tag, max_calls=1)(plain)
    ray.get(task.remote())
    for key in internal_kv._internal_kv_list(b"RemoteFunction:", namespace=SPACE):
        entry = cloudpickle.dumps(Payload("table"))
        internal_kv._internal_kv_put(key, entry, overwrite=True, namespace=SPACE)
    ray.get(task.remote(), timeout=15)


def run_retry_list():
    """The pickled list of exception types that a task retries on."""
    raylet = sys.modules["ray._raylet"]
    shim = type(sys)("shim")
    shim.__dict__.update(raylet.ray_pickle.__dict__)
    shim.original = raylet.ray_pickle
    shim.dumps = lambda *_args, **_kwargs: cloudpickle.dumps(Payload("retry"))
    raylet.ray_pickle = shim

    def fail():
        raise ValueError("x")

    task = ray.remote(resources=tag, max_retries=1, retry_exceptions=[ValueError])
    try:
        ray.get(task(fail).remote())
    finally:
        raylet.ray_pickle = shim.original


def run_result():
    class Lazy:
        def __reduce__(self):
            return Payload("result").__reduce__()

    def give():
        return Lazy()

    ray.get(ray.remote(resources=tag)(plain).remote(ray.remote(resources=tag)(give).remote()))


def run_exception():
    class Lazy(Exception):
        def __reduce__(self):
            return Payload("exception").__reduce__()

    def fail():
        raise Lazy("x")

    ray.get(ray.remote(resources=tag)(plain).remote(ray.remote(resources=tag)(fail).remote()))


found = {}
for place in PLACES:
    open(RECORD, "w").close()
    error = attempt(globals()["run_" + place])
    driver = [l for l in open(RECORD).read().splitlines() if "driver.py" in l]
    found[place] = {"opened": opened(), "error": error, "driver": len(driver)}
open(os.path.join(DIRECTORY, 'found'), 'w').write(json.dumps(found))
ray.shutdown()
'''

PLACES = [
    "argument",
    "keyword",
    "reference",
    "function",
    "class",
    "method_argument",
    "retry_list",
    "result",
    "exception",
    "table",  # last: it breaks every function of the job
]
# These the task needs, so its jail opens them.
IN_THE_JAIL = {"argument", "keyword", "reference", "function", "class"}


def run(side: str) -> dict[str, dict]:
    """Try all places on one side; say for each who opened the payload."""
    # Short: the names of Ray's sockets have to fit in 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rsx-", dir="/tmp"))
    try:
        script = directory / "driver.py"
        script.write_text(textwrap.dedent(DRIVER))
        directory.chmod(0o755)
        done = subprocess.run(
            [sys.executable, str(script), side, str(directory), *PLACES],
            capture_output=True,
            text=True,
            timeout=240,
            env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((directory / "found").read_text())
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def both() -> dict[str, dict[str, dict]]:
    """What happened on stock Ray, and beside it in the sandbox, under ``strict``."""
    sides = ("stock", "strict")
    with ThreadPoolExecutor(len(sides)) as pool:
        return dict(zip(sides, pool.map(run, sides)))


@pytest.fixture
def stock(both: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """What happened on stock Ray."""
    return both["stock"]


@pytest.fixture
def ours(both: dict[str, dict[str, dict]]) -> dict[str, dict]:
    """What happened in the sandbox."""
    return both["strict"]


@pytest.mark.parametrize("place", PLACES)
def test_payload_is_never_opened_in_a_worker(place, stock, ours):
    """A pickle of a user's runs in the worker on stock Ray, and nowhere in ours."""
    in_worker = [line for line in stock[place]["opened"] if line.startswith("ray::")]
    assert in_worker, f"the control proves nothing: {stock[place]}"
    assert ours[place]["opened"] == [], ours[place]
    if place in IN_THE_JAIL:
        # It ran where there is no such file.
        assert "/record" in ours[place]["error"]


@pytest.mark.parametrize("place", ["result", "exception"])
def test_data_results_reach_nobody(place, ours):
    """With ``results = "data"`` what a task pickled reaches no driver either."""
    assert ours[place]["driver"] == 0

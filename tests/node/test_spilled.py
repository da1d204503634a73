"""What a job has spilled counts until Ray has deleted it, as what the store has."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from raysandbox.node import spilling, store_proxy
from tests.attacks.conftest import USER
from tests.node.nodes import Node, policy

pytestmark = [pytest.mark.ray, pytest.mark.root, pytest.mark.timeout(300)]

# A quota of 20 blocks and a bit, and a store of 15.
SIZE, FIT, STORE = 12 << 20, 20, 190_000_000
MORE = """
[ceilings]
boundary = "worker"

[object_store]
max_job = "244MiB"
"""
POLICY = policy(MORE, strict=3, standard=4, trusted=4)
# Puts of a worker whose code has Ray's sockets, and results of tasks in jails.
STORES = {
    "trusted": f"""
class Hoarder:
    def __init__(self):
        self.kept = []

    def fill(self, most):
        try:
            while len(self.kept) < most:
                self.kept.append(ray.put(bytes({SIZE})))
        except Exception as error:
            return len(self.kept), type(error).__name__
        return len(self.kept), ""

    def drop(self, left):
        del self.kept[left:]

hoarder = ray.remote(resources={{"sandbox:trusted": 1}}, num_cpus=0)(Hoarder).remote()
fill = lambda most: ray.get(hoarder.fill.remote(most), timeout=100)
drop = lambda left: ray.get(hoarder.drop.remote(left), timeout=100)
""",
    "standard": f"""
import raysandbox

kept = []

@ray.remote(resources={{"sandbox:standard": 1}}, num_cpus=1, max_retries=0)
def make():
    return bytes({SIZE})

def fill(most):
    while len(kept) < most:
        ref = make.remote()
        try:
            ray.get(ref, timeout=100)
        except raysandbox.TaskQuotaExceeded:
            return len(kept), "TaskQuotaExceeded"
        kept.append(ref)
    return len(kept), ""

def drop(left):
    del kept[left:]
""",
}
REFUSED = {"trusted": "ObjectStoreFullError", "standard": "TaskQuotaExceeded"}


@pytest.fixture(scope="module")
def node() -> Iterator[Node]:
    with Node(policy=POLICY, arguments=[f"--object-store-memory={STORE}"]) as made:
        yield made


@pytest.fixture(scope="module")
def ordinary() -> Iterator[Node]:
    """A node of a user with delegated control groups."""
    arguments = [f"--object-store-memory={STORE}"]
    with Node(policy=POLICY, uid=USER, arguments=arguments) as made:
        yield made


def wait_for(what: str, check: Callable[[], bool]) -> None:
    """Wait until it is so."""
    end = time.monotonic() + 60
    while not check():
        assert time.monotonic() < end, f"not seen in time: {what}"
        time.sleep(0.1)


def drive(node: Node, profile: str, code: str) -> Any:
    """Run a driver that can fill and drop; return what it prints last."""
    said = node.drive("import json, os\n" + STORES[profile] + code)
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("profile", ["trusted", "standard"])
def test_what_is_spilled_still_counts(node, profile):
    """A job's puts and results end at its quota, also where they leave the store.

    Without that a job goes on without end, onto the disk that raylet spills to.
    Another job's quota is its own meanwhile, and what is dropped makes room again,
    however often.
    """
    marker, done = node.site / f"{profile}-full", node.site / f"{profile}-done"
    with ThreadPoolExecutor(1) as pool:
        full = pool.submit(
            drive,
            node,
            profile,
            f"""
found = [fill({2 * FIT})]
open("{marker}", "w").close()
while not os.path.exists("{done}"):
    time.sleep(0.1)
for left in (5, 0, 3):
    drop(left)
    found.append(fill({FIT}))
found.append(fill({2 * FIT}))
print(json.dumps(found))
""",
        )
        try:
            wait_for("a full quota", lambda: marker.exists() or full.done())
            other = drive(node, profile, "print(json.dumps(fill(8)))")
        finally:
            done.touch()
        first, *rounds, last = full.result()
    assert first == [FIT, REFUSED[profile]]
    assert other == [8, ""]
    assert rounds == [[FIT, ""]] * 3
    assert last == [FIT, REFUSED[profile]]


def test_a_job_that_ends_frees_its_count(node):
    """With the job's last objects, in memory or spilled, its count is gone."""
    sockets = str(node.session / "raysandbox" / "sockets")
    before = {each["job"] for each in store_proxy.stats_of(sockets)["jobs"]}
    stats = f"""
from raysandbox.node import store_proxy
job = ray.get_runtime_context().get_job_id()
fill({FIT})
counts = [each for each in store_proxy.stats_of({sockets!r})["jobs"]
          if each["job"] == job]
print(json.dumps([job, [each["objects"] for each in counts]]))
"""
    job, counts = drive(node, "trusted", stats)
    assert job not in before
    assert counts == [FIT]

    def is_gone() -> bool:
        return job not in {
            each["job"] for each in store_proxy.stats_of(sockets)["jobs"]
        }

    wait_for("the end of its count", is_gone)


TOUCH = """
def touch(path):
    found = []
    for function, *arguments in ((os.symlink, "x", path + "/x"), (os.listdir, path)):
        try:
            function(*arguments)
        except OSError as error:
            found.append(error.errno)
    return found

asked = ray.remote(resources={"sandbox:trusted": 1})(touch).remote(PATH)
print(json.dumps(ray.get(asked, timeout=60)))
"""


def test_what_is_spilled_is_written_down_by_nobody_else(node):
    """Code in a worker can't add to it, and can't list it; what spills can."""
    path = spilling.directory(str(node.session))
    found = drive(node, "trusted", TOUCH.replace("PATH", repr(path)))
    assert found == [errno.EROFS, errno.EACCES]


def test_what_an_ordinary_users_node_spills_counts(ordinary):
    """Where all workers have raylet's user as well."""
    code = f"""
found = [fill({2 * FIT})]
drop(0)
print(json.dumps([*found, fill({FIT})]))
"""
    first, again = drive(ordinary, "trusted", code)
    assert first == [FIT, REFUSED["trusted"]]
    assert again == [FIT, ""]

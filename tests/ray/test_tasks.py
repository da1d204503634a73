"""Honest work: what runs on stock Ray gives the same in the sandbox."""

from __future__ import annotations

import os
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import ray

import raysandbox
from tests import wheel
from tests.ray.events import ended

STRICT = raysandbox.tag("strict")
STANDARD = raysandbox.tag("standard")


@ray.remote(resources=STRICT)
def arguments(a, b=2, *rest, c=3, **others):
    return [a, b, list(rest), c, others]


def test_positional_and_keyword_arguments_arrive():
    """Each argument keeps its place and name, whatever kind it is of."""
    got = ray.get(arguments.remote(1, "two", b"three", 4.0, c=None, d=[5], e="e"))
    assert got == [1, "two", [b"three", 4.0], None, {"d": [5], "e": "e"}]


@ray.remote(resources=STRICT)
def echo(value):
    return value


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**70),
        1.5,
        2j,
        "text ü \N{SNOWMAN}",
        "",
        b"",
        b"raw",
        b"x" * 200_000,
        "y" * 200_000,
        "__RAY_DUMMY__",
        b"__RAY_DUMMY__",
        [1, [2, (3,)], {4}],
        {"a": {"b": frozenset({1})}},
        {1: 2, (3, 4): 5},
    ],
    ids=repr,
)
def test_values_survive_the_round_trip(value):
    """Plain data comes back equal and of the same type under ``strict``."""
    shown = repr(value)[:40]
    got = ray.get(echo.remote(value))
    assert got == value, shown
    assert type(got) is type(value)


def test_arrays_and_frames_survive_the_round_trip():
    """numpy, Arrow and pandas cross as data."""
    array = np.arange(300_000, dtype="f4").reshape(3, -1)
    assert np.array_equal(ray.get(echo.remote(array)), array)
    table = pa.table({"n": [1, 2, None], "s": ["a", None, "c"]})
    assert ray.get(echo.remote(table)).equals(table)
    frame = pd.DataFrame({"x": [1.5, 2.5], "y": ["a", "b"]})
    pd.testing.assert_frame_equal(ray.get(echo.remote(frame)), frame)


def test_object_references_are_resolved():
    """References of ``put`` and of other tasks arrive as values."""
    big = np.ones(1 << 20)
    ref = ray.put(big)
    first = echo.remote(ref)
    assert ray.get(echo.remote(first)).sum() == 1 << 20
    assert ray.get(arguments.remote(ref, b=first))[1].sum() == 1 << 20


def test_large_arguments_are_mapped_not_copied():
    """A large array inside the jail is a read-only view of the sealed memory."""

    @ray.remote(resources=STRICT)
    def look(array):
        return bool(array.flags.owndata), bool(array.flags.writeable)

    assert ray.get(look.remote(np.ones(1 << 20))) == (False, False)


@pytest.mark.parametrize("profile", ["strict", "standard", "fast"])
def test_several_returns(profile):
    """``num_returns`` takes the result apart, as stock Ray does."""

    @ray.remote(resources=raysandbox.tag(profile), num_returns=3)
    def three(n):
        return n, [n], {"n": np.full(4, n)}

    one, two, last = ray.get(three.remote(7))
    assert (one, two) == (7, [7])
    assert last["n"].tolist() == [7] * 4


def test_wrong_number_of_returns_is_an_error():
    """Too few values for ``num_returns`` fail; the worker goes on."""

    @ray.remote(resources=STRICT, num_returns=2)
    def one(_):
        return 1

    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(one.remote(0))
    assert ray.get(echo.remote(1)) == 1


@pytest.mark.parametrize("profile", ["strict", "standard"])
def test_builtin_exceptions_keep_their_type(profile):
    """``except KeyError`` and ``except RayTaskError`` both catch it."""

    @ray.remote(resources=raysandbox.tag(profile))
    def fail():
        raise KeyError("gone")

    with pytest.raises(KeyError) as caught:
        ray.get(fail.remote())
    assert isinstance(caught.value, ray.exceptions.RayTaskError)
    assert "gone" in str(caught.value)
    assert "in fail" in str(caught.value)
    assert "raysandbox" not in str(caught.value)


def test_own_exceptions_under_standard_keep_type_and_fields():
    """With pickled results the exception object itself comes back."""

    class OwnError(Exception):
        def __init__(self, code):
            super().__init__(f"code {code}")
            self.code = code

        def __reduce__(self):
            return OwnError, (self.code,)

    @ray.remote(resources=STANDARD)
    def fail():
        raise OwnError(7)

    with pytest.raises(ray.exceptions.RayTaskError) as caught:
        ray.get(fail.remote())
    assert caught.value.cause.code == 7


def test_own_exceptions_under_strict_cross_as_text():
    """No object of the task's: its type is named in the text."""

    class OwnError(Exception):
        pass

    @ray.remote(resources=STRICT)
    def fail():
        raise OwnError("what happened")

    with pytest.raises(ray.exceptions.RayTaskError, match="OwnError: what happened"):
        ray.get(fail.remote())


def test_failed_dependency_fails_the_task():
    """The error of an argument's task is the error of the task."""

    @ray.remote(resources=STANDARD)
    def fail():
        raise ValueError("first")

    with pytest.raises(ValueError, match="first"):
        ray.get(echo.remote(fail.remote()))


@pytest.mark.parametrize("profile", ["strict", "standard"])
def test_retry_exceptions(profile):
    """``retry_exceptions`` decides by the exception's type in the jail."""
    name = f"flaky-{profile}"

    @ray.remote(
        resources=raysandbox.tag(profile),
        max_retries=2,
        retry_exceptions=[OSError],
    )
    def flaky(kind):
        raise kind("again")

    for kind, runs in ((FileNotFoundError, 3), (ValueError, 1)):
        task = f"{name}-{kind.__name__}"
        with pytest.raises(kind, match="again"):
            ray.get(flaky.options(name=task).remote(kind))
        until = time.monotonic() + 40
        while len(ended(task)) < runs and time.monotonic() < until:
            time.sleep(0.1)
        assert len(ended(task)) == runs


def test_max_calls_ends_the_worker():
    """``max_calls=1`` gives each call its own worker, as on stock Ray."""

    @ray.remote(resources=STRICT, max_calls=1)
    def worker():
        return ray.get_runtime_context().get_worker_id()

    assert ray.get(worker.remote()) != ray.get(worker.remote())


def test_output_reaches_the_driver(capfd):
    """What a task prints comes out at the driver with Ray's prefix."""

    @ray.remote(resources=STRICT)
    def speak():
        print("to stdout")
        print("to stderr", file=sys.stderr)
        os.write(1, b"by the descriptor\n")

    ray.get(speak.remote())
    seen, until = "", time.monotonic() + 20
    while time.monotonic() < until and "by the descriptor" not in seen:
        time.sleep(0.1)
        out, err = capfd.readouterr()
        seen += out + err
    for text in ("to stdout", "to stderr", "by the descriptor"):
        assert text in seen
    assert "(speak pid=" in seen


def test_runtime_context():
    """The basics of ``ray.get_runtime_context()`` are the task's own."""

    @ray.remote(resources=STRICT, name="my-task")
    def context():
        c = ray.get_runtime_context()
        return [c.get_task_name(), c.get_job_id(), c.get_node_id(), c.namespace]

    outer = ray.get_runtime_context()
    assert ray.get(context.remote()) == [
        "my-task",
        outer.get_job_id(),
        outer.get_node_id(),
        outer.namespace,
    ]


@ray.remote
def elsewhere():
    return 1


@pytest.mark.parametrize(
    "call",
    [
        elsewhere.remote,
        lambda: elsewhere.options(num_cpus=0).remote(),
        ray.get,
        lambda: ray.get([]),
        lambda: ray.put(1),
        lambda: ray.wait([]),
        ray.init,
        lambda: ray.remote(lambda: 1).remote(),
        ray.nodes,
        lambda: ray.get_actor("x"),
    ],
)
def test_ray_api_inside_a_jail_says_so_at_once(call):
    """A call that needs the cluster fails with the task and the boundary named."""

    @ray.remote(resources=STRICT)
    def inside():
        call()

    start = time.monotonic()
    with pytest.raises(
        ray.exceptions.RayTaskError, match="boundary = 'task'"
    ) as caught:
        ray.get(inside.remote(), timeout=30)
    assert "not available in a jail" in str(caught.value)
    assert "strict" in str(caught.value)
    assert time.monotonic() - start < 29


def test_generators_are_refused():
    """A generator task fails with what is not supported."""

    @ray.remote(resources=STRICT)
    def numbers():
        yield 1

    refs = list(numbers.remote())
    with pytest.raises(ray.exceptions.RayTaskError, match="generator"):
        ray.get(refs)


def test_unsupported_result_names_type_and_place():
    """Under ``strict`` an object that is no data fails and says where it sits."""

    @ray.remote(resources=STRICT)
    def bad():
        return {"a": [1, object()]}

    with pytest.raises(raysandbox.TaskUnsupported) as caught:
        ray.get(bad.remote())
    message = str(caught.value)
    assert "object" in message
    assert 'result["a"][1]' in message
    assert 'results.mode = "pickle"' in message


def test_untagged_tasks_are_strict():
    """No tag means the strictest profile, not none."""

    @ray.remote
    def where():
        return os.getpid(), os.getuid(), os.listdir("/scratch")

    assert ray.get(where.remote())[:2] == (1, 1000)

    @ray.remote
    def bad():
        return object()

    with pytest.raises(raysandbox.TaskUnsupported, match="strict"):
        ray.get(bad.remote())


def test_fractional_and_placement_group_tags():
    """A part of a tag, and a tag of a placement group, name the profile too."""

    @ray.remote(resources=raysandbox.tag("standard", 0.001))
    def value():
        return object

    assert ray.get(value.remote()) is object
    group = ray.util.placement_group([{"CPU": 1, "sandbox:standard": 1}])
    ray.get(group.ready(), timeout=30)
    strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy(group)
    assert ray.get(value.options(scheduling_strategy=strategy).remote()) is object
    ray.util.remove_placement_group(group)


def test_job_boundary_reuses_its_jail():
    """``fast`` keeps what a task leaves for the next one of the same job."""

    @ray.remote(resources=raysandbox.tag("fast"), num_cpus=2)
    def visit():
        path = Path("/scratch/visits")
        with path.open("a") as file:
            file.write("x")
        return path.stat().st_size

    assert ray.get(visit.remote()) == 1
    assert ray.get(visit.remote()) == 2


def test_task_boundary_starts_from_nothing():
    """``strict`` gives each task a new scratch, new globals, a new process."""

    @ray.remote(resources=STRICT, num_cpus=2)
    def visit():
        sys.modules.setdefault("left_behind", sys)
        marked = hasattr(sys, "visited")
        sys.visited = True
        path = Path("/scratch/visits")
        with path.open("a") as file:
            file.write("x")
        return marked, path.stat().st_size

    assert ray.get(visit.remote()) == (False, 1)
    assert ray.get(visit.remote()) == (False, 1)


def archive(path: Path, files: dict[str, str], mode: str = "w") -> None:
    with zipfile.ZipFile(path, mode) as made:
        for name, text in files.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = 0o100644 << 16
            made.writestr(info, text)


def uploaded(package: Path) -> str:
    """Put a package where ray.init does; a task's own are not uploaded by Ray."""
    from ray._private.runtime_env import packaging

    uri = packaging.get_uri_for_package(package)
    packaging.upload_package_to_gcs(uri, package.read_bytes())
    return str(uri)


def test_runtime_env_variables_directories_and_modules(tmp_path):
    """env_vars, working_dir and py_modules are seen by the task, in its jail."""
    working, module = tmp_path / "working.zip", tmp_path / "module.zip"
    archive(working, {"data.txt": "from the working directory"})
    archive(working, {"helper.py": "NAME = 'helper'"}, mode="a")
    archive(module, {"extra_module/__init__.py": "NAME = 'extra'"})

    @ray.remote(
        resources=STRICT,
        runtime_env={
            "env_vars": {"COLOUR": "green", "RAYSANDBOX_X": "no"},
            "working_dir": uploaded(working),
            "py_modules": [uploaded(module)],
        },
    )
    def look():
        import extra_module
        import helper

        return [
            os.environ["COLOUR"],
            "RAYSANDBOX_X" in os.environ,
            Path("data.txt").read_text(),
            helper.NAME,
            extra_module.NAME,
            os.getpid(),
        ]

    got = ray.get(look.remote(), timeout=120)
    assert got == ["green", False, "from the working directory", "helper", "extra", 1]


def test_pip_packages_are_seen_by_the_task(tmp_path):
    """What ``runtime_env`` installs is there in the jail, and in no other."""
    made = wheel.build(tmp_path)

    def look():
        try:
            import rsx_extra
        except ImportError:
            return None
        return rsx_extra.NAME, os.getpid()

    task = ray.remote(resources=STRICT)(look)
    there = task.options(
        runtime_env={
            "pip": {
                "packages": [str(made)],
                "pip_install_options": ["--no-index", "--no-deps"],
            }
        }
    )
    assert ray.get(there.remote(), timeout=180) == ("installed by pip", 1)
    assert ray.get(task.remote()) is None


@ray.remote(resources=STRICT)
def fork_beside_a_thread():
    import logging
    import threading

    stop = threading.Event()
    beside = threading.Thread(target=stop.wait)
    beside.start()
    logging._acquireLock()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        # Both would be the parent's without the hooks: two threads, a held lock.
        logging.getLogger("child").setLevel(logging.INFO)
        os.write(writing, b"%d" % threading.active_count())
        os._exit(0)
    logging._releaseLock()
    stop.set()
    beside.join()
    os.waitpid(pid, 0)
    native = threading.main_thread().native_id == threading.get_native_id()
    return [int(os.read(reading, 10)), native]


def test_a_fork_inside_a_jail_runs_pythons_own_hooks():
    """The jail itself was forked without them; what a task forks needs them.

    Guards against a child that inherits locks and threads that nobody has.
    """
    assert ray.get(fork_beside_a_thread.remote()) == [1, True]


def test_many_tasks_at_once():
    """Hundreds in flight all come back."""
    assert sum(ray.get([echo.remote(n) for n in range(200)])) == 19900


def test_cancel_ends_the_jail():
    """A cancelled task stops, and its worker serves the next."""

    @ray.remote(resources=STRICT)
    def forever():
        while True:
            time.sleep(1)

    ref = forever.remote()
    time.sleep(1)
    ray.cancel(ref)
    with pytest.raises(
        (ray.exceptions.TaskCancelledError, ray.exceptions.RayTaskError)
    ):
        ray.get(ref, timeout=30)
    assert ray.get(echo.remote(1), timeout=30) == 1

"""A Ray of its own, with or without the proxy; does what it is told.

    python -m tests.node.side stock|proxy [OPTIONS AS JSON]

Does what it is told by a `tests.peer.Peer`. With the proxy each worker runs in a
mount namespace in which the proxy's sockets lie over the real ones.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import tempfile
import time
from typing import Any

import numpy as np
import ray
import ray.cloudpickle

from raysandbox.node import seams, store_proxy
from tests import peer
from tests.node import hostile

_OPTIONS = json.loads(sys.argv[2]) if len(sys.argv) > 2 else {}
_proxies: list[store_proxy.StoreProxy] = []
_paths: list[str] = []


def _wrap(process: seams.Process) -> None:
    if process.kind != "raylet":
        return
    plasma = process.argument("--store_socket_name")
    raylet = process.argument("--raylet_socket_name")
    _paths[:] = [plasma, raylet]
    if sys.argv[1] == "stock":
        return
    directory = os.path.join(os.path.dirname(plasma), "raysandbox")
    proxy = store_proxy.start(
        plasma_store=plasma,
        raylet=raylet,
        directory=directory,
        limits=store_proxy.Limits(**_OPTIONS.get("limits", {})),
        events=os.path.join(directory, "events.jsonl") if _made(directory) else None,
        executable=_OPTIONS.get("executable"),
    )
    _proxies.append(proxy)
    wrapper = os.path.join(directory, "worker")
    mounts = "\n".join(
        f"mount --bind {source} {target}" for target, source in proxy.mounts().items()
    )
    with open(wrapper, "w") as file:
        file.write(
            f"#!/bin/sh\nif [ -z $RSX_INSIDE ]; then RSX_INSIDE=1 exec unshare -m "
            f'--propagation private "$0" "$@"; fi\nset -e\n{mounts}\n'
            f'unset RSX_INSIDE\nexec {sys.executable} "$@"\n'
        )
    os.chmod(wrapper, 0o755)
    seams.RayletCommand(process).wrap_workers(wrapper, sys.executable)


def _made(directory: str) -> bool:
    os.makedirs(directory, exist_ok=True)
    return True


def _bind(path: str, *, actor: bool) -> None:
    """What our code in a worker does before any of a user's runs there."""
    from raysandbox.node import store_proxy

    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    limits = store_proxy.Limits(**json.loads(os.environ.get("RSX_FETCH", "{}")))
    store_proxy.bind(path, job, actor=actor, limits=limits)


def _get(function: Any, *arguments: Any) -> Any:
    path = _proxies[0].bind_socket if _proxies and _OPTIONS.get("bind", True) else ""

    def run(*given: Any) -> Any:
        if path:
            _bind(path, actor=False)
        return function(*given)

    task = ray.remote(max_retries=0)(run)
    return ray.get(task.remote(*arguments), timeout=100)


def attack(name: str) -> list[Any]:
    """Let a task attack; return what it saw, and whether raylet lives."""
    try:
        seen = _get(hostile.attack, name)
    except Exception as error:
        seen = type(error).__name__
    return [seen, raylet_lives()]


def raylet_lives() -> bool:
    """Say whether raylet has not ended, a moment after."""
    node = ray._private.worker._global_node
    raylet = node.all_processes["raylet"][0].process
    until = time.monotonic() + 0.5
    while time.monotonic() < until:
        if raylet.poll() is not None:
            return False
        time.sleep(0.02)
    return True


def fetch(count: int, size: int, keep: str, limits: dict[str, int]) -> Any:
    """Let a task get objects of ours, one after the other, and "keep" or "drop" them.

    Returns how many it got, or the name of what ended it.
    """
    path = _proxies[0].bind_socket if _proxies else ""
    refs = [ray.put(np.ones(size, np.uint8)) for _ in range(count)]

    def run(given: list[Any]) -> int:
        if path:
            _bind(path, actor=False)
        kept = []
        for ref in given:
            kept.append(ray.get(ref))
            if keep == "drop":
                kept.clear()
        return len(given)

    variables = {"RSX_FETCH": json.dumps(limits)}
    task = ray.remote(max_retries=0, runtime_env={"env_vars": variables})(run)
    try:
        return ray.get(task.remote(refs), timeout=60)
    except ray.exceptions.RayError as error:
        return type(error).__name__


def honest() -> int:
    """Run an ordinary task that puts, gets, waits and starts another one."""

    def work(array: Any) -> int:
        ref = ray.put(array * 2)
        ready, _ = ray.wait([ref], timeout=60)
        return int(ray.get(ready[0]).sum())

    return int(_get(work, ray.put(np.ones(1 << 17))))


def call(name: str, *arguments: Any) -> Any:
    """Run a function of `hostile` as a task; the name of what ended it, if so."""
    try:
        return _get(getattr(hostile, name), *arguments)
    except ray.exceptions.RayError as error:
        return type(error).__name__


def slowest_put_during(name: str, *arguments: Any) -> list[float]:
    """Run a function of `hostile`.

    Returns:
        What a put and get of ours took at most meanwhile, in seconds, and how many
        objects the proxy counted for the worker.
    """

    def run() -> Any:
        if path:
            _bind(path, actor=False)
        return getattr(hostile, name)(*arguments)

    path = _proxies[0].bind_socket if _proxies else ""
    running, slowest, most = ray.remote(max_retries=0)(run).remote(), 0.0, 0
    while not ray.wait([running], timeout=0.05)[0]:
        begun = time.monotonic()
        ray.get(ray.put(np.ones(1 << 17)))
        slowest = max(slowest, time.monotonic() - begun)
        most = max([most, *(each["objects"] for each in stats()["workers"])])
    return [slowest, most]


_kept: list[Any] = []


def keep(size: int) -> None:
    """Keep an object of the driver's in the store."""
    _kept.append(ray.put(np.full(size, 7, "u1")))


def kept_is_there() -> bool:
    """Say whether it is, unchanged, and in memory."""
    from raysandbox.worker.store import which_stored

    ids = [ref.binary() for ref in _kept]
    in_memory = which_stored(_paths[0], ids)
    whole = all(bool((ray.get(ref) == 7).all()) for ref in _kept)
    return whole and in_memory == set(ids)


def peers() -> list[list[int]]:
    """Return who a worker reaches by the real names, and who it should be."""
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    return [_get(hostile.peers, *_paths), [_proxies[0].process.pid, raylet]]


def child_connects() -> str:
    """See `hostile.child_connects`."""
    return str(_get(hostile.child_connects, _paths[0]))


def spill(count: int, size: int) -> bool:
    """Store more than there is memory for, and read all of it again."""

    def work() -> bool:
        refs = [ray.put(np.full(size, n, "u1")) for n in range(count)]
        return all(bool((ray.get(ref) == n).all()) for n, ref in enumerate(refs))

    return bool(_get(work))


def bind(job: str, again: str) -> list[str]:
    """Bind a worker to a job, put, and bind it again."""
    path = _proxies[0].bind_socket

    def work() -> list[str]:
        from raysandbox.node import store_proxy

        said = []
        for each in (job or ray.get_runtime_context().get_job_id(), again):
            try:
                store_proxy.bind(path, bytes.fromhex(each), actor=False)
                said.append("ok")
                ray.put(b"x" * 1000)
            except Exception as error:
                said.append(str(error))
        return said

    try:
        return list(_get(work))
    except Exception as error:
        return [type(error).__name__]


def actor() -> int:
    """Make an actor, call it, and let it go."""
    path = _proxies[0].bind_socket

    class Adder:
        def __init__(self) -> None:
            _bind(path, actor=True)

        def add(self, array: Any) -> int:
            return int(ray.get(ray.put(array)).sum())

    made = ray.remote(Adder).remote()
    total = ray.get(made.add.remote(ray.put(np.ones(1 << 17))), timeout=60)
    ray.kill(made)
    return int(total)


def put_get(size: int, count: int) -> float:
    """Return seconds for a put and a get of so many bytes, in a task."""

    def work() -> float:
        value = np.ones(size // 8) if size > 1 << 16 else b"x" * size
        ray.get(ray.put(value))
        begun = time.perf_counter()
        for _ in range(count):
            ray.get(ray.put(value))
        return (time.perf_counter() - begun) / count

    return float(_get(work))


def stats() -> Any:
    """Return the proxy's."""
    return _proxies[0].stats()


def events() -> list[Any]:
    """Return what it wrote down."""
    with open(os.path.join(_proxies[0].directory, "events.jsonl")) as file:
        return [json.loads(line) for line in file]


def end_proxy() -> bool:
    """Kill the proxy while a task runs; say whether the worker is gone."""

    def wait() -> None:
        time.sleep(60)

    running = ray.remote(max_retries=0)(wait).remote()
    until = time.monotonic() + 30
    while not (busy := _workers()) and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(1)
    os.kill(_proxies[0].process.pid, signal.SIGKILL)
    _proxies[0].process.wait()
    try:
        ray.get(running, timeout=20)
    except ray.exceptions.WorkerCrashedError:
        pass
    until = time.monotonic() + 40
    while (left := busy & _workers()) and time.monotonic() < until:
        time.sleep(0.1)
    return bool(busy) and not left


def _workers() -> set[int]:
    return (
        {each["pid"] for each in stats()["workers"]}
        if _proxies[0].alive()
        else {
            int(pid)
            for pid in os.listdir("/proc")
            if pid.isdigit() and _has_plasma(pid)
        }
    )


def _has_plasma(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return f"--object-store-name={_paths[0]}" in file.read()
    except OSError:
        return False


def main() -> None:
    """Serve until stdin ends."""
    faulthandler.enable()
    ray.cloudpickle.register_pickle_by_value(hostile)
    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    seams.install(_wrap)
    temporary = tempfile.TemporaryDirectory(prefix="rsx-node-", dir="/tmp")
    ray.init(
        num_cpus=_OPTIONS.get("cpus", 1),
        include_dashboard=False,
        logging_level="CRITICAL",
        log_to_driver=False,
        object_store_memory=_OPTIONS.get("store", 200 << 20),
        _temp_dir=temporary.name,
    )
    try:
        peer.serve(globals())
    finally:
        ray.shutdown()
        for proxy in _proxies:
            proxy.stop()
        temporary.cleanup()


if __name__ == "__main__":
    main()

"""The second kernel boots while other tests run: it is slow, and needs one core."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.qemu import run
from tests.qemu.parts import PARTS

HERE = Path(__file__).parent
_MACHINES = pytest.StashKey[dict[str, Future[run.Result]]]()
_POOL = pytest.StashKey[ThreadPoolExecutor]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start, one after the other, the machines that selected tests will ask for."""
    wanted = [
        item.callspec.params["part"]
        for item in session.items
        if isinstance(item, pytest.Function) and item.path.parent == HERE
    ]
    if session.config.option.collectonly or not wanted or run.lacks():
        return
    # One thread for all: a machine is killed when the thread that started it ends.
    pool = session.config.stash[_POOL] = ThreadPoolExecutor(1)
    session.config.stash[_MACHINES] = {
        part: pool.submit(run.pytest_inside, PARTS[part].arguments) for part in wanted
    }


@pytest.fixture(scope="session")
def machines(request: pytest.FixtureRequest) -> dict[str, Future[run.Result]]:
    """What is being run on the second kernel, by part."""
    return request.config.stash.get(_MACHINES, {})


def pytest_unconfigure(config: pytest.Config) -> None:
    """Don't wait for machines that nobody asks about any more."""
    pool = config.stash.get(_POOL, None)
    if pool is not None:
        run.kill_all()
        pool.shutdown(wait=True, cancel_futures=True)

"""The second kernel boots while other tests run: it is slow, and needs one core."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.lanes import KINDS, lane_of, side_by_side
from tests.qemu import run
from tests.qemu.parts import PARTS

HERE = Path(__file__).parent
_MACHINES = pytest.StashKey[dict[str, Future[run.Result]]]()
_POOL = pytest.StashKey[ThreadPoolExecutor]()


class _Starter:
    """Starts the machines when the first test of their lane does."""

    def __init__(self, session: pytest.Session, items: list[pytest.Function]) -> None:
        self._session, self._items = session, items

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        lane = lane_of(item.nodeid)
        if side_by_side() and lane != KINDS["qemu"].lane:
            return
        config = self._session.config
        config.pluginmanager.unregister(self)
        # One thread for all: a machine is killed when the thread that started it ends.
        pool = config.stash[_POOL] = ThreadPoolExecutor(1)
        parts = [item.callspec.params["part"] for item in self._items]
        config.stash[_MACHINES] = {
            part: pool.submit(run.pytest_inside, PARTS[part].arguments)
            for part in parts
        }


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the machines started, one after the other, that tests will ask for."""
    items = [
        item
        for item in session.items
        if isinstance(item, pytest.Function) and item.path.parent == HERE
    ]
    if items and not session.config.option.collectonly and not run.lacks():
        session.config.pluginmanager.register(_Starter(session, items))


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

"""One sandboxed Ray for the tests of this directory, and profiles of their own."""

from __future__ import annotations

import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import ray.cloudpickle

import raysandbox

PROFILES = {
    "quick": """
        extends = "standard"
        [limits]
        wall_time = "3s"
        """,
    "hasty": """
        extends = "standard"
        [limits]
        wall_time = "1s"
        """,
    "brisk": """
        extends = "fast"
        why = "as fast, with less room"
        [limits]
        wall_time = "2s"
        output = "64KiB"
        [object_store]
        max_result = "32KiB"
        """,
    "spare": """
        extends = "fast"
        why = "as fast, and what running tasks hold is not counted"
        [object_store]
        max_job_arguments = "unlimited"
        max_job_argument_objects = "unlimited"
        """,
    "thrifty": """
        extends = "standard"
        [limits]
        memory = "128MiB"
        pids = 16
        cpu_time = "2s"
        open_files = 64
        output = "64KiB"
        file_size = "4MiB"
        [filesystem]
        scratch = "16MiB"
        scratch_inodes = 256
        [object_store]
        max_argument = "1MiB"
        max_result = "1MiB"
        max_put = "1536KiB"
        """,
    "frugal": """
        extends = "standard"
        [object_store]
        max_arguments = "1200KiB"
        max_argument_objects = 3
        max_put_objects = 3
        max_job = "2MiB"
        max_job_objects = 4
        max_job_arguments = "1MiB"
        """,
    "tight": """
        extends = "trusted"
        why = "as trusted, with a smaller share of the store"
        [object_store]
        max_put = "25MiB"
        """,
    "lethal": """
        extends = "standard"
        [syscalls]
        action = "kill"
        """,
    "inside": """
        extends = "trusted"
        why = "as trusted, with less room"
        filesystem.scratch = "64MiB"
        filesystem.why = "as trusted"
        [limits]
        memory = "512MiB"
        pids = 200
        """,
    "demanding": """
        extends = "trusted"
        why = "more than a running worker can give"
        [namespaces]
        required = true
        """,
    "broken": """
        extends = "standard"
        [limits]
        memory = "5 apples"
        """,
}


@pytest.fixture(scope="package")
def profile_dir() -> Iterator[Path]:
    """A directory of the site's own profiles that only its owner can write."""
    # Not in /tmp: who may write there could replace the directory.
    directory = Path(tempfile.mkdtemp(prefix="rsx-profiles-", dir=Path.home()))
    for name, text in PROFILES.items():
        lines = [line.strip() for line in text.strip().splitlines()]
        lines = [f"{line}\n" for line in lines]
        (directory / f"{name}.toml").write_text("".join(lines))
    yield directory
    shutil.rmtree(directory)


def _start(temporary: str, **options: bool) -> None:
    raysandbox.init(
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=temporary,
        log_to_driver=True,
        logging_level="ERROR",
        **options,
    )


@pytest.fixture(scope="module")
def hook_alone(cluster: str) -> Iterator[None]:
    """A cluster without the launcher, for one module in between."""
    del cluster
    ray.shutdown()
    temporary = tempfile.mkdtemp(prefix="rsx-ray-", dir="/tmp")
    _start(temporary, wall=False)
    yield
    ray.shutdown()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture(scope="package")
def cluster(profile_dir: Path) -> Iterator[str]:
    """A local Ray whose workers are in the sandbox; what it warned of."""
    patch = pytest.MonkeyPatch()
    patch.setenv("RAYSANDBOX_PROFILE_PATH", str(profile_dir))
    patch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    temporary = tempfile.mkdtemp(prefix="rsx-ray-", dir="/tmp")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        _start(temporary)
    yield " ".join(str(each.message) for each in caught)
    ray.shutdown()
    patch.undo()
    shutil.rmtree(temporary, ignore_errors=True)


@pytest.fixture
def offered(cluster: str) -> tuple[str, dict[str, float]]:
    """What the node left out, and what it offers."""
    return cluster, ray.cluster_resources()


@pytest.fixture(autouse=True)
def by_value(request: pytest.FixtureRequest) -> None:
    """Functions of the test modules travel by value: jails don't see our files."""
    own = ("test_sealed", "test_bad_input", "test_policy", "test_observe")
    if request.module.__name__.endswith(own):
        return  # drivers of their own
    request.getfixturevalue("cluster")
    if not ray.is_initialized():
        # A module with a cluster of its own came before.
        _start(tempfile.mkdtemp(prefix="rsx-ray-", dir="/tmp"))
    module = sys.modules[request.module.__name__]
    ray.cloudpickle.register_pickle_by_value(module)

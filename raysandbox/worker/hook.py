"""What Ray runs in each worker before its first task: ``raysandbox.worker_hook``.

After it a worker holds Ray's protocol and nothing else: functions, arguments
and results pass through it sealed, and run or are opened in jails alone. If
any part of that can't be put in place, the worker ends instead of serving.
"""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from typing import NoReturn

__all__ = ["worker_hook"]

_PACKAGE = "raysandbox"
_WORKER_SCRIPT = "/ray/_private/workers/default_worker.py"
# How long Ray has to write down why the worker leaves.
_LAST_WORDS_S = 2.0


def worker_hook() -> None:
    """Put this Ray worker behind the sandbox; see ``worker_process_setup_hook``.

    Raises:
        UnsupportedError: This version of Ray lacks one of the seams. The worker
            serves no task.
    """
    import ray._private.worker as ray_worker

    worker = ray_worker.global_worker
    try:
        _end_with(os.getppid(), *_raylet_above())
        _install()
    except BaseException:
        # Ray logs the error and then enters the main loop all the same.
        worker.main_loop = _leave
        raise


def _install() -> None:
    _use_the_nodes_packages()
    from raysandbox import client
    from raysandbox.worker import seams
    from raysandbox.worker.executor import JailExecutor
    from raysandbox.worker.gate import Gate
    from raysandbox.worker.output import lose_what_does_not_fit

    lose_what_does_not_fit()
    # Arrow's allocator would start a thread that answers no signal: no wall could be
    # raised around it any more.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    trusted = seams.TrustedPath.of_worker(sys.path)
    client.install()
    # The gate first: it takes out of the environment what a client put there.
    seams.install(JailExecutor(trusted, Gate()))
    sys.path = trusted


def _use_the_nodes_packages() -> None:
    """Take our own modules from the node's installation, and let jails do so.

    In a pip environment Python finds a copy of all packages that the job may have
    changed. Raylet starts workers by a path in the node's own.

    Raises:
        ImportError: raysandbox is not installed there.
    """
    import ray._private.worker as ray_worker

    root = os.path.realpath(ray_worker.global_worker.node.get_runtime_env_dir_path())
    if not os.path.realpath(__file__).startswith(root + "/"):
        return
    site = sys.argv[0].removesuffix(_WORKER_SCRIPT)
    if not os.path.isdir(f"{site}/{_PACKAGE}"):
        raise ImportError(f"raysandbox is not installed on this node, in {site}")
    for name in [name for name in sys.modules if name.partition(".")[0] == _PACKAGE]:
        del sys.modules[name]
    sys.path.insert(0, site)


def _raylet_above() -> list[int]:
    """Return raylet's pid where something between it and us starts the interpreter."""
    named = os.environ.get("RAY_RAYLET_PID", "")
    return [int(named)] if named.isdigit() and int(named) != os.getppid() else []


def _end_with(parent: int, *others: int) -> None:
    """End this worker, and so its jails, at the moment its raylet ends.

    Ray's own look at the process table takes many seconds, takes a zombie for
    alive, and waits for the task that runs.

    Args:
        parent: Raylet, or what raylet started instead.
        others: What else it ends with.

    Raises:
        OSError: It is gone already.
    """
    poll = select.poll()
    for pid in (parent, *others):
        poll.register(os.pidfd_open(pid), select.POLLIN)
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        poll.poll()
        os._exit(1)

    threading.Thread(target=watch, name="raysandbox-raylet", daemon=True).start()


def _leave() -> NoReturn:
    time.sleep(_LAST_WORDS_S)
    os._exit(1)

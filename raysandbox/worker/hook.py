"""What Ray runs in each worker before its first task: ``raysandbox.worker_hook``.

After it a worker holds Ray's protocol and nothing else: functions, arguments
and results pass through it sealed, and run or are opened in jails alone. If
any part of that can't be put in place, the worker ends instead of serving.
"""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

__all__ = ["worker_hook"]

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
        _install()
    except BaseException:
        # Ray logs the error and then enters the main loop all the same.
        worker.main_loop = _leave
        raise


def _install() -> None:
    from raysandbox import client
    from raysandbox.worker import seams
    from raysandbox.worker.executor import JailExecutor
    from raysandbox.worker.gate import Gate

    trusted = seams.TrustedPath.of_worker(sys.path)
    client.install()
    # The gate first: it takes out of the environment what a client put there.
    seams.install(JailExecutor(trusted, Gate()))
    sys.path = trusted


def _leave() -> NoReturn:
    time.sleep(_LAST_WORDS_S)
    os._exit(1)

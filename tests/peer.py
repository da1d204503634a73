"""A process of its own that does what it is told: a JSON line each way.

A line to it is a list: a function's name, and its arguments. The answers have a
descriptor of their own: a thread of Ray's prints what it hears of workers to the
standard output, and may do so in the middle of a line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["Peer", "serve"]

# For one answer; what takes longer hangs, and says where.
_ANSWER_S = 200.0
_VARIABLE = "RAYSANDBOX_TEST_ANSWERS"


class Peer:
    """A running process that calls `serve`.

    Args:
        argv: Its command line.
        env: Its environment; ours without one.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> None:
        self._said = tempfile.TemporaryFile()
        answers, answers_inside = os.pipe()
        self._answers = open(answers)
        self.process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=self._said,
            stderr=self._said,
            pass_fds=[answers_inside],
            text=True,
            env={
                **(os.environ if env is None else env),
                "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
                _VARIABLE: str(answers_inside),
            },
        )
        os.close(answers_inside)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Have it do something and return its answer.

        Raises:
            RuntimeError: It ended, or was ended as it did not answer; with what it
                printed, which has the stacks of all its threads then.
        """
        timer = threading.Timer(_ANSWER_S, self.process.send_signal, (signal.SIGABRT,))
        timer.start()
        try:
            return self._ask(name, *arguments)
        finally:
            timer.cancel()

    def _ask(self, name: str, *arguments: Any) -> Any:
        stdin = self.process.stdin
        assert stdin is not None
        stdin.write(json.dumps([name, *arguments]) + "\n")
        stdin.flush()
        if line := self._answers.readline():
            return json.loads(line)
        self._said.seek(0)
        raise RuntimeError(self._said.read()[-3000:].decode(errors="replace"))

    def leave(self) -> None:
        """Let it end, and its Ray, while others go on; `close` waits for that."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def close(self) -> None:
        """End it, and its Ray."""
        self.leave()
        self._answers.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def serve(functions: Mapping[str, Callable[..., Any]]) -> None:
    """Do what comes on the standard input, until it ends; in the process itself."""
    answers_fd = int(os.environ.pop(_VARIABLE))
    # No process of Ray's keeps it open when this one has ended.
    os.set_inheritable(answers_fd, False)
    with open(answers_fd, "w") as answers:
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(functions[name](*arguments)), file=answers, flush=True)

"""Drives `tests.node.side`: a Ray of its own in a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from typing import Any

# For one answer; what takes longer hangs, and says where.
_ANSWER_S = 200.0


class Side:
    """A process of `tests.node.side`; see there for what it can be told."""

    def __init__(self, kind: str, **options: Any) -> None:
        self._errors = tempfile.TemporaryFile()
        # Not stdout: a thread of Ray's prints there what it hears of workers, and
        # may do so in the middle of a line.
        answers, answers_inside = os.pipe()
        self._answers = open(answers)
        options["answers"] = answers_inside
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.node.side", kind, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=[answers_inside],
            text=True,
            env={**os.environ, "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"},
        )
        os.close(answers_inside)

    def __call__(self, name: str, *arguments: Any) -> Any:
        """Have it do something and return its answer.

        Raises:
            RuntimeError: It ended, or was ended as it did not answer; with what it
                wrote to stderr, which has the stacks of all its threads then.
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
        self._errors.seek(0)
        raise RuntimeError(self._errors.read()[-3000:].decode(errors="replace"))

    def close(self) -> None:
        """End it, and its Ray."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        self._answers.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

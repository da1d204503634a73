"""Runs Python on a host, each call in a fork of one process that has its imports.

Arguments: modules, or paths of files, to import first. A line of standard input is
a JSON object: ``run`` (a function of theirs, ``module:name``), ``argv``, ``env`` and
``cwd``. Each is answered with a line when the call has ended: ``code``, ``out`` and
``err``. What a call sees is what a program of its own would see, but for the second
that Python, Ray and gRPC take to be imported.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import IO, Any, NoReturn


def _import(name: str) -> None:
    if not name.endswith(".py"):
        importlib.import_module(name)
        return
    spec = importlib.util.spec_from_file_location(Path(name).stem, name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)


def _child(ask: dict[str, Any], out: IO[bytes], err: IO[bytes]) -> NoReturn:
    code: Any = 1
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdin = open(0, closefd=False)
        os.environ.clear()
        os.environ.update(ask["env"])
        os.chdir(ask["cwd"])
        sys.argv = ask["argv"]
        module, _, function = ask["run"].partition(":")
        code = getattr(sys.modules[module], function)()
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def main() -> None:
    """Serve until standard input ends."""
    for name in sys.argv[1:]:
        _import(name)
    for line in sys.stdin:
        ask = json.loads(line)
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            pid = os.fork()
            if pid == 0:
                _child(ask, out, err)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            said = {}
            for name, file in (("out", out), ("err", err)):
                file.seek(0)
                said[name] = file.read().decode(errors="replace")
        print(json.dumps({"code": code, **said}), flush=True)


if __name__ == "__main__":
    main()

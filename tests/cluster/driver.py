"""A driver that does what it is told: Python in, JSON out, one line each.

Runs the code of each line in one namespace; the answer is the JSON of what the
code left in `result`, or the error. Run by its path, so that nothing but Ray need
be importable.
"""

from __future__ import annotations

import json
import sys
import traceback


def main() -> None:
    """Serve until stdin ends."""
    space: dict[str, object] = {"__name__": "__driver__"}
    for line in sys.stdin:
        space["result"] = None
        try:
            exec(json.loads(line), space)
            answer = {"result": space["result"]}
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[-2000:]}
        print("\n>" + json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()

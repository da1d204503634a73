"""Text that came from a jail, a client or a log, made safe to print.

A task's name or its output may hold escape sequences that rewrite a terminal,
characters that turn the direction of a line around, or a line break that starts
a line of its own in a log. Nothing of that gets through: what is not printable
is shown as Python would write it in a string.
"""

from __future__ import annotations

__all__ = ["shown"]


def shown(text: object, most: int = 200) -> str:
    r"""Return ``text`` on one line, with ``\x1b`` and the like written out.

    Args:
        text: Anything; what is no string is converted.
        most: Characters; what is longer ends in ``…``.
    """
    safe = "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode()
        for each in str(text)[: most + 1]
    )
    return safe if len(safe) <= most else safe[: most - 1] + "…"

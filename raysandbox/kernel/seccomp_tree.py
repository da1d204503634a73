"""Answers that hang on a system call's number alone, as a few BPF instructions.

libseccomp gives every call a comparison and an answer of its own. Most calls that
a policy allows have neighbours that it allows too, so a search over ranges says
the same in a third of the instructions: the kernel checks, translates and runs
each filter once for every call when it is loaded (kernel/seccomp.c,
seccomp_cache_prepare), which is what a jail's start pays for.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping

__all__ = ["dispatch"]

_JA, _JGE, _RET = 0x05, 0x35, 0x06
# A conditional jump reaches 255 instructions; a trampoline may come in between.
_REACH = 250


def dispatch(answers: Mapping[int, int]) -> bytes:
    """Compile a search for the call's number, which is in the accumulator.

    Args:
        answers: Call number to ``SECCOMP_RET_*``. A number that is not in it runs
            into whatever follows these instructions.

    Returns:
        Array of ``struct sock_filter``.
    """
    ranges = _ranges(answers)
    # Built from its end: jumps go forward, and are counted from there.
    code: list[tuple[int, int, int, int]] = []
    place: dict[int | None, int] = {None: -1}
    for answer in dict.fromkeys(answers.values()):
        place[answer] = len(code)
        code.append((_RET, 0, 0, answer))

    def near(target: int) -> int:
        """Return a place that a comparison emitted now or next can jump to."""
        if len(code) - target <= _REACH:
            return target
        code.append((_JA, 0, 0, len(code) - target - 1))
        return len(code) - 1

    def search(low: int, high: int) -> int:
        """Emit the search over some ranges; return where it begins."""
        if high - low == 1:
            return place[ranges[low][1]]
        middle = (low + high) // 2
        above, below = search(middle, high), search(low, middle)
        above, below = near(above), near(below)
        at = len(code)
        code.append((_JGE, at - above - 1, at - below - 1, ranges[middle][0]))
        return at

    if (begin := search(0, len(ranges))) != len(code) - 1:
        code.append((_JA, 0, 0, len(code) - begin - 1))
    return b"".join(struct.pack("<HBBI", *step) for step in reversed(code))


def _ranges(answers: Mapping[int, int]) -> list[tuple[int, int | None]]:
    """Return where each range of one answer begins; the first at 0."""
    found: list[tuple[int, int | None]] = [(0, answers.get(0))]
    edges = {each for number in answers for each in (number, number + 1)}
    for number in sorted(edges):
        if answers.get(number) != found[-1][1]:
            found.append((number, answers.get(number)))
    return found

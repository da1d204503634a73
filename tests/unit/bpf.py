"""A small interpreter of classic BPF, as seccomp(2) runs it.

It runs the very bytes that are installed: what it finds, the kernel finds.
Codes: linux/filter.h and linux/bpf_common.h.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

ALLOW = 0x7FFF0000
ERRNO = 0x00050000
NOTIFY = 0x7FC00000
LOG = 0x7FFC0000
KILL = 0x80000000

X86_64, I386, AARCH64 = 0xC000003E, 0x40000003, 0xC00000B7

_INSTRUCTION = struct.Struct("<HBBI")
_DATA = struct.Struct("<iIQ6Q")  # struct seccomp_data


def run(
    program: bytes, number: int, args: Sequence[int] = (), arch: int = X86_64
) -> int:
    """Return what a filter answers to one call.

    Raises:
        ValueError: The kernel would not have taken the program.
    """
    steps = list(_INSTRUCTION.iter_unpack(program))
    six = [*args, 0, 0, 0, 0, 0, 0][:6]
    signed = number - (1 << 32) if number >= 1 << 31 else number
    data = _DATA.pack(signed, arch, 0, *(arg & (1 << 64) - 1 for arg in six))
    at, a = 0, 0
    while at < len(steps):
        code, yes, no, k = steps[at]
        at += 1
        if code == 0x20:  # LD W ABS
            if k % 4 or k + 4 > len(data):
                raise ValueError(f"load of {k}")
            (a,) = struct.unpack_from("<I", data, k)
        elif code == 0x54:  # ALU AND K
            a &= k
        elif code == 0x05:  # JMP JA
            at += k
        elif code == 0x06:  # RET K
            return k
        elif code in (0x15, 0x25, 0x35, 0x45):
            met = {0x15: a == k, 0x25: a > k, 0x35: a >= k, 0x45: bool(a & k)}[code]
            at += yes if met else no
        else:
            raise ValueError(f"code {code:#x}")
    raise ValueError("the program runs off its end")

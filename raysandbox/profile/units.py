"""Sizes, durations and rates as profiles write them: a whole number and a unit."""

from __future__ import annotations

import re

__all__ = [
    "format_duration",
    "format_rate",
    "format_size",
    "parse_duration",
    "parse_rate",
    "parse_size",
]

_SIZES = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_MILLISECONDS = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
_NUMBER_AND_UNIT = re.compile(r"([0-9]{1,19})([A-Za-z]+)", re.ASCII)
# Beyond these the kernel's own types end.
_MOST_BYTES = 1 << 62
_MOST_MILLISECONDS = 10 * 365 * 86_400_000


def _split(value: object, units: dict[str, int], rule: str) -> int:
    if isinstance(value, str):
        match = _NUMBER_AND_UNIT.fullmatch(value)
        if match is not None and match[2] in units:
            return int(match[1]) * units[match[2]]
    raise ValueError(rule)


def parse_size(value: object) -> int:
    """Return bytes from ``"256MiB"``; 1 KiB is 1024 bytes.

    Raises:
        ValueError: It is no whole number with one of B, KiB, MiB, GiB, TiB.
    """
    rule = 'must be a size such as "64MiB" (units B, KiB, MiB, GiB, TiB)'
    size = _split(value, _SIZES, rule)
    if size > _MOST_BYTES:
        raise ValueError("must be at most 4194304TiB")
    return size


def parse_rate(value: object) -> int:
    """Return bytes per second from ``"50MiB/s"``.

    Raises:
        ValueError: It is no size followed by ``/s``.
    """
    if isinstance(value, str) and value.endswith("/s"):
        return parse_size(value[:-2])
    raise ValueError('must be a rate such as "50MiB/s"')


def parse_duration(value: object) -> float:
    """Return seconds from ``"10min"``.

    Raises:
        ValueError: It is no whole number with one of ms, s, min, h, d.
    """
    rule = 'must be a duration such as "10min" (units ms, s, min, h, d)'
    milliseconds = _split(value, _MILLISECONDS, rule)
    if milliseconds > _MOST_MILLISECONDS:
        raise ValueError("must be at most 3650d")
    return milliseconds / 1000


def _format(value: int, units: dict[str, int]) -> str:
    for unit, factor in reversed(units.items()):
        if value and value % factor == 0:
            return f"{value // factor}{unit}"
    return f"{value}{next(iter(units))}"


def format_size(size_bytes: int) -> str:
    """Write bytes as `parse_size` reads them, in the largest unit that fits."""
    return _format(size_bytes, _SIZES)


def format_rate(bytes_per_s: int) -> str:
    """Write bytes per second as `parse_rate` reads them."""
    return f"{_format(bytes_per_s, _SIZES)}/s"


def format_duration(duration_s: float) -> str:
    """Write seconds as `parse_duration` reads them."""
    return _format(round(duration_s * 1000), _MILLISECONDS)

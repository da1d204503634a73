"""Write a profile as the TOML that would load to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import BaseModel

from raysandbox.profile.units import format_duration, format_rate, format_size

if TYPE_CHECKING:
    from raysandbox.profile.schema import Profile

__all__ = ["dump", "written"]


def written(field: str, value: object) -> str:
    """Return a value of the model's ``field`` as TOML writes it."""
    if value is None:
        return '"unlimited"'
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        if field.endswith("_bytes_per_s"):
            return f'"{format_rate(int(value))}"'
        if field.endswith("_bytes"):
            return f'"{format_size(int(value))}"'
        if field.endswith("_s"):
            return f'"{format_duration(value)}"'
        return f"{value:g}" if isinstance(value, float) else str(value)
    if isinstance(value, str):
        # JSON's escapes are TOML's, but for DEL.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {written('', v)}" for k, v in sorted(value.items()))
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(written('', inner) for inner in value)}]"
    return written("", getattr(value, "path", str(value)))


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isascii() and plain.isalnum() else written("", name)


def dump(profile: Profile) -> str:
    """Return every key of a profile, whether it was written or is a default."""
    lines: list[str] = []
    tables: list[str] = []
    for name, field in type(profile).model_fields.items():
        value = getattr(profile, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{field.alias or name}]", *_keys(value)]
    lines += _keys(profile)
    return "\n".join([*lines, *tables]) + "\n"


def _keys(section: BaseModel) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel) or (name in _QUIET and not value):
            continue
        if name in ("oci", "cpu_weight") and value is None:
            continue
        lines.append(f"{field.alias or name} = {written(name, value)}")
    # `why` reads best last.
    lines.sort(key=lambda line: line.startswith("why = "))
    return lines


#: Keys that say nothing when they are empty.
_QUIET = ("why", "description")

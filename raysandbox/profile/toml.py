"""Write a profile or a policy as the TOML that would load to it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from pydantic import BaseModel

from raysandbox.profile.units import format_duration, format_rate, format_size

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
    if isinstance(value, BaseModel):
        value = dict(value)
    if isinstance(value, Mapping):
        pairs = (f"{_key(k)} = {written('', v)}" for k, v in sorted(value.items()))
        return f"{{ {', '.join(pairs)} }}" if value else "{}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(written('', inner) for inner in value)}]"
    return written("", getattr(value, "path", str(value)))


def _key(name: str) -> str:
    plain = name.replace("_", "").replace("-", "")
    return name if plain.isascii() and plain.isalnum() else written("", name)


def dump(model: BaseModel) -> str:
    """Return every key of a profile or policy, also what is a default."""
    tables: list[str] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            tables += ["", f"[{field.alias or name}]", *_keys(value)]
        elif _is_list_of_tables(value):
            for each in value:
                tables += ["", f"[[{field.alias or name}]]", *_keys(each)]
    return "\n".join([*_keys(model, has_tables=True), *tables]) + "\n"


def _is_list_of_tables(value: object) -> bool:
    return isinstance(value, tuple) and any(isinstance(v, BaseModel) for v in value)


def _keys(section: BaseModel, *, has_tables: bool = False) -> list[str]:
    lines: list[str] = []
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if has_tables and (isinstance(value, BaseModel) or _is_list_of_tables(value)):
            continue
        if name in _QUIET and not value:
            continue
        if name in _OFTEN_NONE and value is None:
            continue
        lines.append(f"{field.alias or name} = {written(name, value)}")
    # `why` reads best last.
    lines.sort(key=lambda line: line.startswith("why = "))
    return lines


#: Keys that say nothing when they are empty.
_QUIET = ("why", "description")
#: Keys that are left out when they have no value; elsewhere that is "unlimited".
_OFTEN_NONE = (
    "oci", "cpu_weight", "untagged", "connect", "entrypoint", "nsight", "rocprof_sys",
)  # fmt: skip

"""``raysandbox profiles``: what there is, what it says, whether it can be used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raysandbox import profile as profiles
from raysandbox.cli.look import AsJson, application
from raysandbox.errors import ProfileError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["app"]

app = application(
    help="List, show and check profiles.",
)


def _file(name: str) -> Path:
    """Return the file that a user means: one of that path, or the profile's."""
    return Path(name) if name.endswith(".toml") or "/" in name else profiles.find(name)


@app.command("list")
def list_(as_json: AsJson = False) -> None:
    """List the profiles of the search path, first find wins.

    Exit status 1 if one of them can't be used as written.
    """
    rows, broken = [], 0
    for name in profiles.names():
        path = profiles.find(name)
        row = {"name": name, "file": str(path), "boundary": "", "description": ""}
        try:
            loaded = profiles.load(name)
        except ProfileError as error:
            broken += 1
            row["error"] = str(error)
        else:
            row |= {"boundary": loaded.boundary, "description": loaded.description}
        rows.append(row)
    if as_json:
        print(json.dumps(rows, indent=2))
    else:
        table = Table("profile", "boundary", "description", box=None)
        table.add_column("file", overflow="fold")
        for row in rows:
            shown = "can't be used, see below" if "error" in row else row["description"]
            built_in = Path(row["file"]).parent == profiles.shipped_dir()
            where = "built in" if built_in else row["file"]
            table.add_row(row["name"], row["boundary"], shown, where)
        console = Console(highlight=False)
        console.print(table)
        for row in rows:
            if "error" in row:
                console.print(row["error"], markup=False, soft_wrap=True)
    raise typer.Exit(1 if broken else 0)


@app.command()
def show(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name, or a .toml file.")],
    as_json: AsJson = False,
) -> None:
    """Print a profile with everything it inherits and every default, as TOML."""
    loaded = profiles.load_file(_file(name))
    if as_json:
        # As in the file: what the schema describes, and not the model's numbers.
        print(json.dumps(tomllib.loads(profiles.dump(loaded)), indent=2))
        return
    print(f"# {loaded.source}")
    print(profiles.dump(loaded), end="")


@app.command()
def check(
    names: Annotated[
        list[str], typer.Argument(metavar="NAME", help="Names, or .toml files.")
    ],
    as_json: AsJson = False,
) -> None:
    """Say everything that is wrong with profiles, one line each.

    Exit status: 0 if nothing is, 1 if something is.
    """
    found = {}
    for name in names:
        try:
            found[name] = profiles.check(_file(name))
        except ProfileError as error:
            found[name] = [error]
    if as_json:
        rows = [
            {
                "name": name,
                "problems": [
                    {
                        "file": problem.source,
                        "key": problem.where,
                        "value": problem.value,
                        "rule": problem.reason,
                    }
                    for problem in problems
                ],
            }
            for name, problems in found.items()
        ]
        # TOML has dates, nan and inf; JSON has none of them.
        plain = json.loads(json.dumps(rows, default=str), parse_constant=str)
        print(json.dumps(plain, indent=2))
    else:
        for name, problems in found.items():
            print("\n".join(map(str, problems)) or f"{name}: fine")
    raise typer.Exit(1 if any(found.values()) else 0)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a profile, for editors."""
    print(json.dumps(profiles.json_schema(), indent=2))

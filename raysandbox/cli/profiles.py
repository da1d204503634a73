"""``raysandbox profiles``: what there is, what it says, whether it can be used."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raysandbox import profile as profiles
from raysandbox.errors import ProfileError

__all__ = ["app"]

app = typer.Typer(
    help="List, show and check profiles.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

AsJson = Annotated[bool, typer.Option("--json", help="As JSON.")]


def _named(name: str) -> profiles.Profile:
    return profiles.load_file(name) if name.endswith(".toml") else profiles.load(name)


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
        table = Table("profile", "boundary", "description", "file", box=None)
        for row in rows:
            shown = row["description"] or row.get("error", "")
            table.add_row(row["name"], row["boundary"], shown, row["file"])
        Console().print(table)
    raise typer.Exit(1 if broken else 0)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="Name, or a .toml file.")],
    as_json: AsJson = False,
) -> None:
    """Print a profile with everything it inherits and every default, as TOML."""
    loaded = _named(name)
    if as_json:
        print(json.dumps(loaded.model_dump(mode="json", by_alias=True), indent=2))
        return
    print(f"# {loaded.source}")
    print(profiles.dump(loaded), end="")


@app.command()
def check(
    files: Annotated[list[Path], typer.Argument(help="Profile files.")],
) -> None:
    """Check files: everything that is wrong, one line each. Exit status 0 or 1."""
    wrong = 0
    for file in files:
        problems = profiles.check(file)
        wrong += len(problems)
        for problem in problems:
            print(problem)
        if not problems:
            print(f"{file}: fine")
    raise typer.Exit(1 if wrong else 0)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a profile, for editors."""
    print(json.dumps(profiles.json_schema(), indent=2))

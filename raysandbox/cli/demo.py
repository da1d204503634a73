"""``raysandbox demo``: the same attacks on stock Ray and in the sandbox."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from raysandbox.cli.look import application
from raysandbox.errors import ProfileError

app = application()


@app.command()
def demo(
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="This attack alone; repeatable. See --list."),
    ] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Name the attacks and their walls.")
    ] = False,
    cost: Annotated[
        bool, typer.Option("--cost/--no-cost", help="Measure honest tasks too.")
    ] = True,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the tables as data.")
    ] = False,
) -> None:
    """Run hostile and honest tasks on stock Ray and in the sandbox, and compare.

    Every attack is harmless to the machine: it is bounded and cleans up. Exit
    status: 0 if each works on stock Ray and is stopped by a wall here; 1 if not.
    """
    from raysandbox.demo import compare
    from raysandbox.demo.attacks import ATTACKS

    names = {attack.name: attack for attack in ATTACKS}
    for name in only or ():
        if name not in names:
            raise ProfileError(
                source="--only", value=name, reason=f"must be one of {', '.join(names)}"
            )
    if list_:
        for attack in ATTACKS:
            walls = "; ".join(attack.walls.values())
            print(f"{attack.name:16} {attack.title:40} {walls}")
        return
    chosen = [attack for attack in ATTACKS if not only or attack.name in only]
    errors = Console(stderr=True)
    with errors.status("starting") as status:
        rows = compare.attacks(chosen, status.update)
        costs = compare.honest(status.update) if cost and not only else {}
    good = all(not row.problem for row in rows)
    if as_json:
        print(
            json.dumps(
                {
                    "ok": good,
                    "attacks": [row.data() for row in rows],
                    "cost_ms": costs,
                },
                indent=1,
            )
        )
    else:
        _print(rows, costs)
    if not good:
        sys.exit(1)


def _print(rows: list, costs: dict[str, dict[str, float]]) -> None:  # type: ignore[type-arg]
    console = Console(soft_wrap=False)
    table = Table(title="Attacks", title_justify="left")
    for heading in ("attack", "stock Ray", "raysandbox", "stopped by"):
        table.add_column(heading)
    shown = {
        "through": "[red]got through[/]",
        "stopped": "[green]stopped[/]",
        "unclear": "[yellow]unclear[/]",
    }
    for row in rows:
        table.add_row(
            row.attack.title,
            shown[row.stock["outcome"]],
            shown[row.sandbox["outcome"]],
            row.sandbox["wall"],
        )
    console.print(table)
    bad = [row for row in rows if row.problem]
    for row in bad:
        console.print(f"{row.attack.name}: {row.problem}", markup=False)
    stopped = len(rows) - len(bad)
    console.print(f"{stopped} of {len(rows)} attacks work on stock Ray and stop here.")
    if costs:
        _print_costs(console, costs)


def _print_costs(console: Console, costs: dict[str, dict[str, float]]) -> None:
    table = Table(title="Honest tasks, ms each", title_justify="left")
    table.add_column("task")
    for heading in ("stock Ray", "strict", "", "fast", ""):
        table.add_column(heading, justify="right")
    for job, by_side in costs.items():
        stock = by_side["stock"]
        cells = [f"{stock:.2f}"]
        for side in ("strict", "fast"):
            cells += [f"{by_side[side]:.2f}", f"{by_side[side] / stock:.2f}x"]
        table.add_row(job, *cells)
    console.print(table)

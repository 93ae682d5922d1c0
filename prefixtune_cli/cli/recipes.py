"""`ptp recipes`: lists the recipes that come with ptp, or prints one."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe, to redirect into a file of your own.")
    ] = None,
    as_json: bool = False,
) -> None:
    """List the recipes that come with ptp, or print one."""
    from prefixtune_cli.cli import console
    from prefixtune_cli.recipe import load

    if name is not None:
        print(load.find(name).read_text(encoding="utf-8"), end="")
        return
    rows = [
        {"name": key, "description": load.summary(path.read_text(encoding="utf-8"))}
        for key, path in load.shipped().items()
    ]
    if as_json:
        console.print_json(rows)
    else:
        console.print_table(["recipe", "description"], [list(row.values()) for row in rows])

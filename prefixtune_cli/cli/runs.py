"""`ptp runs`: lists the runs of `ptp train`, the newest first."""

from __future__ import annotations

from typing import Annotated

import typer


def runs(
    folder: Annotated[
        str, typer.Argument(metavar="[FOLDER]", help="Where to look, at any depth.")
    ] = "runs",
    as_json: bool = False,
) -> None:
    """List runs: model, method, state, held-out loss and date."""
    from pathlib import Path

    from prefixtune_cli.cli import console
    from prefixtune_cli.run_list import list_runs

    found = list_runs(Path(folder).expanduser())
    if as_json:
        console.print_json([one.to_json() for one in found])
        return
    if not found:
        console.notice(f"There is no run below {folder}. `ptp train` makes them.")
        return
    rows = [
        [
            one.run,
            one.model or "-",
            one.method or "-",
            one.state,
            "-" if one.loss is None else f"{one.loss:.4f}",
            f"{one.date:%Y-%m-%d %H:%M}",
        ]
        for one in found
    ]
    console.print_table(["run", "model", "method", "state", "loss", "date"], rows)

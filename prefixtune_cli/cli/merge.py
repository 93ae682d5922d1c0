"""`ptp merge`: makes one adapter of several, or folds one into its base."""

from __future__ import annotations

from typing import Annotated

import typer

from prefixtune_cli.cli import lookup, typer_options
from prefixtune_cli.errors import UsageError

HOW, RESULT = "How", "Result"


def merge(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER", help="Runs of `ptp train`, or adapter folders."),
    ],
    out: Annotated[
        str,
        typer_options.option(
            "--out", "-o", panel=RESULT, metavar="FOLDER", help="The folder to write."
        ),
    ],
    model: Annotated[
        str | None,
        typer_options.option(
            "--model",
            "-m",
            panel=HOW,
            metavar="NAME",
            help="The base, if it has moved, or is not the one that the adapters name.",
            offers="model.name",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer_options.option(
            "--method",
            panel=HOW,
            metavar="NAME",
            help="linear (the default), ties, dare or task-arithmetic.",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer_options.option(
            "--weights",
            panel=HOW,
            metavar="W,…",
            help="One number an adapter; default: 1/n each for linear and dare, 1 each for ties and task-arithmetic.",
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer_options.option(
            "--density",
            panel=HOW,
            metavar="FRACTION",
            help="The share of an adapter's entries that ties and dare keep; default: 0.2.",
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            rich_help_panel=HOW,
            metavar="N",
            min=0,
            max=2**32 - 1,
            help="The seed for what dare drops.",
            show_default=False,
        ),
    ] = 0,
    into_base: Annotated[
        bool,
        typer_options.option(
            "--into-base",
            panel=HOW,
            help="Fold one adapter into its base, and write a plain model.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer_options.option(
            "--overwrite", panel=RESULT, help="Replace what an earlier merge wrote."
        ),
    ] = False,
    as_json: bool = False,
) -> None:
    """Make one adapter of several, or fold a LoRA into its base.

    For Prefix-Tuning+ and LoRA, linear and task-arithmetic are exact: the result acts as all adapters together, each
    with its weight. A merge loads no weights of the base.
    """
    given = _numbers(weights) if weights is not None else None
    if into_base:
        _check_one(adapters, {"--method": method, "--weights": weights, "--density": density})
    from pathlib import Path

    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.merge.folder import check_out
    from prefixtune_cli.merge.methods import checked_weights

    if not into_base:
        checked_weights(len(adapters), method or "linear", given, density)
    who = lookup.several(adapters, model, None)
    check_out(Path(out), who, overwrite=overwrite)
    console.quiet_libraries()
    from prefixtune_cli.merge.adapters import merge as merge_several
    from prefixtune_cli.merge.into_base import merge_into_base

    with reporter() as shown:
        if into_base:
            found = merge_into_base(who[0], out=out, overwrite=overwrite, reporter=shown)
        else:
            found = merge_several(
                who,
                out=out,
                method=method or "linear",
                weights=given,
                density=density,
                seed=seed,
                overwrite=overwrite,
                reporter=shown,
            )
    if as_json:
        console.print_json(found.to_json())
        return
    what = "model" if into_base else "adapter"
    print(f"{what} written to {found.folder} ({found.weights_bytes / 2**20:.1f} MiB)")
    print(f"next: {found.next_command}")


def _numbers(text: str) -> list[float]:
    found = []
    for part in text.split(","):
        try:
            found.append(float(part))
        except ValueError:
            raise UsageError(
                f"--weights must be numbers separated by commas, as in 0.7,0.3, got {part.strip()!r}."
            ) from None
    return found


def _check_one(adapters: list[str], others: dict[str, object]) -> None:
    if len(adapters) != 1:
        raise UsageError(
            f"--into-base takes one adapter, got {len(adapters)}. Merge them first, then fold the result."
        )
    if typed := [flag for flag, value in others.items() if value is not None]:
        raise UsageError(f"{typed[0]} belongs to a merge of several adapters. Leave it out.")

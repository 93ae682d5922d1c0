"""`ptp models`: lists the short names that `--model` knows."""

from __future__ import annotations


def models(as_json: bool = False) -> None:
    """List the short names of base models.

    --model also takes any other hub id, a folder, or a GGUF file.
    """
    from dataclasses import asdict

    from prefixtune_cli.cli import console
    from prefixtune_cli.recipe.aliases import MODELS

    if as_json:
        console.print_json([asdict(model) for model in MODELS])
        return
    rows = [
        [model.alias, model.hub_id, model.parameters, model.licence, "yes" if model.gated else "no"]
        for model in MODELS
    ]
    rows.insert(0, ["tiny", "(inside ptp)", "", "Apache-2.0", "no"])
    console.print_table(
        ["alias", "hub id", "parameters", "licence", "gated"],
        rows,
        optional=("licence", "gated", "parameters"),
    )

"""`ptp recipe-schema`: prints the recipe's JSON Schema."""

from __future__ import annotations


def recipe_schema() -> None:
    """Print the JSON Schema of recipes.

    An editor can complete and check recipes with it: `ptp recipe-schema > recipe.schema.json`.
    """
    from prefixtune_cli.cli import console
    from prefixtune_cli.recipe.schema import Recipe

    dialect = "https://json-schema.org/draft/2020-12/schema"
    console.print_json({"$schema": dialect, **Recipe.model_json_schema()})

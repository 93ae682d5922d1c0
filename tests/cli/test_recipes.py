"""`ptp recipes`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import RecipeError
from prefixtune_cli.recipe.load import difference, resolve, shipped

RECIPES = Path(__file__).parents[2] / "recipes"
ptp = CliRunner()


def test_every_file_in_recipes_is_listed_with_a_description() -> None:
    files = {
        path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.glob("*.yaml")
    }
    rows = json.loads(ptp.invoke(app, ["recipes", "--json"]).stdout)
    assert {row["name"] for row in rows} == files
    assert all(len(row["description"]) > 20 for row in rows)


def test_the_list_for_people_is_a_line_for_each_recipe() -> None:
    lines = ptp.invoke(app, ["recipes"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["recipe", *shipped()]


def test_a_printed_recipe_is_a_recipe(tmp_path: Path) -> None:
    copy = tmp_path / "mine.yaml"
    copy.write_text(ptp.invoke(app, ["recipes", "quickstart"]).stdout)
    assert resolve(str(copy)) == resolve("quickstart")


def test_the_baseline_differs_from_the_quickstart_by_its_method_alone() -> None:
    """Otherwise `ptp compare` would refuse the two runs."""
    one, other = resolve("quickstart"), resolve("lora-baseline")
    assert {line.split(".")[0] for line in difference(one, other)} == {"adapter"}


def test_an_unknown_recipe_is_refused() -> None:
    found = ptp.invoke(app, ["recipes", "quickstrat"])
    assert isinstance(found.exception, RecipeError)
    with pytest.raises(RecipeError, match="Did you mean quickstart"):
        raise found.exception

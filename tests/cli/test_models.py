"""`ptp models`."""

import json

from typer.testing import CliRunner

from prefixtune_cli.cli.app import app
from prefixtune_cli.recipe.aliases import MODELS, resolve

ptp = CliRunner()


def test_json_holds_every_alias_and_what_it_stands_for() -> None:
    rows = json.loads(ptp.invoke(app, ["models", "--json"]).stdout)
    assert {row["alias"]: row["hub_id"] for row in rows} == {
        model.alias: resolve(model.alias) for model in MODELS
    }


def test_the_table_has_a_line_for_tiny_and_each_alias() -> None:
    lines = ptp.invoke(app, ["models"]).stdout.splitlines()
    assert [line.split()[0] for line in lines] == [
        "alias",
        "tiny",
        *(model.alias for model in MODELS),
    ]


def test_the_table_says_which_models_are_gated() -> None:
    lines = ptp.invoke(app, ["models"]).stdout.splitlines()
    gated = {line.split()[0] for line in lines if line.split()[-1] == "yes"}
    assert gated == {model.alias for model in MODELS if model.gated}
    assert "llama2-7b-chat" in gated

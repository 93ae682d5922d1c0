"""`ptp recipe-schema`: the schema with which an editor completes recipes."""

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from prefixtune_cli.cli.app import app
from prefixtune_cli.recipe.schema import Recipe

ptp = CliRunner()


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(ptp.invoke(app, ["recipe-schema"]).stdout)
    return found


def test_it_names_its_dialect_and_every_section(schema: dict[str, Any]) -> None:
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(schema["properties"]) == set(Recipe.model_fields)


def test_every_section_forbids_unknown_keys(schema: dict[str, Any]) -> None:
    sections = [schema, *(found for found in schema["$defs"].values() if "properties" in found)]
    assert len(sections) == 10
    assert all(section["additionalProperties"] is False for section in sections)


def test_an_editor_can_choose_the_adapter_by_its_method(schema: dict[str, Any]) -> None:
    names = {of["$ref"].rpartition("/")[2] for of in schema["properties"]["adapter"]["oneOf"]}
    methods = {name: schema["$defs"][name]["properties"]["method"] for name in names}
    own = {found["const"] for name, found in methods.items() if name != "Peft"}
    assert own == {"prefix-tuning-plus", "lora", "prefix-tuning", "full"}
    assert set(methods["Peft"]["not"]["enum"]) == own


def test_choices_and_descriptions_are_in_it(schema: dict[str, Any]) -> None:
    bits = schema["$defs"]["ModelSection"]["properties"]["bits"]
    assert bits["enum"] == [4, 8, 16, 32]
    assert "bitsandbytes" in bits["description"]

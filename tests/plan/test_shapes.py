"""The shapes of well-known models: each gives a model with as many parameters as its page says."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from prefixtune_cli.recipe.aliases import MODELS
from prefixtune_cli.recipe.shapes import SHAPES, shape

ENTRIES = json.loads(SHAPES.read_text(encoding="utf-8"))
# How many parameters each model has, as in 7.2B.
PARAMETERS = {hub_id: entry["parameters"] for entry in ENTRIES for hub_id in entry["hub_ids"]}
FIRST_OF_EACH = {str(shape(hub_id)): hub_id for hub_id in reversed(PARAMETERS)}


def test_every_alias_has_a_shape_of_the_parameters_that_ptp_models_tells() -> None:
    assert {model.hub_id: model.parameters for model in MODELS}.items() <= PARAMETERS.items()


@pytest.mark.parametrize("hub_id", FIRST_OF_EACH.values())
def test_a_shape_builds_a_model_of_its_parameters(hub_id: str) -> None:
    said = PARAMETERS[hub_id]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**(shape(hub_id) or {})))
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    decimals = len(said.removesuffix("B").split(".")[1])
    assert f"{billions:.{decimals}f}B" == said


def test_shapes_are_found_whatever_the_case_and_unknown_ones_are_none() -> None:
    assert shape("QWEN/qwen3-8b") == shape("Qwen/Qwen3-8B")
    assert shape("some-org/some-model") is None

"""What to change if a recipe does not fit: each flag has the effect that the plan names."""

from __future__ import annotations

import shlex
from typing import Any

import pytest

from prefixtune_cli.cli.arguments import parse_layers
from prefixtune_cli.cli.flags import FLAGS
from prefixtune_cli.plan import Planner, remedies, with_method
from prefixtune_cli.recipe.schema import Recipe
from tests.plan.conftest import MakeRecipe

KEYS = {flag.parameter: flag.key for flag in FLAGS if flag.key}


def typed(recipe: Recipe, flag: str) -> Recipe:
    """The recipe after a user types the flags."""
    words = iter(shlex.split(flag))
    for word in words:
        name = word.removeprefix("--").replace("-", "_")
        section, key = KEYS[name].split(".")
        if name == "method":
            recipe = with_method(recipe, next(words))
            continue
        value: Any = True if name == "gradient_checkpointing" else next(words)
        value = parse_layers(value) if name == "layers" else value
        value = int(value) if isinstance(value, str) and value.isdecimal() else value
        changed = getattr(recipe, section).model_copy(update={key: value})
        recipe = recipe.model_copy(update={section: changed})
    return recipe


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "full"])
def test_each_remedy_takes_what_it_says_when_it_is_typed(method: str, recipe: MakeRecipe) -> None:
    asked = with_method(recipe(data={"max_length": 256}, train={"batch_size": 6}), method)
    before = Planner(asked).parts().total
    found = remedies(asked, available_bytes=before - 1)
    assert found
    for remedy in found:
        after = Planner(typed(asked, remedy.flag)).parts().total
        assert remedy.total_bytes == after
        assert remedy.saves_bytes == before - after > 0
        assert remedy.fits is (after <= before - 1)


def test_a_smaller_batch_keeps_the_rows_of_an_optimizer_step(recipe: MakeRecipe) -> None:
    asked = recipe(train={"batch_size": 6, "gradient_accumulation": 2})
    batches = [r for r in remedies(asked, available_bytes=1) if r.flag.startswith("--batch-size")]
    assert batches
    for remedy in batches:
        train = typed(asked, remedy.flag).train
        assert train.batch_size * train.gradient_accumulation == 12


def test_kto_keeps_two_rows(recipe: MakeRecipe) -> None:
    asked = recipe(train={"objective": "kto", "batch_size": 6})
    flags = [remedy.flag for remedy in remedies(asked, available_bytes=1)]
    assert any("--batch-size 2 --gradient-accumulation 3" in flag for flag in flags)
    assert not any("--batch-size 1 " in flag for flag in flags)
    planner = Planner(asked)
    assert planner.largest_batch(planner.parts(2).total) == 2
    assert planner.largest_batch(planner.parts(2).total - 1) == 0


def test_the_first_fits_and_changes_least(recipe: MakeRecipe) -> None:
    asked = recipe({"num_hidden_layers": 3}, data={"max_length": 512})
    checkpointed = Planner(asked).parts(checkpointing=True).total
    found = remedies(asked, available_bytes=checkpointed)
    assert found[0].flag == "--gradient-checkpointing"
    assert found[0].fits
    fits = [remedy.fits for remedy in found]
    assert fits == sorted(fits, reverse=True)
    tighter = remedies(asked, available_bytes=checkpointed - 1)
    assert tighter[0].flag != "--gradient-checkpointing"
    assert tighter[0].fits


def test_where_nothing_fits_the_largest_saving_is_first(recipe: MakeRecipe) -> None:
    found = remedies(recipe(), available_bytes=1)
    totals = [remedy.total_bytes for remedy in found]
    assert totals == sorted(totals)
    assert not any(remedy.fits for remedy in found)
    assert (
        found[0].flag
        == "--gradient-checkpointing --batch-size 1 --gradient-accumulation 8 --bits 4"
    )


def test_without_a_gpu_savings_are_told_and_nothing_is_said_of_fitting(recipe: MakeRecipe) -> None:
    found = remedies(recipe(model={"device": "cpu"}))
    assert found
    assert all(remedy.fits is None and (remedy.saves_bytes or 0) > 0 for remedy in found)


def test_a_base_that_cannot_be_planned_still_gets_advice(recipe: MakeRecipe) -> None:
    found = remedies(recipe({"num_attention_heads": 3}))
    assert [remedy.flag for remedy in found][:2] == [
        "--gradient-checkpointing",
        "--batch-size 1 --gradient-accumulation 8",
    ]
    assert all(remedy.total_bytes is None for remedy in found)

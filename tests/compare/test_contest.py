"""The contestants and their recipes."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.compare.contest import (
    DEFAULT_METHODS,
    Entry,
    Settings,
    entries,
    learning_rates,
)
from prefixtune_cli.compare.grids import parse_grids, split
from prefixtune_cli.errors import RecipeError, UsageError


def contest(
    methods: tuple[str, ...] = DEFAULT_METHODS,
    grids: dict[str, list[Any]] | None = None,
    sets: tuple[str, ...] = (),
    **flags: Any,
) -> list[Entry]:
    return entries(Settings("quickstart", sets, flags, methods, grids or {}))


def test_all_methods_share_everything_but_their_own_settings_and_rate() -> None:
    found = contest(train={"batch_size": 4})
    assert [entry.method for entry in found] == list(DEFAULT_METHODS)
    first = found[0].recipe
    for entry in found:
        same = {"adapter": first.adapter, "train": first.train}
        assert entry.recipe.model_copy(update=same) == first
        ours = {"learning_rate": 1.0, "save_minutes": 10.0}
        assert entry.recipe.train.model_copy(update=ours) == first.train.model_copy(update=ours)
    assert {entry.recipe.train.learning_rate for entry in found} == {None}, "the base's width tells"


def test_on_pairs_of_answers_full_is_left_out_unless_it_is_typed() -> None:
    settings = Settings(flags={"train": {"objective": "dpo"}, "data": {"train": "pairs.jsonl"}})
    assert [entry.method for entry in entries(settings)] == list(DEFAULT_METHODS[:-1])
    with pytest.raises(RecipeError, match="does not go with method full"):
        entries(replace(settings, methods=("lora", "full")))
    by_grid = Settings(grids={"train.objective": ["orpo"], "train.beta": [0.1, 0.2]})
    assert len(entries(by_grid)) == 2 * len(DEFAULT_METHODS[:-1])
    folders = {
        str(settings.folder(entries(replace(settings, methods=methods))[0].recipe))
        for methods in (None, ("lora",))
    }
    assert folders == {"compare/tiny-pairs-dpo"}


def test_contestants_share_the_objective_and_pairs_have_no_classes() -> None:
    with pytest.raises(UsageError, match="The objectives dpo and simpo share no figure"):
        contest(("lora",), {"train.objective": ["dpo", "simpo"]})
    with pytest.raises(UsageError, match="--few-shot draws rows of each class"):
        entries(Settings(flags={"train": {"objective": "simpo"}}, methods=("lora",), few_shot=1))
    assert len(contest(("lora",), {"train.beta": [0.1, 0.5]}, train={"objective": "dpo"})) == 2


def test_a_recipe_that_goes_on_from_an_adapter_is_refused() -> None:
    with pytest.raises(UsageError, match="trains fresh adapters"):
        contest(train={"start_from": "runs/mine"})


def test_the_sweep_has_as_many_rates_for_everyone_around_its_own() -> None:
    for one in contest():
        recipe = one.recipe.with_learning_rate(192)
        own = recipe.train.learning_rate
        assert learning_rates(recipe, 1) == [own]
        low, middle, high = learning_rates(recipe, 3)
        assert middle == own
        assert math.isclose(high / own, 10**0.5, rel_tol=0.02)
        assert math.isclose(own / low, 10**0.5, rel_tol=0.02)
        assert len(set(learning_rates(recipe, 4))) == 4
        assert own in learning_rates(recipe, 4)


def test_a_grid_makes_contestants_of_the_methods_that_have_the_setting() -> None:
    found = contest(
        ("prefix-tuning-plus", "lora"),
        parse_grids(["adapter.layers=all,last:2", "adapter.r=8,16"])
        | {"adapter.feature_map": ["elu", "gelu"]},
    )
    assert [entry.label for entry in found] == [
        "prefix-tuning-plus layers=all elu",
        "prefix-tuning-plus layers=all gelu",
        "prefix-tuning-plus layers=last:2 elu",
        "prefix-tuning-plus layers=last:2 gelu",
        "lora r=8",
        "lora r=16",
    ]
    assert found[-1].recipe.adapter.model_dump()["r"] == 16
    assert len({entry.folder for entry in found}) == len(found)


def test_a_grid_over_a_shared_setting_goes_to_all_methods() -> None:
    found = contest(("prefix-tuning-plus", "full"), parse_grids(["train.epochs=1,2.5"]))
    assert [entry.recipe.train.epochs for entry in found] == [1, 2.5, 1, 2.5]
    assert found[1].label == "prefix-tuning-plus epochs=2.5"


def test_a_typed_setting_of_the_adapter_goes_to_the_methods_that_have_it() -> None:
    found = contest(
        ("prefix-tuning-plus", "lora"), sets=("adapter.r=4",), adapter={"layers": "last:3"}
    )
    assert found[0].recipe.adapter.model_dump()["layers"] == "last:3"
    assert found[1].recipe.adapter.model_dump()["r"] == 4


def test_a_method_may_stand_with_settings_of_its_own_and_several_times() -> None:
    typed = "lora, lora(r=4,target_modules=[q_proj,v_proj]),prefix-tuning-plus(sites=ffn)"
    found = contest(tuple(split(typed)), {"adapter.r": [2, 8]})
    assert [entry.label for entry in found] == [
        "lora r=2",
        "lora r=8",
        "lora r=4 target_modules=[q_proj,v_proj]",
        "prefix-tuning-plus ffn",
    ]
    assert found[2].recipe.adapter.model_dump()["target_modules"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize("method", ["lora(r=4", "lora(r)", "lora(=4)"])
def test_settings_of_another_form_are_refused(method: str) -> None:
    with pytest.raises(UsageError, match="--methods takes"):
        contest((method,))


def test_a_setting_that_the_method_does_not_have_is_refused_by_the_recipe() -> None:
    with pytest.raises(RecipeError, match=r"adapter\.layers belongs to prefix-tuning-plus"):
        contest(("lora(layers=all)",))


def test_values_of_a_grid_are_yaml_and_a_list_is_one_value() -> None:
    grids = parse_grids(["adapter.layers=all,[0, 1],[4,5]", "train.packing=true,false"])
    assert grids == {"adapter.layers": ["all", [0, 1], [4, 5]], "train.packing": [True, False]}


def test_a_cell_has_its_own_seed_rate_files_and_folder_and_no_renamed_columns() -> None:
    entry = contest(("lora",), data={"train": "my.csv", "map": {"prompt": "text"}})[0]
    cell = entry.cell(7, 1e-4, "out", {"train": "a.jsonl", "eval": "b.jsonl"})
    assert (cell.train.seed, cell.train.learning_rate, cell.out) == (7, 1e-4, "out")
    assert (cell.data.train, cell.data.eval, cell.data.map) == ("a.jsonl", "b.jsonl", {})


@pytest.mark.parametrize(
    ("methods", "grids", "said"),
    [
        ((), {}, "--methods names none"),
        (("lora",), {"adapter.layers": ["all"]}, "adapter.layers is a setting of none"),
        (("lora",), {"adapter.r": [8, 8]}, "name lora r=8 twice"),
        (("lora", "lora"), {}, "name lora twice"),
    ],
)
def test_what_is_no_contest_is_refused(
    methods: tuple[str, ...], grids: dict[str, list[Any]], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        contest(methods, grids)


def test_two_spellings_of_one_run_are_refused() -> None:
    with pytest.raises(UsageError, match="are the same run"):
        contest(("lora",), {"adapter.alpha": [32, 32.0]})


@pytest.mark.parametrize("text", ["adapter.r", "r=8,16", "adapter.r="])
def test_a_grid_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"--grid takes section\.key=value"):
        parse_grids([text])


@pytest.mark.parametrize(
    "key",
    [
        "train.seed",
        "train.gpus",
        "data.train",
        "data.max_length",
        "model.bits",
        "evaluate.max_rows",
    ],
)
def test_what_a_comparison_keeps_equal_is_no_grid(key: str) -> None:
    with pytest.raises(UsageError, match=f"--grid {key} makes no fair comparison"):
        parse_grids([f"{key}=1,2"])


def test_costs_may_be_compared_over_what_they_depend_on() -> None:
    given = ["data.max_length=128,512", "model.bits=4,16", "adapter.r=8,16"]
    assert list(parse_grids(given, speed=True)) == ["data.max_length", "model.bits", "adapter.r"]


@pytest.mark.parametrize(
    "key",
    ["train.learning_rate", "train.epochs", "train.seed", "data.train", "evaluate.max_rows"],
)
def test_what_no_cost_depends_on_is_refused_with_what_to_type(key: str) -> None:
    with pytest.raises(UsageError, match=rf"--speed takes no --grid {key}: .*data\.max_length"):
        parse_grids([f"{key}=1,2"], speed=True)


def test_a_rate_that_a_recipe_has_for_its_own_method_is_no_other_ones(tmp_path: Path) -> None:
    file = tmp_path / "tuned.yaml"
    file.write_text("adapter: {method: lora}\ntrain: {learning_rate: 0.02}\n", encoding="utf-8")
    found = entries(Settings(str(file), methods=("lora", "full")))
    assert [entry.recipe.train.learning_rate for entry in found] == [0.02, None]
    typed = entries(Settings(str(file), ("train.learning_rate=0.5",), methods=("lora", "full")))
    assert [entry.recipe.train.learning_rate for entry in typed] == [0.5, 0.5]


def test_settings_of_peft_go_to_the_methods_of_peft_that_have_them() -> None:
    found = contest(("lora", "prefix-tuning", "ia3"), sets=("adapter.config.use_dora=true",))
    given = [entry.recipe.adapter.model_dump().get("config") for entry in found]
    assert given == [{"use_dora": True}, {}, {}]


def test_labels_that_differ_have_folders_that_differ() -> None:
    found = contest(("lora",), {"adapter.target_modules": ["q|v", "q-v", "x" * 300]})
    folders = [entry.folder for entry in found]
    assert len(set(folders)) == 3
    assert max(map(len, folders)) < 120


def test_a_misspelt_method_is_told_with_the_one_that_is_meant() -> None:
    with pytest.raises(RecipeError, match="prefix-tuning-plus"):
        contest(("prefix-tunning-plus",))


def test_method_is_not_taken_where_methods_is_meant() -> None:
    with pytest.raises(UsageError, match="--methods in place of --method"):
        contest(("lora",), adapter={"method": "lora"})


@pytest.mark.parametrize("name", ["seeds", "sweep", "few_shot", "workers", "rounds", "adapters"])
def test_a_number_below_one_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be 1 or more, got 0"):
        entries(Settings("quickstart", **{name: 0}))

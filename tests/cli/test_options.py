"""The table from flags to recipe keys, against the schema that it points into."""

import inspect
import re

import pytest

from prefixtune_cli.cli import options, typed
from prefixtune_cli.cli.train import train
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.errors import DataError, UsageError
from prefixtune_cli.recipe.explain import METHODS, keys
from prefixtune_cli.recipe.schema import DataSection, Recipe

# The parameters of `ptp train` that are about this run of the command, not about the recipe.
NO_SETTINGS = {
    "recipe",
    "sets",
    "resume",
    "overwrite",
    "as_json",
    "find_learning_rate",
    "nodes",
    "node_rank",
    "rendezvous",
}


def test_every_flag_points_at_a_key_of_the_schema() -> None:
    known = {key for method in METHODS for key in keys(method)}
    assert set(typed.KEYS.values()) <= known


def test_every_flag_of_train_is_in_the_table_and_the_other_way_round() -> None:
    assert set(inspect.signature(train).parameters) - NO_SETTINGS == set(typed.KEYS)


def test_no_flag_of_train_has_a_default_of_its_own() -> None:
    parameters = inspect.signature(train).parameters
    assert all(parameters[name].default is None for name in typed.KEYS)


@pytest.mark.parametrize(
    ("option", "field"),
    [
        (options.Bits, Recipe.model_fields["model"].annotation.model_fields["bits"]),
        (options.Attention, Recipe.model_fields["model"].annotation.model_fields["attention"]),
        (options.Format, Recipe.model_fields["data"].annotation.model_fields["format"]),
        (options.TrainOn, Recipe.model_fields["data"].annotation.model_fields["train_on"]),
        (options.OnLong, Recipe.model_fields["data"].annotation.model_fields["on_long"]),
        (options.FeatureMap, METHODS["prefix-tuning-plus"].model_fields["feature_map"]),
        (options.Sites, METHODS["prefix-tuning-plus"].model_fields["sites"]),
        (options.ShareHeads, METHODS["prefix-tuning-plus"].model_fields["share_heads"]),
        (options.Device, Recipe.model_fields["model"].annotation.model_fields["device"]),
        (options.Parallel, Recipe.model_fields["train"].annotation.model_fields["parallel"]),
        (options.Track, Recipe.model_fields["train"].annotation.model_fields["track"]),
    ],
)
def test_a_flags_help_names_every_choice_of_the_schema(option: object, field: object) -> None:
    (info,) = option.__metadata__
    choices = field.annotation.__args__
    assert len(choices) > 1
    assert all(str(choice) in info.help for choice in choices)


def test_the_help_of_method_names_every_method() -> None:
    (info,) = options.Method.__metadata__
    assert all(method in info.help for method in METHODS)


def test_overrides_hold_what_was_given_and_nothing_else() -> None:
    given = {"model": "tiny", "bits": None, "packing": False, "lora_r": 4, "resume": True}
    assert typed.overrides(given) == {
        "model": {"name": "tiny"},
        "train": {"packing": False},
        "adapter": {"r": 4},
    }


def test_map_is_given_at_once_or_several_times() -> None:
    assert typed.parse_map(["prompt=q, completion=a", "messages=m"]) == {
        "prompt": "q",
        "completion": "a",
        "messages": "m",
    }


def test_a_column_with_spaces_around_its_name_can_be_mapped(tmp_path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("prompt, answer \na,b\n")
    wrong = DataSection(map={"completion": "answer"})
    with pytest.raises(DataError, match="Did you mean --map 'completion= answer '") as caught:
        load_rows(str(file), wrong)
    (typed_so,) = re.findall("--map '(.*?)'", str(caught.value))
    assert len(load_rows(str(file), DataSection(map=typed.parse_map([typed_so])))) == 1


@pytest.mark.parametrize("given", ["prompt", "=a", "prompt=", "a=b,", ""])
def test_a_map_without_both_sides_is_a_usage_error(given: str) -> None:
    with pytest.raises(UsageError, match="--map takes FIELD=COLUMN"):
        typed.parse_map([given])


def test_a_field_that_is_mapped_twice_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--map names the field 'prompt' twice"):
        typed.parse_map(["prompt=a", "prompt=b"])


@pytest.mark.parametrize(
    ("given", "layers"),
    [("all", "all"), ("last:4", "last:4"), ("3", [3]), ("0,1, 5", [0, 1, 5]), ("[0,1]", [0, 1])],
)
def test_layers_are_words_or_a_list(given: str, layers: object) -> None:
    assert typed.parse_layers(given) == layers


@pytest.mark.parametrize(
    ("given", "gpus"),
    [("4", 4), ("auto", "auto"), ("0,2", [0, 2]), ("1,", [1]), ("[0, 1]", [0, 1]), ("all", "all")],
)
def test_gpus_are_a_number_a_word_or_a_list(given: str, gpus: object) -> None:
    assert typed.parse_gpus(given) == gpus


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--resume"], ["--resume=must"]),
        (["--resume", "--out", "a"], ["--resume=must", "--out", "a"]),
        (["--out", "a", "--resume", "auto"], ["--out", "a", "--resume", "auto"]),
        (["--overwrite"], ["--overwrite"]),
    ],
)
def test_resume_may_stand_alone(given: list[str], read: list[str]) -> None:
    assert typed.with_resume_value(given) == read

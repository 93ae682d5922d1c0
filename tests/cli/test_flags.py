"""The table of flags, against the schema that its keys name."""

import inspect
import re
from typing import Any

import pytest

from prefixtune_cli.cli import app, arguments, typer_options
from prefixtune_cli.cli.flags import FLAGS, Flag
from prefixtune_cli.compare import contest
from prefixtune_cli.compare.speed.turn import Shape
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.errors import DataError, UsageError
from prefixtune_cli.recipe import settings
from prefixtune_cli.recipe.explain import METHODS, keys
from prefixtune_cli.recipe.schema import DataSection

WITH_CHOICES = [
    flag
    for flag in FLAGS
    if flag.key not in (None, "model.name") and len(settings.values(flag.key)) > 1
]


def spelled_out(command: str) -> dict[str, Any]:
    """Typer's view of each parameter of a command: its type and its option."""
    parameters = inspect.signature(typer_options.for_typer(app.COMMANDS[command])).parameters
    return {name: parameter.annotation.__metadata__[0] for name, parameter in parameters.items()}


def test_every_flag_points_at_a_key_of_the_schema() -> None:
    known = {key for method in METHODS for key in keys(method)}
    assert {flag.key for flag in FLAGS} - {None} <= known


def test_no_two_flags_have_a_name_a_parameter_or_a_key_in_common() -> None:
    names = [name for flag in FLAGS for name in flag.names.replace("/", " ").split()]
    for told in (names, [f.parameter for f in FLAGS], [f.key for f in FLAGS if f.key]):
        assert len(set(told)) == len(told)


def test_train_and_plan_take_the_whole_table_and_compare_leaves_out_what_it_decides() -> None:
    table = {flag.parameter for flag in FLAGS}
    assert set(spelled_out("train")) == table
    assert set(spelled_out("plan")) == table | {"gpu_memory"}
    assert table - set(spelled_out("compare")) >= {
        "method",
        "resume",
        "nodes",
        "track",
        "find_learning_rate",
    }


def test_no_flag_of_train_has_a_default_of_its_own() -> None:
    parameters = inspect.signature(typer_options.for_typer(app.COMMANDS["train"])).parameters
    assert all(parameters[flag.parameter].default is None for flag in FLAGS if flag.key)


@pytest.mark.parametrize("flag", WITH_CHOICES, ids=lambda flag: flag.parameter)
def test_a_flags_help_names_every_choice_of_the_schema(flag: Flag) -> None:
    told = spelled_out("train")[flag.parameter].help
    assert all(choice in told for choice in settings.values(flag.key))


def test_a_flag_has_its_type_and_description_from_the_schema() -> None:
    assert [settings.kind(key) for key in ("model.bits", "train.epochs", "train.packing")] == [
        int, float, bool,
    ]  # fmt: skip
    assert [settings.kind(key) for key in ("train.gpus", "data.map", "adapter.preset")] == [
        str, list[str], str,
    ]  # fmt: skip
    assert settings.told("adapter.r") == "LoRA: rank."
    assert settings.told("data.on_long") == (
        "What to do with longer examples: truncate, drop or error."
    )


@pytest.mark.parametrize("flag", FLAGS, ids=lambda flag: flag.parameter)
def test_every_flag_is_described(flag: Flag) -> None:
    told = spelled_out("train")[flag.parameter].help
    assert re.match(r".{10,}\.(  \[default: .+\])?$", told)


def test_what_was_given_holds_what_was_typed_and_nothing_else() -> None:
    by_name = {flag.name: flag for flag in FLAGS}
    values = {
        "--model": "tiny",
        "--bits": None,
        "--packing": False,
        "--lora-r": 4,
        "--set": ["a=b"],
    }
    given = arguments.Given({by_name[name]: value for name, value in values.items()})
    assert given == {"model": "tiny", "packing": False, "lora_r": 4, "set": ["a=b"]}
    assert given.settings == {
        "model": {"name": "tiny"},
        "train": {"packing": False},
        "adapter": {"r": 4},
    }


def test_map_is_given_at_once_or_several_times() -> None:
    assert arguments.parse_map(["prompt=q, completion=a", "messages=m"]) == {
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
    assert len(load_rows(str(file), DataSection(map=arguments.parse_map([typed_so])))) == 1


@pytest.mark.parametrize("given", ["prompt", "=a", "prompt=", "a=b,", ""])
def test_a_map_without_both_sides_is_a_usage_error(given: str) -> None:
    with pytest.raises(UsageError, match="--map takes FIELD=COLUMN"):
        arguments.parse_map([given])


def test_a_field_that_is_mapped_twice_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="--map names the field 'prompt' twice"):
        arguments.parse_map(["prompt=a", "prompt=b"])


@pytest.mark.parametrize(
    ("given", "layers"),
    [("all", "all"), ("last:4", "last:4"), ("3", [3]), ("0,1, 5", [0, 1, 5]), ("[0,1]", [0, 1])],
)
def test_layers_are_words_or_a_list(given: str, layers: object) -> None:
    assert arguments.parse_layers(given) == layers


@pytest.mark.parametrize(
    ("given", "gpus"),
    [("4", 4), ("auto", "auto"), ("0,2", [0, 2]), ("1,", [1]), ("[0, 1]", [0, 1]), ("all", "all")],
)
def test_gpus_are_a_number_a_word_or_a_list(given: str, gpus: object) -> None:
    assert arguments.parse_gpus(given) == gpus


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
    assert arguments.with_resume_value(given) == read


def test_the_numbers_in_compares_help_are_its_defaults() -> None:
    told = {name: flag.help for name, flag in spelled_out("compare").items()}
    for name, number in (
        ("seeds", contest.Settings.seeds),
        ("sweep", contest.Settings.sweep),
        ("rounds", Shape.rounds),
        ("prompts", Shape.prompts),
        ("adapters", Shape.adapters),
    ):
        assert f": {number}." in told[name]

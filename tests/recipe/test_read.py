"""YAML with the scalars of YAML 1.2, and the line of every key."""

import pytest

from prefixtune_cli.errors import RecipeError
from prefixtune_cli.recipe import read


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2E3", 2000.0),
        (".5", 0.5),
        ("10_000", 10_000),
        ("no", "no"),
        ("12:30", "12:30"),
        ("2020-01-01", "2020-01-01"),
        ("007", "007"),
        ("true", True),
        ("", None),
        ("null", None),
        ("[0, 1e-2]", [0, 0.01]),
        ("last:2", "last:2"),
    ],
)
def test_scalars_are_what_they_look_like(text: str, value: object) -> None:
    found = read.parse_value(text, "x")
    assert found == value
    assert type(found) is type(value)


def test_every_key_knows_its_line() -> None:
    parsed = read.parse(
        "# note\nmodel:\n  name: tiny\ndata:\n  map: {no: a,\n    1: b}\n", "r.yaml"
    )
    assert parsed.values == {"model": {"name": "tiny"}, "data": {"map": {"no": "a", "1": "b"}}}
    assert parsed.lines == {
        "model": 2, "model.name": 3, "data": 4, "data.map": 5, "data.map.no": 5, "data.map.1": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n\tseed: 1\n", "r.yaml:2: the line is indented by a tab; YAML takes spaces only."),
        ("train:\n  seed: 1\n\tepochs: 2\n", "r.yaml:3: the line is indented by a tab"),
        ("a: 1\nb: 2\na: 3\n", "r.yaml:3: a occurs twice; the first is on line 1"),
        ("t:\n  a: 1\n  a: 3\n", "r.yaml:3: t.a occurs twice; the first is on line 2"),
        ("- a\n", "r.yaml must hold sections such as `train:`, got a list."),
        ("words\n", "r.yaml must hold sections such as `train:`, got only 'words'."),
        ("a: [1\n", "r.yaml:2: this is not YAML"),
        ("a: b: c\n", "r.yaml:1: this is not YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "r.yaml:2: this is not YAML"),
        ("a: !!python/object:os.system x\n", "r.yaml:1: this is not YAML: could not determine"),
        ("a: !!int x\n", "r.yaml cannot be read as YAML: invalid literal"),
        ("? [a]\n: b\n", "r.yaml:1: this is not YAML: a key must be text"),
        ("a: &x {b: *x}\n", "r.yaml has an alias (*) inside its own anchor (&)."),
        ("a: \x00\n", "r.yaml cannot be read as YAML: unacceptable character"),
    ],
)
def test_what_is_not_a_recipe_is_told_with_its_line(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read.parse(text, "r.yaml")
    assert str(caught.value).startswith(message)


def test_several_doubled_keys_are_told_together() -> None:
    with pytest.raises(RecipeError) as caught:
        read.parse("a: 1\na: 2\nb: 1\nb: 2\n", "r.yaml")
    assert str(caught.value).splitlines() == [
        "2 problems:",
        "  r.yaml:2: a occurs twice; the first is on line 1",
        "  r.yaml:4: b occurs twice; the first is on line 3",
    ]


def test_an_empty_file_holds_no_settings() -> None:
    assert read.parse("# nothing yet\n", "r.yaml").values == {}


def test_a_value_that_is_not_yaml_is_told() -> None:
    with pytest.raises(RecipeError, match=r"--set a: '\[1' cannot be read as a YAML value"):
        read.parse_value("[1", "--set a")


def test_written_values_are_read_back_unchanged() -> None:
    values = {
        "text": [
            "1e-4",
            "yes",
            "no",
            "12:30",
            "2020-01-01",
            "0x1F",
            "1_0",
            "007",
            "~",
            "",
            "é\n x",
        ],
        "numbers": [1e-5, 1e22, 0.1, 3.0, 3, -7],
        "others": [None, True, False],
        "map": {"no": "on", "1": "2"},
    }
    assert read.parse(read.write(values), "x").values == values

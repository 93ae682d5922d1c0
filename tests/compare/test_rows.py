"""The rows of a comparison."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.compare.comparison import OOD, TEST
from prefixtune_cli.compare.rows import TRAIN, VALIDATION, Rows, draw_rows
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.errors import DataError
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import DataSection
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train.prepare import prepare_data

CLASSES = ("red", "green", "blue")


def write(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(
        tmp_path / "data.jsonl",
        [{"prompt": f"question {i}", "completion": CLASSES[i % 3]} for i in range(90)],
    )


def drawn(data: Path, folder: Path, seeds: tuple[int, ...] = (0, 1), **how: Any) -> Rows:
    section = {"train": str(data), **how.pop("section", {})}
    recipe = resolve(flags={"data": section, "evaluate": {"max_rows": how.pop("max_rows", 500)}})
    given = {"few_shot": None, "ood": None, **how}
    return draw_rows(recipe, folder, seeds, reporter=Silent(), **given)


def rows(file: Path) -> list[str]:
    return file.read_text(encoding="utf-8").splitlines()


def test_training_validation_and_test_rows_have_none_in_common(data: Path, tmp_path: Path) -> None:
    found = drawn(data, tmp_path / "out")
    parts = [rows(found.train[0]), rows(found.validation), rows(found.test)]
    assert [len(part) for part in parts] == [77, 9, 4]
    assert sorted(row for part in parts for row in part) == sorted(rows(data))
    assert found.train[0] == found.train[1]
    assert [found.about[name]["rows"] for name in (TRAIN, VALIDATION, TEST)] == [77, 9, 4]


def test_the_test_rows_are_those_that_train_holds_out(data: Path, tmp_path: Path) -> None:
    recipe = resolve(flags={"model": {"name": "tiny"}, "data": {"train": str(data)}})
    trained = prepare_data(recipe, load_tokenizer(recipe.model), Silent())
    prompts = [json.loads(row)["prompt"] for row in rows(drawn(data, tmp_path / "out").test)]
    assert prompts == [question.asked for question in trained.questions.asked]
    assert len(prompts) == 4  # of 90


def test_given_test_rows_are_the_test_rows(data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "test.jsonl", [{"prompt": "last", "completion": "red"}] * 2)
    found = drawn(data, tmp_path / "out", section={"eval": str(other)})
    assert rows(found.test) == rows(other)
    assert len(rows(found.train[0])) == 81


def test_no_more_validation_rows_than_are_scored(data: Path, tmp_path: Path) -> None:
    assert len(rows(drawn(data, tmp_path / "out", max_rows=3).validation)) == 3


@pytest.mark.parametrize("count", [1, 5])
def test_few_shot_takes_as_many_rows_of_each_class_and_others_for_each_seed(
    data: Path, tmp_path: Path, count: int
) -> None:
    found = drawn(data, tmp_path / "out", few_shot=count)
    assert found.about[TRAIN]["rows"] == 3 * count
    assert len(found.about[TRAIN]["sha256"]) == 2
    for file in found.train.values():
        answers = Counter(json.loads(row)["completion"] for row in rows(file))
        assert answers == dict.fromkeys(CLASSES, count)
    assert rows(found.train[0]) != rows(found.train[1])
    held_out = {*rows(found.validation), *rows(found.test)}
    assert not held_out & {*rows(found.train[0]), *rows(found.train[1])}


def test_the_same_rows_are_drawn_again(data: Path, tmp_path: Path) -> None:
    first, again = (drawn(data, tmp_path / name, few_shot=2) for name in "ab")
    assert first.about == again.about
    assert rows(first.train[1]) == rows(again.train[1])


def test_a_small_class_is_told(data: Path, tmp_path: Path) -> None:
    with data.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "p", "completion": "rare"}) + "\n")
    found = drawn(data, tmp_path / "out", few_shot=40)
    (notice,) = found.notices  # once, and not for every seed
    assert "classes have fewer than 40 rows" in notice


def test_answers_that_are_no_classes_are_refused(tmp_path: Path) -> None:
    data = write(
        tmp_path / "free.jsonl", [{"prompt": "p", "completion": f"answer {i}"} for i in range(30)]
    )
    with pytest.raises(DataError, match="different answers: they are no classes"):
        drawn(data, tmp_path / "out", few_shot=1)


def test_a_text_has_no_classes(tmp_path: Path) -> None:
    data = write(tmp_path / "text.jsonl", [{"text": f"words {i}"} for i in range(30)])
    with pytest.raises(DataError, match="needs answers"):
        drawn(data, tmp_path / "out", few_shot=1)


def test_columns_are_renamed_once_and_the_last_turn_of_a_chat_is_the_class(tmp_path: Path) -> None:
    def turns(i: int) -> list[dict[str, str]]:
        said = [("user", f"q{i}"), ("assistant", CLASSES[i % 3])]
        return [{"role": role, "content": content} for role, content in said]

    chat = write(tmp_path / "chat.jsonl", [{"dialog": turns(i)} for i in range(60)])
    section = {"map": {"messages": "dialog"}}
    found = drawn(chat, tmp_path / "out", few_shot=2, section=section)
    kept = [json.loads(row) for row in rows(found.train[0])]
    assert [list(row) for row in kept] == [["messages"]] * 6


def test_other_data_may_have_columns_of_its_own(data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [{"prompt": "p", "completion": "c"}])
    renamed = write(tmp_path / "named.jsonl", [{"q": "p", "a": "c"}] * 30)
    section = {"map": {"prompt": "q", "completion": "a"}}
    for ood in (other, renamed):
        found = drawn(renamed, tmp_path / ood.stem, ood=str(ood), section=section)
        assert found.ood is not None
        assert json.loads(rows(found.ood)[0]) == {"prompt": "p", "completion": "c"}
        assert found.about[OOD]["source"] == str(ood)


SAID = [
    {"role": "user", "content": "q", "name": "bob"},
    {"role": "assistant", "content": "no", "weight": 0},
    {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}], "weight": 1},
    {"role": "function_call", "content": "{}"},
]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "completion": "a", "system": "s"},
        {"instruction": "q", "output": "a", "history": [["b", "c"]], "system": "s", "tools": [{}]},
        {"instruction": "q", "output": "a", "history": [["b", "c"], ["d", "e"]]},
        {"instruction": "q", "input": "i", "output": "a"},
        {"messages": SAID, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "train": False}]},
        {"text": "t"},
    ],
)  # fmt: skip
def test_a_drawn_row_keeps_all_that_its_file_says(tmp_path: Path, row: dict[str, Any]) -> None:
    data = write(tmp_path / "data.jsonl", [row] * 30)
    found = drawn(data, tmp_path / "out")
    original, again = (load_rows(str(file), DataSection()) for file in (data, found.train[0]))
    columns = ["file", "line"]
    assert again.dataset.remove_columns(columns)[0] == original.dataset.remove_columns(columns)[0]


def said(*turns: tuple[str, str], **more: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content, **more} for role, content in turns]


ASKED = said(("user", "hello"), ("assistant", "hi"), ("user", "a colour?"))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a colour?", "chosen": "red", "rejected": "no", "system": "Be short."},
        {
            "prompt": ASKED,
            "chosen": said(("assistant", "red")),
            "rejected": said(("assistant", "no")),
        },
        {
            "chosen": [*ASKED, *said(("assistant", "red"))],
            "rejected": [*ASKED, *said(("assistant", "no"))],
        },
        {
            "prompt": ASKED,
            "chosen": said(("assistant", "red"), ("user", "and?"), ("assistant", "blue")),
            "rejected": said(("assistant", "red"), ("user", "and?"), ("assistant", "no")),
        },
        {
            "prompt": said(("system", "Be short."), ("user", "a colour?")),
            "chosen": [*said(("assistant", "red"), weight=0), *said(("user", "and?"))],
            "rejected": [*said(("assistant", "red"), weight=0), *said(("user", "so?"))],
        },
    ],
    ids=["texts", "messages", "conversations", "several turns", "no learned answer"],
)
def test_pairs_are_written_as_rows_that_read_the_same(row: dict[str, Any], tmp_path: Path) -> None:
    data = write(tmp_path / "pairs.jsonl", [row] * 30)
    section = {"train": str(data)}
    recipe = resolve(flags={"data": section, "train": {"objective": "dpo"}})
    found = draw_rows(recipe, tmp_path / "out", [0], few_shot=None, ood=None, reporter=Silent())
    first, again = (
        load_rows(str(file), DataSection(), kind="pairs").dataset[0] for file in (data, found.test)
    )
    for place in ("file", "line"):
        first.pop(place)
        again.pop(place)
    assert again == first

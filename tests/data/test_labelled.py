"""Answers that are labelled desirable or not: their formats, and the answers to other prompts beside them."""

from __future__ import annotations

import json

import pytest

from prefixtune_cli.cli.inspect_data import inspect_data as command
from prefixtune_cli.cli.typer_options import for_typer
from prefixtune_cli.data.format import as_written
from prefixtune_cli.data.inspect import check, facts
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import DataError, OtherRowsError
from prefixtune_cli.recipe.schema import DataSection

inspect_data = for_typer(command)
ROW = {"prompt": "What is up?", "completion": "Paris", "label": True}
ASKED = [{"role": "user", "content": "What is up?"}]
GOOD = [{"role": "assistant", "content": "Paris"}]
EARLIER = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
PAIR = {"prompt": "What is up?", "chosen": "Paris", "rejected": "A tree"}
TEXT = "<|im_start|>user\nWhat is up?<|im_end|>\n<|im_start|>assistant\nParis<|im_end|>"


def labelled(write, make_tokenizer, rows, template="chatml", **settings):
    section = DataSection(**settings)
    found = load_rows(write("a.jsonl", rows), section, kind="labelled")
    return tokenize(found, make_tokenizer(template), section)


def trained(tokenizer, row, labels="labels"):
    return tokenizer.decode([label for label in row[labels] if label != MASKED])


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (ROW, "labelled prompt-completion"),
        ({"prompt": ASKED, "completion": GOOD, "label": True}, "labelled prompt-completion of messages"),
        ({"messages": ASKED + GOOD, "label": True}, "labelled messages"),
        ({"messages": EARLIER + ASKED + GOOD, "label": True}, "labelled messages"),
        ({"conversations": ASKED + GOOD, "label": True}, "labelled conversations"),
        ({"instruction": "What is up?", "output": "Paris", "label": True}, "labelled alpaca"),
        ({"question": "What is up?", "answer": "Paris", "label": True}, "labelled question-answer"),
    ],
)  # fmt: skip
def test_every_format_with_a_label_gives_the_same_row(write, make_tokenizer, row, name):
    made = labelled(write, make_tokenizer, [row, row | {"label": False}])
    assert made.rows.format == name
    assert f"Format: {name} (recognised" in made.rows.notices[0]
    in_prompt = any("they stand in a prompt" in notice for notice in made.rows.notices)
    assert in_prompt == (len(row.get("messages", [])) > 2)
    tokenizer = make_tokenizer("chatml")
    assert [trained(tokenizer, one) for one in made.dataset] == ["Paris<|im_end|>"] * 2
    assert tokenizer.decode(made.dataset[0]["input_ids"]).strip().endswith(TEXT)
    assert made.dataset["desirable"] == [True, False]
    assert "1 answers are desirable, 1 are not" in facts(made.statistics)


@pytest.mark.parametrize(
    ("said", "label"),
    [(True, True), (False, False), (1, True), (0.0, False), ("True", True), (" false ", False), ("1", True)],
)  # fmt: skip
def test_labels_are_truth_values_as_files_write_them(write, said, label):
    rows = load_rows(write("a.jsonl", [ROW | {"label": said}]), DataSection(), kind="labelled")
    assert rows.dataset["desirable"] == [label]
    assert not [notice for notice in rows.notices if notice.startswith("Numbers")]


@pytest.mark.parametrize("said", ["good", 2, None, 0.5, [True]])
def test_any_other_label_is_refused_by_its_line(write, said):
    with pytest.raises(DataError) as caught:
        load_rows(write("a.jsonl", [ROW, ROW | {"label": said}]), DataSection(), kind="labelled")
    assert "a.jsonl, line 2: the column 'label' must say whether" in str(caught.value)
    assert "--map label=COLUMN" in str(caught.value)


def test_a_label_may_have_another_name(write, make_tokenizer):
    row = {"instruction": "What is up?", "output": "Paris", "kto_tag": False}
    made = labelled(write, make_tokenizer, [row, row], map={"label": "kto_tag"})
    assert made.rows.format == "labelled alpaca"
    assert made.dataset["desirable"] == [False, False]


@pytest.mark.parametrize(
    ("kind", "row", "settings", "told"),
    [
        ("answers", ROW, {}, "from which `ptp train --objective kto` learns"),
        ("answers", ROW, {}, "To learn all of them alike: --format prompt-completion."),
        ("pairs", ROW, {}, "or type --objective kto"),
        ("labelled", {"prompt": "a", "completion": "b"}, {}, "--objective kto learns from answers that are labelled"),
        ("labelled", {"prompt": "a", "completion": "b"}, {}, "or leave --objective out"),
        ("labelled", {"text": "a"}, {}, "or leave --objective out"),
        ("labelled", {"dialog": "a"}, {}, "--map prompt=COLUMN,completion=COLUMN,label=COLUMN"),
        ("answers", {"prompt": "a", "completion": "b", "tag": True}, {"map": {"label": "tag"}}, "--objective kto"),
        ("answers", ROW | {"label": "False"}, {}, "--objective kto"),
        ("answers", ROW | {"said": "b"}, {"map": {"prompt": "prompt", "completion": "said"}}, "--objective kto"),
        ("answers", ROW | {"tag": 1}, {"map": {"prompt": "prompt", "label": "tag"}}, "--objective kto"),
        ("labelled", {"prompt": "a", "completion": "b"}, {"map": {"label": "tag"}}, "a column that is missing"),
    ],
)  # fmt: skip
def test_rows_of_another_kind_are_refused_with_what_fits(write, kind, row, settings, told):
    with pytest.raises(OtherRowsError if "dialog" not in row else DataError) as caught:
        load_rows(write("a.jsonl", [row]), DataSection(**settings), kind=kind)
    assert "a.jsonl, line 1: " in str(caught.value)
    assert told in str(caught.value)


def test_a_label_that_is_a_text_is_no_reason_to_refuse_answers(write):
    assert len(load_rows(write("a.jsonl", [ROW | {"label": "news"}]), DataSection())) == 1
    forced = DataSection(format="prompt-completion")
    assert len(load_rows(write("b.jsonl", [ROW]), forced)) == 1


def test_a_row_without_a_label_is_another_format(write):
    with pytest.raises(DataError, match=r"a.jsonl, line 2: the column 'label' is missing"):
        load_rows(
            write("a.jsonl", [ROW, {"prompt": "a", "completion": "b"}]),
            DataSection(),
            kind="labelled",
        )


@pytest.mark.parametrize(
    "pair",
    [
        PAIR,
        {"prompt": ASKED, "chosen": GOOD, "rejected": [{"role": "assistant", "content": "A tree"}]},
    ],
)
def test_a_pair_is_a_desirable_answer_and_another_one(write, make_tokenizer, pair):
    made = labelled(write, make_tokenizer, [pair])
    assert made.dataset["desirable"] == [True, False]
    said = [trained(make_tokenizer("chatml"), row) for row in made.dataset]
    assert said == ["Paris<|im_end|>", "A tree<|im_end|>"]
    assert made.rows.row_origin(0) == made.rows.row_origin(1)
    assert "Each pair is taken for two answers" in " ".join(made.rows.notices)


def test_beside_each_answer_stands_one_to_another_prompt(write, make_tokenizer):
    rows = [
        {"prompt": f"What is {i}?", "completion": f"It is {i}.", "label": i % 2 == 0}
        for i in range(6)
    ]
    made, tokenizer = labelled(write, make_tokenizer, rows), make_tokenizer("chatml")
    for i, row in enumerate(made.dataset):
        asked = tokenizer.decode(row["other_ids"]).split("assistant")[0]
        assert f"What is {i}?" in asked
        assert trained(tokenizer, row, "other_labels") == f"It is {(i + 3) % 6}.<|im_end|>"
        assert len(row["other_ids"]) == len(row["other_labels"])
    limit = len(made.dataset[0]["input_ids"])
    long = [*rows[:5], rows[5] | {"completion": "It is what it is, and that is that."}]
    cut = labelled(write, make_tokenizer, long, max_length=limit)
    assert max(len(row["other_ids"]) for row in cut.dataset) == limit


@pytest.mark.parametrize("count", [3, 4, 7])
def test_good_answers_before_bad_ones_to_the_same_prompts_stand_beside_others(
    write, make_tokenizer, count
):
    """As TRL's `unpair_preference_dataset` and two files, one after the other, have them."""
    rows = [
        {"prompt": f"What is {i}?", "completion": f"{word} {i}.", "label": word == "It is"}
        for word in ("It is", "No")
        for i in range(count)
    ]
    made, tokenizer = labelled(write, make_tokenizer, rows), make_tokenizer("chatml")
    for row, beside in zip(rows, made.dataset, strict=True):
        own = row["prompt"].removeprefix("What is ").removesuffix("?")
        other = trained(tokenizer, beside, "other_labels").removesuffix(".<|im_end|>")
        assert other.split()[-1] != own
    assert not any("same prompt" in notice for notice in made.notices)


def test_answers_to_one_prompt_are_said_to_be_so(write, make_tokenizer):
    rows = [ROW | {"completion": f"Paris {i}", "label": i > 1} for i in range(4)]
    made = labelled(write, make_tokenizer, rows)
    assert any("All rows have the same prompt" in notice for notice in made.notices)
    assert len(made.dataset["other_ids"]) == 4


def test_rows_that_are_all_too_long_are_refused_for_that(write, make_tokenizer):
    rows = [ROW | {"prompt": "x" * 99}, ROW | {"prompt": "y" * 99, "label": False}]
    made = labelled(write, make_tokenizer, rows, max_length=32, on_long="drop")
    with pytest.raises(DataError, match="All are longer than 32 tokens"):
        check(made, make_tokenizer("chatml"))


@pytest.mark.parametrize("most", [1, 2, 5, 11])
def test_some_of_the_rows_have_both_labels_whatever_their_order(write, most):
    turns = [ROW | {"prompt": str(i), "label": i % 2 == 0} for i in range(21)]
    some = load_rows(write("a.jsonl", turns), DataSection(), kind="labelled").spread(most)
    assert {*some.dataset["desirable"]} == {True, False}
    assert len(some) == max(most - 1, 2) if most > 2 else len(some) == 2
    pairs = [PAIR | {"prompt": str(i)} for i in range(21)]
    some = load_rows(write("b.jsonl", pairs), DataSection(), kind="labelled").spread(most)
    assert sum(some.dataset["desirable"]) * 2 == len(some) <= max(most, 2)


def test_the_last_answer_of_a_conversation_alone_is_learned(write, make_tokenizer):
    asked_again = {"messages": [*ASKED, *GOOD, {"role": "user", "content": "Thanks."}]}
    made = labelled(
        write, make_tokenizer, [asked_again | {"label": True}, asked_again | {"label": False}]
    )
    tokenizer = make_tokenizer("chatml")
    assert [trained(tokenizer, row) for row in made.dataset] == ["Paris<|im_end|>"] * 2
    longer = [*GOOD, {"role": "user", "content": "And now?"}, *GOOD]
    pair = {"prompt": ASKED, "chosen": longer, "rejected": GOOD}
    made = labelled(write, make_tokenizer, [pair])
    assert [trained(tokenizer, row) for row in made.dataset] == ["Paris<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"prompt": "a", "good": "b", "bad": "c"}, {"map": {"chosen": "good", "rejected": "bad"}}),
        ({"chosen": ASKED + GOOD, "rejected": ASKED + EARLIER[1:]}, {"format": "preference"}),
    ],
)
def test_pairs_are_read_as_dpo_reads_them(write, row, settings):
    file, section = write("a.jsonl", [row]), DataSection(**settings)
    rows = load_rows(file, section, kind="labelled")
    assert rows.format == load_rows(file, section, kind="pairs").format
    assert len(rows) == 2


def test_answers_that_are_left_out_stand_beside_none(write, make_tokenizer):
    other = {"prompt": "What else?", "completion": "A tree", "label": False}
    rows = [ROW, ROW | {"prompt": "x" * 90}, other]
    made = labelled(write, make_tokenizer, rows, max_length=60, on_long="drop")
    assert made.dataset["desirable"] == [True, False]
    said = [trained(make_tokenizer("chatml"), row, "other_labels") for row in made.dataset]
    assert said == ["A tree<|im_end|>", "Paris<|im_end|>"]


@pytest.mark.parametrize("label", [True, False])
def test_labels_that_are_all_the_same_are_refused(write, make_tokenizer, label):
    made = labelled(write, make_tokenizer, [ROW | {"label": label}] * 3)
    said = r"All 3 labels of the rows read from .*a.jsonl are " + str(label).lower()
    with pytest.raises(DataError, match=said):
        check(made, make_tokenizer("chatml"))


def test_both_parts_of_a_split_have_both_labels_and_whole_pairs(write):
    few = [ROW | {"prompt": str(i), "label": i >= 3} for i in range(60)]
    train, held_out = load_rows(write("a.jsonl", few), DataSection(), kind="labelled").split(0.1, 0)
    assert [sum(part.dataset["desirable"]) for part in (train, held_out)] == [51, 6]
    assert [len(part) for part in (train, held_out)] == [53, 7]
    pairs = [PAIR | {"prompt": str(i)} for i in range(20)]
    train, held_out = load_rows(write("b.jsonl", pairs), DataSection(), kind="labelled").split(
        0.1, 0
    )
    assert [len(part) for part in (train, held_out)] == [36, 4]
    assert not {*train.dataset["prompt"]} & {*held_out.dataset["prompt"]}
    one = load_rows(
        write("c.jsonl", [ROW, ROW, ROW | {"label": False}]), DataSection(), kind="labelled"
    )
    with pytest.raises(DataError, match="1 row with one of its labels, which cannot be split"):
        one.split(0.1, 0)


@pytest.mark.parametrize(
    "row",
    [
        ROW,
        ROW | {"label": False, "system": "Be brief."},
        {"messages": EARLIER + ASKED + GOOD, "label": False},
        {"prompt": ASKED, "chosen": GOOD + ASKED + GOOD, "rejected": EARLIER[1:]},
        {"prompt": ASKED, "completion": GOOD, "label": True},
        {"instruction": "What is up?", "output": "Paris", "history": [["a", "b"]], "label": True},
        PAIR,
    ],
)
def test_rows_that_are_written_are_read_again(write, row):
    rows = load_rows(write("a.jsonl", [row]), DataSection(), kind="labelled")
    written = [as_written(one, rows.format) for one in rows.dataset]
    again = load_rows(write("b.jsonl", written), DataSection(), kind="labelled")
    without = ["file", "line"]
    one, other = (found.dataset.remove_columns(without).to_list() for found in (rows, again))
    assert one == other


def test_the_label_is_shown(write, make_tokenizer, tmp_path, capsys):
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    model = str(tmp_path / "tokenizer")
    file = write("a.jsonl", [ROW, ROW | {"completion": "A tree", "label": False}])
    inspect_data(data=file, model=model, objective="kto")
    out = capsys.readouterr().out
    assert "a.jsonl, line 1, desirable: " in out
    assert "a.jsonl, line 2, undesirable: " in out
    assert "1 answers are desirable, 1 are not" in out
    inspect_data(data=file, model=model, objective="kto", as_json=True)
    shown = json.loads(capsys.readouterr().out)["examples"]
    assert [one["desirable"] for one in shown] == [True, False]

"""Pairs of answers: their formats, what becomes of their rows, and which of them cannot be trained on."""

from __future__ import annotations

import json

import pytest

from prefixtune_cli.cli.inspect_data import inspect_data as command
from prefixtune_cli.cli.typer_options import for_typer
from prefixtune_cli.data.inspect import check, warnings
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection

inspect_data = for_typer(command)
PAIR = {"prompt": "What is up?", "chosen": "Paris", "rejected": "A tree"}
ASKED = [{"role": "user", "content": "What is up?"}]
GOOD = [{"role": "assistant", "content": "Paris"}]
BAD = [{"role": "assistant", "content": "A tree"}]
LISTS = {"prompt": ASKED, "chosen": GOOD, "rejected": BAD}
WHOLE = {"chosen": ASKED + GOOD, "rejected": ASKED + BAD}


def pairs_of(write, make_tokenizer, rows, template="chatml", **settings):
    section = DataSection(**settings)
    return tokenize(
        load_rows(write("a.jsonl", rows), section, kind="pairs"), make_tokenizer(template), section
    )


def said(tokenizer, row, ids, labels):
    """(all text, trained text) of one answer."""
    trained = [label for label in row[labels] if label != MASKED]
    return tokenizer.decode(row[ids]), tokenizer.decode(trained)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        (PAIR, "preference"),
        (LISTS, "preference of messages"),
        (WHOLE, "preference of conversations"),
        (WHOLE | {"prompt": "What is up?"}, "preference of conversations"),
        ({"prompt": "What is up?", "chosen": GOOD, "rejected": BAD}, "preference of conversations"),
    ],
    ids=[
        "texts",
        "messages",
        "conversations",
        "conversations beside their prompt",
        "answers alone",
    ],
)
def test_every_format_gives_the_same_pair_of_rows(write, make_tokenizer, row, name):
    pairs = pairs_of(write, make_tokenizer, [row])
    assert pairs.rows.format == name
    assert f"Format: {name} (recognised" in pairs.rows.notices[0]
    tokenizer, made = make_tokenizer("chatml"), pairs.dataset[0]
    asked = "<|im_start|>user\nWhat is up?<|im_end|>\n<|im_start|>assistant\n"
    chosen = said(tokenizer, made, "input_ids", "labels")
    rejected = said(tokenizer, made, "other_ids", "other_labels")
    assert chosen == (f"{asked}Paris<|im_end|>", "Paris<|im_end|>")
    assert rejected == (f"{asked}A tree<|im_end|>", "A tree<|im_end|>")


def test_columns_are_mapped_and_a_tokenizer_without_a_template_joins_texts(write, make_tokenizer):
    row = {"question": "up", "better": "Paris", "worse": "A tree"}
    mapping = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    pairs = pairs_of(write, make_tokenizer, [row], template=None, map=mapping)
    tokenizer, made = make_tokenizer(), pairs.dataset[0]
    assert said(tokenizer, made, "other_ids", "other_labels")[1].startswith(" A tree")
    assert "better as chosen" in pairs.rows.notices[0]


def test_an_answer_that_both_conversations_have_is_not_trained(write, make_tokenizer):
    before = [*ASKED, {"role": "assistant", "content": "Who asks?"}, *ASKED]
    pairs = pairs_of(write, make_tokenizer, [{"chosen": before + GOOD, "rejected": before + BAD}])
    tokenizer, made = make_tokenizer("chatml"), pairs.dataset[0]
    assert said(tokenizer, made, "input_ids", "labels")[1] == "Paris<|im_end|>"


def test_pairs_that_cannot_be_trained_on_are_counted_and_left_out(write, make_tokenizer):
    rows = [
        PAIR,
        PAIR | {"rejected": "Paris"},
        PAIR | {"chosen": ""},
        PAIR | {"rejected": " "},
        PAIR | {"chosen": "a" + " tree" * 40, "rejected": "a" + " tree" * 40 + "s"},
        PAIR | {"chosen": "a" + " tree" * 40, "rejected": "a" + " tree" * 40},
    ]
    pairs = pairs_of(write, make_tokenizer, rows, max_length=48)
    assert pairs.dataset["row"][:] == [0]
    told = "\n".join(warnings(pairs.statistics))
    assert "2 of 6 rows (33.3 %) have twice the same answer and are left out" in told
    assert "1 of 6 rows (16.7 %) have the same answer twice when cut" in told
    assert "chosen: 1 of 6 rows (16.7 %) have nothing to train on and are left out" in told
    assert "rejected: 1 of 6 rows (16.7 %) have nothing to train on and are left out" in told


def test_a_pair_is_dropped_with_either_of_its_answers(write, make_tokenizer):
    rows = [PAIR, PAIR | {"rejected": " tree" * 60}]
    pairs = pairs_of(write, make_tokenizer, rows, max_length=48, on_long="drop")
    assert (pairs.dataset["row"][:], pairs.statistics.rejected.dropped) == ([0], 1)
    with pytest.raises(DataError, match="1 of 2 rows are longer than 48 tokens"):
        pairs_of(write, make_tokenizer, rows, max_length=48, on_long="error")


def test_pairs_of_which_every_rejected_answer_is_too_long_are_refused_for_that(
    write, make_tokenizer
):
    rows = [PAIR | {"rejected": " tree" * 60}]
    pairs = pairs_of(write, make_tokenizer, rows, max_length=48, on_long="drop")
    with pytest.raises(DataError, match="All are longer than 48 tokens"):
        check(pairs, make_tokenizer("chatml"))


@pytest.mark.parametrize(
    ("rows", "kind", "told"),
    [
        ([PAIR, {"prompt": "a", "completion": "b"}], "pairs", "this one is prompt-completion"),
        ([{"prompt": "a", "completion": "b"}, PAIR], "answers", "this one is preference"),
    ],
)
def test_rows_with_one_answer_and_with_two_are_not_mixed(write, rows, kind, told):
    with pytest.raises(DataError, match=rf"a.jsonl, line 2: mixed formats.*{told}"):
        load_rows(write("a.jsonl", rows), DataSection(), kind)


def test_data_whose_pairs_are_all_alike_is_refused(write, make_tokenizer):
    pairs = pairs_of(write, make_tokenizer, [PAIR | {"rejected": "Paris"}])
    with pytest.raises(
        DataError, match=r"None of the 1 pairs of .* in 1 both answers are the same"
    ):
        check(pairs, make_tokenizer("chatml"))


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"prompt": "a", "completion": "b"},
            "learn from pairs of answers: prompt, chosen and rej",
        ),
        ({"text": "a"}, "or leave --objective out"),
        ({"chosen": "a", "rejected": "b"}, "the column 'prompt' is missing"),
        ({"dialog": "a"}, "Name the columns: --map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN"),
        ({"chosen": GOOD, "rejected": BAD}, "do not begin with the same question"),
        (WHOLE | {"rejected": ASKED + ASKED}, "'rejected' has no message of the role assistant"),
    ],
)
def test_what_is_no_pair_of_answers_is_refused(write, row, told):
    with pytest.raises(DataError) as caught:
        load_rows(write("a.jsonl", [row]), DataSection(), kind="pairs")
    assert "a.jsonl, line 1: " in str(caught.value)
    assert told in str(caught.value)


def test_one_file_is_read_as_pairs_and_refused_without_whatever_came_first(write):
    file = write("a.jsonl", [PAIR])
    for _ in range(2):
        assert load_rows(file, DataSection(), kind="pairs").of_pairs
        with pytest.raises(DataError, match="--objective dpo"):
            load_rows(file, DataSection())


def test_both_answers_are_shown_under_each_other(write, make_tokenizer, tmp_path, capsys):
    make_tokenizer("chatml").save_pretrained(tmp_path / "tokenizer")
    model, file = str(tmp_path / "tokenizer"), write("a.jsonl", [PAIR])
    inspect_data(data=file, model=model, objective="dpo")
    out = capsys.readouterr().out
    first, second = out.split("── rejected: ")
    assert "a.jsonl, line 1, chosen: " in first and "⟦Paris<|im_end|>⟧" in first
    assert "What is up?" in second and "⟦A tree<|im_end|>⟧" in second
    assert "1 rows of format preference, 1 of them trained on\nchosen: " in second
    inspect_data(data=file, model=model, objective="dpo", as_json=True)
    shown = json.loads(capsys.readouterr().out)["examples"][0]
    assert shown["rejected"]["spans"][-1] == ["A tree<|im_end|>", True]

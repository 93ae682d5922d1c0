"""Input data: formats, sources, and one clear error for every kind of bad input."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from prefixtune_cli.data.lines import MAX_LINE_BYTES
from prefixtune_cli.data.load import LoadedData, evenly_spread, load_rows, split
from prefixtune_cli.errors import DataError, PtpError, ResourceError
from prefixtune_cli.recipe.schema import DataSection
from tests.heard import Heard

PAIR = {"prompt": "Why?", "completion": "Because."}
TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]


def content(rows: LoadedData) -> list[dict]:
    """The stored rows, without null and empty values."""

    def filled(value):
        if isinstance(value, list):
            return [filled(entry) for entry in value]
        if isinstance(value, dict):
            return {key: filled(entry) for key, entry in value.items() if entry not in (None, [])}
        return value

    return filled(rows.dataset.remove_columns(["file", "line"]).to_list())


def case(name: str) -> Path:
    file = Path(__file__).parents[3] / "shared" / "cases" / name
    if not file.exists():
        pytest.skip("needs ../shared/cases beside the repository")
    return file


def refusal(source: str, **values) -> str:
    with pytest.raises(DataError) as caught:
        load_rows(source, DataSection(**values))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"messages": TURNS}, "messages", {"messages": TURNS}),
        (
            {"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "Because."}]},
            "conversations",
            {"messages": TURNS},
        ),
        (PAIR, "prompt-completion", PAIR),
        (
            {"instruction": "Why", "input": "me?", "output": "Because."},
            "alpaca",
            {"prompt": "Why\n\nme?", "completion": "Because."},
        ),
        ({"instruction": "Why?", "input": "", "output": "Because."}, "alpaca", PAIR),
        ({"instruction": "Why?", "output": "Because."}, "alpaca", PAIR),
        ({"question": "Why?", "answer": "Because."}, "question-answer", PAIR),
        ({"text": "Why? ☃"}, "text", {"text": "Why? ☃"}),
    ],
)  # fmt: skip
def test_each_format_is_recognised_and_brought_to_one_layout(write, row, format, expected):
    rows = load_rows(write("a.jsonl", [row]), DataSection())
    assert rows.format == format
    assert content(rows) == [expected]
    assert f"Format: {format} (recognised; columns " in rows.notices[0]


def test_a_forced_format_wins_over_the_recognised_one(write):
    row = PAIR | {"text": "All of it."}
    file = write("a.jsonl", [row])
    assert load_rows(file, DataSection()).format == "prompt-completion"
    rows = load_rows(file, DataSection(format="text"))
    assert content(rows) == [{"text": "All of it."}]
    assert "forced by --format" in rows.notices[0]
    assert "not used: prompt, completion" in rows.notices[0]


def test_map_renames_columns_from_source_to_destination(write):
    file = write("a.jsonl", [{"text": "card charged twice", "category": "payment"}])
    rows = load_rows(file, DataSection(map={"prompt": "text", "completion": "category"}))
    assert content(rows) == [{"prompt": "card charged twice", "completion": "payment"}]


def test_map_decides_the_format_over_other_columns(write):
    file = write("a.jsonl", [{"messages": TURNS, "q": "Why?", "a": "Because."}])
    rows = load_rows(file, DataSection(map={"prompt": "q", "completion": "a"}))
    assert content(rows) == [PAIR]


def test_map_of_an_unknown_column_lists_the_columns_and_the_nearest(write):
    told = refusal(write("a.jsonl", [PAIR]), map={"prompt": "promt"})
    assert "line 1" in told and "prompt=promt" in told and "prompt, completion" in told
    assert told.endswith("Did you mean --map prompt=prompt?")


@pytest.mark.parametrize(
    ("mapping", "meant"),
    [
        ({"complition": "completion"}, "--map completion=completion"),
        ({"prompt": "completion", "anwser": "prompt"}, "--map answer=prompt"),
        ({"utterance": "prompt"}, "--map prompt=utterance"),  # the two sides are swapped
    ],
)
def test_map_of_an_unknown_field_names_the_one_that_was_meant(write, mapping, meant):
    told = refusal(write("a.jsonl", [PAIR]), map=mapping)
    assert "there is no field" in told and "messages, conversations, prompt" in told
    assert told.endswith(f"Did you mean {meant}?")


def test_a_mapped_field_that_the_format_does_not_read_is_refused(write):
    file = write("a.jsonl", [{"messages": TURNS, "q": "Why?"}])
    told = refusal(file, map={"prompt": "q"})
    assert "line 1: --map prompt=q: the format is messages, which has no field 'prompt'" in told


def test_an_optional_column_may_be_mapped_where_some_rows_lack_it_but_not_where_all_do(write):
    row = {"instruction": "Why", "output": "Because."}
    file = write("a.jsonl", [row, row | {"context": "me?"}])
    rows = load_rows(file, DataSection(map={"input": "context"}))
    assert rows.dataset["prompt"][:] == ["Why", "Why\n\nme?"]
    assert "columns instruction, output, context as input)." in rows.notices[0]
    told = refusal(file, map={"input": "contxt"})
    assert "a.jsonl: --map input=contxt names a column that is missing" in told
    assert "Did you mean --map input=context?" in told


def test_not_used_lists_the_columns_of_all_rows_in_the_names_of_the_file(write):
    more = {"note": "Shout.", "id": 7}
    file = write("a.jsonl", [PAIR, PAIR | more, PAIR | {"answer": "No."}])
    for _ in range(2):  # the second time from the cache
        assert load_rows(file, DataSection()).notices[0].endswith("not used: note, id, answer.")
    told = load_rows(
        write("b.jsonl", [PAIR | {"answer": "No."}]), DataSection(map={"completion": "answer"})
    )
    assert told.notices[0].endswith("columns prompt, answer as completion); not used: completion.")


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        ({"text": "card charged twice", "category": "payment"}, "prompt=text,completion=category"),
        ({"text": "Fine film.", "label": 1}, "prompt=text,completion=label"),
        ({"id": 3, "label": 1, "text": "Fine film.", "label_text": "good"}, "prompt=text,completion=label_text"),
        ({"text": "a", "Class Index": "3", "title": "b"}, "'prompt=text,completion=Class Index'"),
        ({"text": "a", "intents": ["b", "c"]}, "prompt=text,completion=intents"),
        ({"text": "A long story.", "summary": "Short."}, "prompt=text,completion=summary"),
        ({"text": "the cat", "french": "le chat"}, "prompt=text,completion=french"),
        ({"prompt": "Why?", "text": "Because."}, "prompt=prompt,completion=text"),
    ],
)  # fmt: skip
def test_a_text_beside_what_may_be_its_answer_is_refused_with_both_lines_to_type(write, row, pair):
    file = write("a.jsonl", [row])
    told = refusal(file)
    assert "line 1: the columns text and " in told
    assert f"--map {pair}." in told and "--format text" in told
    assert content(load_rows(file, DataSection(format="text"))) == [{"text": row["text"]}]


def test_a_pair_that_shows_in_a_later_row_alone_is_refused_too(write):
    told = refusal(write("a.jsonl", [{"text": "a"}, {"text": "b", "label": "c"}]))
    assert "the columns text and label" in told


@pytest.mark.parametrize(
    "about",
    [
        {"timestamp": "2020", "url": "https://example.com"},
        {"id": "12", "title": "Lima"},
        {"meta": {"pile_set_name": "Books"}},
        {"length": 12},
        {"": "0"},
        {"Unnamed: 0": "0", "source": "web"},
    ],
)
def test_a_text_beside_what_is_about_it_is_a_text(write, about):
    rows = load_rows(write("a.jsonl", [{"text": "Lima lies by the sea."} | about]), DataSection())
    assert rows.format == "text"
    assert f"not used: {', '.join(name or '(no name)' for name in about)}." in rows.notices[0]


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"review": "Fine film.", "sentiment": "good"},
            "--map prompt=review,completion=sentiment.",
        ),
        ({"": "0", "label": "2", "sentence": "x"}, "--map prompt=sentence,completion=label."),
        ({"de": "Hund", "en": "dog"}, "--map prompt=de,completion=en."),
        ({"dialog": TURNS}, "--map messages=dialog."),
        ({"body": "Lima lies by the sea."}, "--map text=body, if it is text."),
    ],
)
def test_unknown_columns_are_answered_with_the_line_to_type(write, row, line):
    assert refusal(write("a.jsonl", [row])).endswith(f"Name the columns: {line}")


@pytest.mark.parametrize(
    ("row", "line"),
    [
        ({"chosen": "Hi", "rejected": "Go"}, "--map text=chosen, if it is text."),
        ({"rejected": TURNS, "chosen": TURNS}, "--map messages=chosen."),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "--map prompt=prompt,completion=chosen."),
        (
            {"prompt": TURNS, "chosen": TURNS, "rejected": TURNS},
            "--map prompt=prompt,completion=chosen.",
        ),
    ],
)
def test_pairs_of_answers_are_refused_with_the_objective_to_type(write, row, line):
    told = refusal(file := write("a.jsonl", [row]))
    assert (
        "pairs of answers, from which `ptp train --objective dpo` (simpo, orpo, kto) learns" in told
    )
    assert told.endswith(f"To use the chosen answers alone: {line}")
    assert "--objective dpo" in refusal(file, format="preference")


def test_a_forced_format_whose_columns_are_missing_says_so(write):
    told = refusal(write("a.jsonl", [PAIR]), format="text")
    assert "line 1: the format text needs the column 'text'; the columns are prompt" in told


def test_numbers_are_taken_as_they_are_written_and_said_aloud(write):
    file = write("a.jsonl", [PAIR, *({"prompt": "a", "completion": v} for v in (5, True, 0.5))])
    rows = load_rows(file, DataSection())
    assert rows.dataset["completion"][:] == ["Because.", "5", "true", "0.5"]
    assert "Numbers in completion are trained as they are written" in rows.notices[1]
    assert len(load_rows(write("b.jsonl", [PAIR]), DataSection()).notices) == 1


def test_classes_of_a_data_set_are_trained_by_name(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    from prefixtune_cli.data.stored import dataset_rows

    features = Features({"text": Value("string"), "label": ClassLabel(names=["bad", "good"])})
    data = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    assert [row["label"] for _, row in dataset_rows(data)] == ["good", "bad"]
    file = str(tmp_path / "a.parquet")
    data.to_parquet(file)
    rows = load_rows(file, DataSection(map={"prompt": "text", "completion": "label"}))
    assert rows.dataset["completion"][:] == ["good", "bad"]
    data.add_item({"text": "c", "label": -1}).to_parquet(str(tmp_path / "b.parquet"))
    told = refusal(str(tmp_path / "b.parquet"), map={"prompt": "text", "completion": "label"})
    assert "row 3: the column 'completion' must be text, got null" in told


def test_text_says_aloud_that_every_token_is_trained(write):
    rows = load_rows(write("a.jsonl", [{"text": "x"}]), DataSection())
    assert "every token of it is trained" in rows.notices[1]


def test_all_file_types_give_the_same_rows(write, tmp_path):
    from datasets import Dataset

    data = [PAIR, {"prompt": 'Say "hi",\nplease', "completion": "hi ☃"}]
    files = [
        write("a.jsonl", data),
        write("a.json", json.dumps(data, indent=2)),
        write("a.csv", 'prompt,completion\nWhy?,Because.\n"Say ""hi"",\nplease",hi ☃\n'),
        write("b.csv", 'prompt;completion\nWhy?;Because.\n"Say ""hi"",\nplease";hi ☃\n'),
        write("a.tsv", 'prompt\tcompletion\nWhy?\tBecause.\n"Say ""hi"",\nplease"\thi ☃\n'),
        write("b.json", json.dumps({"version": "1", "data": data}, indent=2)),
        str(tmp_path / "a.parquet"),
        str(tmp_path / "saved"),
    ]
    Dataset.from_list(data).to_parquet(files[6])
    Dataset.from_list(data).save_to_disk(files[7])
    loaded = [load_rows(file, DataSection()) for file in files]
    for rows in loaded:
        assert content(rows) == data
    assert [rows.row_origin(1).removeprefix(str(tmp_path)) for rows in loaded] == [
        "/a.jsonl, line 2",
        "/a.json, line 6",
        "/a.csv, line 3",
        "/b.csv, line 3",
        "/a.tsv, line 3",
        "/b.json, line 8",
        "/a.parquet, row 2",
        "/saved, row 2",
    ]


def test_a_json_file_of_one_object_a_line_is_read_too(write):
    file = write("a.json", json.dumps(PAIR) + "\n" + json.dumps(PAIR))
    assert content(load_rows(file, DataSection())) == [PAIR, PAIR]


def test_a_json_file_of_one_object_is_a_row_or_what_stands_around_the_rows(write):
    for text in (json.dumps(PAIR), json.dumps(PAIR, indent=2)):
        assert content(load_rows(write("a.json", text), DataSection())) == [PAIR]
    chat = {"id": 1, "messages": TURNS}
    assert content(load_rows(write("b.json", json.dumps(chat)), DataSection())) == [
        {"messages": TURNS}
    ]
    rows = load_rows(write("c.json", json.dumps({"facts": [PAIR, PAIR]})), DataSection())
    assert content(rows) == [PAIR, PAIR]
    told = refusal(write("d.json", json.dumps({"train": [PAIR], "test": [PAIR]})))
    assert "one object with the lists train and test" in told and "jq .train" in told
    told = refusal(write("e.json", json.dumps({"data": [PAIR, 5]}, indent=1)))
    assert "e.json, line 7: a row must be a JSON object" in told


def test_an_array_in_a_jsonl_file_is_answered_with_the_name_to_give(write):
    assert "name it .json" in refusal(write("a.jsonl", json.dumps([PAIR])))


def test_a_row_of_another_width_names_the_sign_that_parts_the_cells(write):
    told = refusal(write("a.csv", "prompt;completion\na;b;c\n"))
    assert "line 2: 3 cells" in told and "holds a semicolon" in told
    told = refusal(write("a.tsv", "prompt\tcompletion\na, b\n"))
    assert "line 2: 1 cells" in told and "holds a tab" in told


def test_the_named_cases_are_read_as_they_lie():
    for name in ("semi.csv", "tab.tsv"):
        rows = load_rows(str(case(name)), DataSection())
        assert content(rows) == [{"prompt": "Translate\n\ncat", "completion": "chat"}]
    assert load_rows(str(case("wrapped.json")), DataSection()).dataset["completion"][:] == [
        "Wren.",
        "Cod.",
    ]
    rows = load_rows(str(case("differing-keys.jsonl")), DataSection())
    assert "id, meta." in rows.notices[0] and "system" in rows.notices[0]


def test_a_saved_data_set_is_read_by_its_splits_and_its_classes_by_name(tmp_path):
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    features = Features(
        {"prompt": Value("string"), "completion": ClassLabel(names=["bad", "good"])}
    )
    parts = {
        split: Dataset.from_dict({"prompt": [split], "completion": [1]}, features=features)
        for split in ("train", "test", "extra")
    }
    DatasetDict(parts).save_to_disk(str(tmp_path / "all"))
    rows = load_rows(str(tmp_path / "all"), DataSection())
    assert content(rows) == [{"prompt": "train", "completion": "good"}]
    assert f"test ({tmp_path}/all:test)" in rows.notices[0]
    rows = load_rows(f"{tmp_path}/all:extra", DataSection())
    assert content(rows) == [{"prompt": "extra", "completion": "good"}]
    told = refusal(f"{tmp_path}/all:tset")
    assert "has no split 'tset'; the splits are extra, test, train" in told
    (tmp_path / "all/train/data-00000-of-00001.arrow").unlink()
    assert "all/train cannot be read as a data set of save_to_disk" in refusal(
        str(tmp_path / "all")
    )


@pytest.mark.parametrize(
    ("names", "read", "said"),
    [
        ("train test validation", "train", "--eval-data D:validation"),
        ("train-00000-of-00002 train-00001-of-00002 test-00000-of-00001",
         "train-00000-of-00002 train-00001-of-00002", "test-00000-of-00001.csv (D:test)"),
        ("my_training my.dev", "my_training", "Not read: my.dev.csv (D:validation)"),
        ("a b test", "a b", "Read from D: a.csv, b.csv. Not read: test.csv (D:test)"),
        ("train more", "train", "Not read: more.csv"),
        ("protest latest", "latest protest", None),
        ("test-1 test-2", "test-1 test-2", None),
    ],
)  # fmt: skip
def test_of_a_folder_with_splits_the_training_files_alone_are_read_and_the_others_named(
    write, tmp_path, names, read, said
):
    for name in names.split():
        write(f"d/{name}.csv", f"prompt,completion\n{name},x\n")
    rows = load_rows(str(tmp_path / "d"), DataSection())
    assert rows.dataset["prompt"][:] == read.split()
    folder = str(tmp_path / "d")
    assert (said is None) == ("Format: " in rows.notices[0])
    assert said is None or said in rows.notices[0].replace(folder, "D")


def test_a_split_of_a_folder_is_read_by_its_name(write, tmp_path):
    for name in ("dev", "test"):
        write(f"d/{name}.jsonl", [PAIR | {"prompt": name}])
    folder = str(tmp_path / "d")
    for name, prompt in (("validation", "dev"), ("dev", "dev"), ("test", "test")):
        rows = load_rows(f"{folder}:{name}", DataSection())
        assert rows.dataset["prompt"][:] == [prompt]
    told = refusal(folder)
    assert (
        f"has no split train. Name the one to read: {folder}:validation or {folder}:test." in told
    )


def test_what_a_folder_holds_besides_is_named(write, tmp_path):
    write("d/a.jsonl", [PAIR])
    write("d/b.jsonl.gz", b"")
    write("d/more/c.jsonl", [PAIR])
    write("d/README.md", "")
    rows = load_rows(str(tmp_path / "d"), DataSection())
    assert rows.notices[0] == f"Read from {tmp_path}/d: a.jsonl. Not read: b.jsonl.gz, more/."
    write("e/more/c.jsonl", [PAIR])
    assert f"These folders have some: {tmp_path}/e/more/." in refusal(str(tmp_path / "e"))


def test_a_link_that_leads_nowhere_is_named(write, tmp_path):
    write("d/a.jsonl", [PAIR])
    (tmp_path / "d/b.jsonl").symlink_to("/gone/b.jsonl")
    told = f"{tmp_path}/d/b.jsonl is a link to /gone/b.jsonl, which does not exist"
    assert told in refusal(str(tmp_path / "d"))
    assert told in refusal(str(tmp_path / "d/b.jsonl"))
    (tmp_path / "e").symlink_to("/gone")
    assert f"{tmp_path}/e is a link to /gone" in refusal(str(tmp_path / "e"))


def test_prompts_may_lack_the_mapped_answer_and_a_text_says_how_to_map_it(write):
    from prefixtune_cli.data.question import questions

    file = write("a.jsonl", [{"q": "Why?"}])
    asked = list(questions(file, {"prompt": "q", "completion": "a"}))
    assert asked[0][1].messages == [{"role": "user", "content": "Why?"}]
    with pytest.raises(DataError, match="--map prompt=q names a column that is missing"):
        list(questions(write("b.jsonl", [{"a": "x"}]), {"prompt": "q"}))
    with pytest.raises(DataError, match="--map prompt=text"):
        list(questions(write("c.jsonl", [{"text": "Why?", "label": "x"}]), {}))


def test_held_out_rows_that_are_the_training_rows_are_warned_of(write, tmp_path):
    from prefixtune_cli.recipe.schema import ModelSection, Recipe
    from prefixtune_cli.tokenizer import load_tokenizer
    from prefixtune_cli.train.prepare import prepare_data

    for name in ("train", "test"):
        write(f"d/{name}.jsonl", [PAIR | {"prompt": name, "id": 1}, PAIR])
    folder, tokenizer = str(tmp_path / "d"), load_tokenizer(ModelSection())
    for held_out, warned in ((folder, 1), (f"{folder}:test", 0)):
        heard = Heard()
        recipe = Recipe(data=DataSection(train=folder, eval=held_out))
        prepare_data(recipe, tokenizer, heard)
        assert len([text for text in heard.warnings if "has the same rows as" in text]) == warned


def test_prompts_of_a_folder_with_splits_are_asked_about(write, tmp_path):
    from prefixtune_cli.data.question import questions

    for name in ("train", "test"):
        write(f"d/{name}.jsonl", [PAIR | {"prompt": name}])
    with pytest.raises(DataError, match="more than one part"):
        list(questions(str(tmp_path / "d"), {}))
    asked = list(questions(f"{tmp_path}/d:test", {}))
    assert asked[0][1].messages == [{"role": "user", "content": "test"}]


def test_a_folder_is_read_in_the_order_of_its_names(write, tmp_path):
    write("d/b.csv", "prompt,completion\nb,2\n")
    write("d/a.jsonl", [{"prompt": "a", "completion": "1"}])
    write("d/.hidden.jsonl", "not JSON")
    write("d/README.md", "not data")
    write("d/dataset_infos.json", '{"default": {}}')
    rows = load_rows(str(tmp_path / "d"), DataSection())
    assert [row["prompt"] for row in rows.dataset] == ["a", "b"]
    assert rows.row_origin(1) == f"{tmp_path}/d/b.csv, line 2"


def test_a_byte_order_mark_and_blank_lines_are_accepted(write):
    lines = (
        b"\xef\xbb\xbf" + json.dumps(PAIR).encode() + b"\r\n\r\n  \n" + json.dumps(PAIR).encode()
    )
    rows = load_rows(write("a.jsonl", lines + b"\n\n"), DataSection())
    assert content(rows) == [PAIR, PAIR]
    assert rows.row_origin(1).endswith("a.jsonl, line 4")


def test_the_fingerprint_depends_on_content_and_mapping_alone(write):
    one = load_rows(write("a.jsonl", [PAIR]), DataSection())
    copy = load_rows(write("b.jsonl", [PAIR]), DataSection())
    os.utime(write("a.jsonl", [PAIR]), (1, 1))
    again = load_rows(one.source, DataSection(max_length=99))
    other = load_rows(write("c.jsonl", [PAIR | {"completion": "No."}]), DataSection())
    mapped = load_rows(
        one.source, DataSection(map={"prompt": "completion", "completion": "prompt"})
    )
    assert one.fingerprint == copy.fingerprint == again.fingerprint
    assert len({one.fingerprint, other.fingerprint, mapped.fingerprint}) == 3
    assert len(one.fingerprint) == 64


def test_a_changed_file_is_read_anew(write):
    file = write("a.jsonl", [PAIR])
    load_rows(file, DataSection())
    write("a.jsonl", [{"prompt": "b", "completion": "c"}])
    assert content(load_rows(file, DataSection())) == [{"prompt": "b", "completion": "c"}]


def test_loads_at_the_same_time_do_not_disturb_each_other(write):
    file = write("a.jsonl", [PAIR | {"prompt": str(i)} for i in range(3000)])
    counts, errors = [], []

    def load() -> None:
        try:
            counts.append(len(load_rows(file, DataSection())))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=load) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert counts == [3000] * 6


def test_an_empty_file_is_refused(write):
    for name in ("a.jsonl", "a.csv", "a.json"):
        assert "is empty: it has 0 bytes" in refusal(write(name, b""))
    assert "is empty" in refusal(write("b.jsonl", b"\n\n"))
    assert "is empty" in refusal(write("b.json", b"[ ]"))
    assert "is empty" in refusal(write("b.csv", b"prompt,completion\n"))


def test_a_file_that_is_not_utf8_names_line_byte_and_remedy(write):
    good = json.dumps(PAIR).encode() + b"\n"
    bad = '{"prompt": "Köln"}'.encode("latin1")
    told = refusal(write("a.jsonl", good * 2 + bad))
    assert "a.jsonl, line 3: not UTF-8, byte 0xf6 at position 14" in told
    assert "iconv -f latin1 -t utf-8" in told
    assert "line 2: not UTF-8" in refusal(write("a.csv", b"prompt,completion\nK\xf6ln,a\n"))
    assert "line 3: not UTF-8" in refusal(write("a.json", b"[\n" + good + b"," + bad + b"]"))
    said = refusal(write("my data.jsonl", bad))
    assert said.endswith("/my data.jsonl' > 'my data-utf8.jsonl'")
    assert "iconv -f utf-16" in refusal(write("b.jsonl", json.dumps(PAIR).encode("utf-16")))


def test_broken_json_names_line_17_and_shows_its_start(write):
    broken = '{"prompt": "seventeen", "completion": '
    lines = [json.dumps(PAIR)] * 16 + [broken] + [json.dumps(PAIR)]
    told = refusal(write("a.jsonl", "\n".join(lines)))
    assert "a.jsonl, line 17: broken JSON" in told
    assert "at column 38" in told
    assert '{"prompt": "seventeen"' in told


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[\n{"prompt": "a", "completion": "b"},\n{"prompt": }]', "line 3, column 12"),
        ('[{"prompt": "a", "completion": "b"}\n', "got the end of the file"),
        ('[{"prompt": "a", "completion": "b"}\n{"prompt"', "line 2: broken JSON, expected ','"),
        ('[{"prompt": "a", "completion": "b"},', "broken JSON (Expecting value"),
        ('{\n  "prompt": "a"\n', "line 1: broken JSON"),
        ('[{"prompt": "a", "completion": "b"}]\n]', "line 2: broken JSON, got ']' after its end"),
    ],
)
def test_broken_json_arrays_name_the_place(write, text, expected):
    assert expected in refusal(write("a.json", text))


@pytest.mark.parametrize("line", ["[1, 2]", '"text"', "5", "null"])
def test_a_line_that_is_no_object_is_refused(write, line):
    told = refusal(write("a.jsonl", json.dumps(PAIR) + "\n" + line))
    assert "line 2: a row must be a JSON object" in told


def test_json_that_breaks_the_parser_is_refused(write):
    assert "line 1: broken JSON" in refusal(write("a.jsonl", "[" * 200_000))
    assert "line 1: broken JSON" in refusal(write("a.jsonl", '{"prompt": ' + "1" * 5000 + "}"))


def test_a_row_without_its_column_is_named(write):
    told = refusal(write("a.jsonl", [PAIR, PAIR, {"prompt": "Why?", "answr": "x"}]))
    assert "line 3: the column 'completion' is missing" in told
    assert "prompt, answr" in told


def test_mixed_formats_are_refused(write):
    told = refusal(write("a.jsonl", [PAIR, {"messages": TURNS}]))
    assert "line 2: mixed formats" in told
    assert "prompt-completion (prompt + completion)" in told and "messages" in told


def test_unknown_columns_list_the_formats_and_the_map(write):
    told = refusal(write("a.jsonl", [{"context": "a", "response": "b"}]))
    assert "context, response" in told and "question + answer" in told
    assert told.endswith("--map prompt=context,completion=response.")
    told = refusal(write("b.jsonl", [{"a": "1", "b": "2", "c": "3"}]))
    assert "--map prompt=COLUMN,completion=COLUMN" in told


@pytest.mark.parametrize(
    ("value", "got", "instead"),
    [
        (None, "null", 'write ""'),
        (float("nan"), "a number: 'nan'", 'Write it as text: "completion"'),
        (["x"], "a list", 'Write it as one text, such as "a, b"'),
        (TURNS, "a list", "both as lists of messages, in every row"),
        ({"x": 1}, "an object", "only its text"),
    ],
)
def test_a_field_that_is_no_text_says_what_to_type(write, value, got, instead):
    told = refusal(write("a.jsonl", [PAIR, {"prompt": "a", "completion": value}]))
    assert f"line 2: the column 'completion' must be text, got {got}" in told
    assert instead in told


def test_excels_line_of_the_separator_is_no_header(write):
    rows = load_rows(write("a.csv", "sep=;\r\nprompt;completion\r\na;b, c\r\n"), DataSection())
    assert content(rows) == [{"prompt": "a", "completion": "b, c"}]
    assert rows.row_origin(0).endswith("line 3")
    assert "line 3: 3 cells" in refusal(write("b.csv", "sep=#\nprompt#completion\na#b#c\n"))


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_nulls_that_a_table_fills_in_are_no_parameters_of_tools(tmp_path, kind):
    from datasets import Dataset

    from prefixtune_cli.data.question import questions

    def row(name):
        call = {"type": "function", "function": {"name": "f", "arguments": {name: 1}}}
        said = {"role": "assistant", "content": None, "tool_calls": [call]}
        schema = {"type": "object", "properties": {name: {"type": "integer"}}}
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        return {"messages": [{"role": "user", "content": "Hi"}, said], "tools": [tool]}

    data, path = Dataset.from_list([row("x"), row("y")]), tmp_path / f"a.{kind}"
    (data.to_parquet if kind == "parquet" else data.save_to_disk)(str(path))
    for found, name in zip(load_rows(str(path), DataSection()).dataset, "xy", strict=True):
        assert json.loads(found["tools"]) == row(name)["tools"]
        calls = json.loads(found["messages"][1]["more"])["tool_calls"]
        assert calls == row(name)["messages"][1]["tool_calls"]
    asked = [each.tools for _, each in questions(str(path), {})]
    assert asked == [row("x")["tools"], row("y")["tools"]]


def test_a_null_in_parquet_names_its_row(write, tmp_path):
    from datasets import Dataset

    Dataset.from_list([PAIR, {"prompt": "a", "completion": None}]).to_parquet(
        str(tmp_path / "a.parquet")
    )
    assert "a.parquet, row 2: the column 'completion' must be text, got null" in refusal(
        str(tmp_path / "a.parquet")
    )


def test_half_a_surrogate_pair_is_refused(write):
    told = refusal(write("a.jsonl", r'{"prompt": "a", "completion": "\ud83d"}'))
    assert "line 1" in told and r"\ud83d" in told


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([], "got an empty list"),
        ("hi", "must be a list of messages, got str"),
        (["hi"], "message 1: a message must be an object"),
        ([{"role": "user"}], "message 1: 'content' is missing; the keys are 'role'"),
        ([TURNS[0], {"role": "bot", "content": "x"}], "message 2: 'role' must be one of system"),
        ([TURNS[0], {"role": "assistant", "content": None}], "message 2: the column 'content'"),
        ([TURNS[0]], "no message has the role assistant"),
    ],
)
def test_a_bad_conversation_is_refused(write, turns, expected):
    told = refusal(write("a.jsonl", [{"messages": TURNS}, {"messages": turns}]))
    assert "line 2" in told and expected in told


def test_a_conversation_without_answer_is_taken_when_all_is_trained(write):
    file = write("a.jsonl", [{"messages": TURNS[:1]}])
    assert content(load_rows(file, DataSection(train_on="all"))) == [{"messages": TURNS[:1]}]


def test_duplicate_keys_are_refused_at_any_depth(write):
    told = refusal(write("a.jsonl", '{"prompt": "a", "completion": "b", "prompt": "c"}'))
    assert "line 1: the key 'prompt' occurs twice" in told
    nested = '{"messages": [{"role": "user", "role": "assistant", "content": "b"}]}'
    assert "the key 'role' occurs twice" in refusal(write("b.jsonl", nested))
    assert "'prompt' occurs twice" in refusal(write("c.csv", "prompt,prompt\na,b\n"))


def test_csv_rows_of_another_width_and_open_quotes_are_refused(write):
    told = refusal(write("a.csv", "prompt,completion\na,b\na,b,c\n"))
    assert "line 3: 3 cells, but the header names 2 columns (prompt, completion)" in told
    told = refusal(write("b.csv", 'prompt,completion\na,b\n"a,b\nc,d\n'))
    assert "line 3: broken CSV" in told and "not closed" in told


def test_a_broken_parquet_file_is_refused(write):
    assert "cannot be read as Parquet" in refusal(write("a.parquet", b"PAR1 and no more"))


def test_a_one_gigabyte_line_is_refused_without_reading_it_whole(tmp_path):
    file = tmp_path / "a.jsonl"
    with open(file, "wb") as out:
        out.write(json.dumps(PAIR).encode() + b'\n{"prompt": "')
        out.truncate(2**30)  # sparse: reads as zero bytes
    work = (
        "import re, sys\n"
        "from pathlib import Path\n"
        "from prefixtune_cli.data.read import read\n"
        "try:\n    list(read(Path(sys.argv[1])))\n"
        "except Exception as error:\n    print(error)\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1]) // 1024)"
    )
    ran = subprocess.run([sys.executable, "-c", work, str(file)], capture_output=True, text=True)
    told, peak_mib = ran.stdout.splitlines()
    assert f"line 2: the line is longer than {MAX_LINE_BYTES // 2**20} MiB" in told
    assert int(peak_mib) < 400


def test_a_missing_file_suggests_near_names(write, tmp_path):
    write("train.jsonl", [PAIR])
    told = refusal(str(tmp_path / "trian.jsonl"))
    assert "does not exist" in told and f"Did you mean {tmp_path}/train.jsonl?" in told
    assert "The data files in" in refusal(str(tmp_path / "zzzzzzz.csv"))
    assert "The folder /no/such does not exist" in refusal("/no/such/a.jsonl")


def test_an_unknown_type_and_an_empty_folder_list_the_types(write, tmp_path):
    assert ".jsonl, .json, .csv, .parquet" in refusal(write("a.txt", "x"))
    (tmp_path / "empty").mkdir()
    assert "has no data file" in refusal(str(tmp_path / "empty"))


def test_a_sample_is_found_and_an_unknown_one_lists_those_there_are(monkeypatch, write, tmp_path):
    from prefixtune_cli.data import locate

    write("intents-train.jsonl", [PAIR])
    monkeypatch.setattr(locate, "samples_folder", lambda: tmp_path)
    rows = load_rows("sample:intents-train", DataSection())
    assert content(rows) == [PAIR]
    assert rows.row_origin(0) == "sample:intents-train.jsonl, line 1"
    told = refusal("sample:intents-tain")
    assert "the samples are intents-train" in told
    assert "Did you mean sample:intents-train?" in told


def test_a_hub_id_while_offline_is_one_error(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ResourceError, match="not in the cache, and HF_HUB_OFFLINE is set"):
        load_rows("nobody/no-such-data", DataSection())


def test_a_hub_that_does_not_answer_is_one_quick_error():
    work = (
        "from prefixtune_cli.data.load import load_rows\n"
        "from prefixtune_cli.recipe.schema import DataSection\n"
        "from prefixtune_cli.errors import ResourceError\n"
        "try:\n    load_rows('nobody/no-such-data', DataSection())\n"
        "except ResourceError as error:\n    print(error)"
    )
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_DATASETS_OFFLINE": "0", "TRANSFORMERS_OFFLINE": "0"}  # both mean the same
    ran = subprocess.run(
        [sys.executable, "-c", work], capture_output=True, text=True, env=environment, timeout=30
    )
    assert "cannot be fetched: no network" in ran.stdout, ran.stderr
    assert "HF_HUB_OFFLINE=1" in ran.stdout


def test_every_error_of_the_data_layer_exits_with_1(write):
    with pytest.raises(PtpError) as caught:
        load_rows(write("a.jsonl", b""), DataSection())
    assert caught.value.exit_code == 1


def test_the_split_is_decided_by_the_seed(write):
    file = write("a.jsonl", [PAIR | {"prompt": str(i)} for i in range(100)])
    rows = load_rows(file, DataSection())

    def held_out(seed: int) -> list[str]:
        return rows.split(0.05, seed)[1].dataset["prompt"][:]

    train, part = rows.split(0.05, 3)
    assert len(train) == 95 and len(part) == 5
    assert {*train.dataset["prompt"], *part.dataset["prompt"]} == {str(i) for i in range(100)}
    assert held_out(3) == held_out(3) == part.dataset["prompt"][:]
    assert held_out(3) != held_out(4)
    assert len({rows.fingerprint, train.fingerprint, part.fingerprint}) == 3
    assert part.row_origin(0).endswith(f"line {int(part.dataset[0]['prompt']) + 1}")


def test_a_split_leaves_a_row_on_each_side_and_refuses_one_row(write):
    rows = load_rows(write("a.jsonl", [PAIR, PAIR]), DataSection())
    assert [len(part) for part in split(rows.dataset, 0.001, 0)] == [1, 1]
    assert [len(part) for part in split(rows.dataset, 0.999, 0)] == [1, 1]
    with pytest.raises(DataError, match="has 1 row"):
        split(rows.dataset.select([0]), 0.5, 0)


def test_rows_are_spread_evenly_and_never_repeat() -> None:
    assert evenly_spread(3, 5) == [0, 1, 2]
    chosen = evenly_spread(1000, 7)
    assert len(set(chosen)) == 7
    assert (chosen[0], chosen[-1]) == (0, 999)

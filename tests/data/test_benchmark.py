"""Benchmarks from local files: every layout gives the hub's rows, and every fault gives one clear error."""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from prefixtune_cli.data import benchmark
from prefixtune_cli.data.benchmark import Wanted, load_benchmark
from prefixtune_cli.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="needs MMLU and GSM8K in ../shared/data beside the repository"
)

COLUMNS = ("question", "choices", "answer")
CHOICES = ["one", " two", "3", "NA"]
CSV_ROW = "What is it?,one, two,3,NA,C\n"


def mmlu(subset: str | None = "anatomy", splits=("test", "dev"), columns=COLUMNS) -> Wanted:
    return Wanted("mmlu", "cais/mmlu", subset, splits, columns)


def gsm8k(*splits: str, columns=("question", "answer")) -> Wanted:
    return Wanted("gsm8k", "openai/gsm8k", "main", splits or ("train", "test"), columns)


def row(
    question: str = "What is it?", subject: str = "anatomy", answer: object = 2, **more
) -> dict:
    return {"question": question, "subject": subject, "choices": CHOICES, "answer": answer} | more


def refusal(path: Path | str, wanted: Wanted) -> str:
    with pytest.raises(DataError) as caught:
        load_benchmark(Path(path), wanted)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1200
    return str(caught.value)


def to_parquet(path: Path, rows: list[dict], features: Features | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows, features=features).to_parquet(path)


# MMLU as its authors published it


@pytest.mark.parametrize("parent", ["", "data/"])
def test_the_original_csv_folder_gives_the_hubs_rows_with_texts_untouched(write, tmp_path, parent):
    write(f"{parent}test/anatomy_test.csv", '"A ""quoted"",\nlong one ",007, b,"c,\r\nd",N/A,D\n')
    write(f"{parent}dev/anatomy_dev.csv", CSV_ROW * 2)
    write(f"{parent}test/virology_test.csv", "another,a,b,c,d,A\n")
    data = load_benchmark(tmp_path, mmlu())
    assert isinstance(data, DatasetDict) and list(data) == ["test", "dev"]
    assert data["test"].to_list() == [
        {
            "question": 'A "quoted",\nlong one ',
            "subject": "anatomy",
            "choices": ["007", " b", "c,\r\nd", "N/A"],
            "answer": 3,
        }
    ]
    assert data["dev"].to_list() == [row(), row()]
    assert data["dev"].features["answer"] == ClassLabel(names=["A", "B", "C", "D"])


def test_a_byte_order_mark_and_blank_lines_are_no_rows(write, tmp_path):
    write("test/anatomy_test.csv", b"\xef\xbb\xbf" + CSV_ROW.encode() + b"\n\n" + CSV_ROW.encode())
    data = load_benchmark(tmp_path, mmlu(splits=("test",)))
    assert data["test"].to_list() == [row(), row()]


def test_validation_is_val_in_the_original(write, tmp_path):
    write("val/anatomy_val.csv", CSV_ROW)
    data = load_benchmark(tmp_path, mmlu(splits=("validation",)))
    assert list(data) == ["validation"] and len(data["validation"]) == 1


def test_the_original_layout_is_known_by_its_columns_too(write, tmp_path):
    write("test/anatomy_test.csv", CSV_ROW)
    wanted = Wanted("mine", "me/quiz", "anatomy", ("test",), COLUMNS)
    assert load_benchmark(tmp_path, wanted)["test"].to_list() == [row()]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CSV_ROW + "What, is it?,a,b,c,d,A\n", "line 2: 7 cells, and MMLU's rows have 6"),
        (CSV_ROW + "What is it?,a,b,c,A\n", "line 2: 5 cells, and MMLU's rows have 6"),
        (CSV_ROW + "What is it?,a,b,c,d,E\n", "line 2: 'answer' must be A, B, C or D"),
        ('"two\nlines",a,b,c,d,A\nWhat is it?,a,b,c,d,a\n', "line 3: 'answer' must be"),
        (CSV_ROW + " ,a,b,c,d,A\n", "line 2: 'question' must be a text that is not empty, got ' '"),
        (CSV_ROW + ",a,b,c,d,A\n", "line 2: the column 'question' is empty"),
        (CSV_ROW + '"What is it?,a,b,c,d,A\n', "line 2: broken CSV in the row that begins here"),
        (CSV_ROW.encode() + b"caf\xe9,a,b,c,d,A\n", "line 2: not UTF-8 ("),
        ("", "anatomy_test.csv is empty"),
        ("\n\n", "anatomy_test.csv is empty"),
    ],
)
def test_a_malformed_original_row_is_refused_by_file_and_line(write, tmp_path, text, expected):
    write("test/anatomy_test.csv", text)
    told = refusal(tmp_path, mmlu(splits=("test",)))
    assert "anatomy_test.csv" in told and expected in told


# Files with named columns


LETTERS = {"question": "What is it?", "A": "one", "B": " two", "C": "3", "D": "NA"}


@pytest.mark.parametrize(
    "given",
    [
        row(),
        row(answer="C"),
        {"question": "What is it?", "choices": CHOICES, "answer": 2},
        LETTERS | {"answer": "C"},
        LETTERS | {"answer": 2, "subject": "anatomy"},
        row(extra="left out"),
    ],
)
def test_every_spelling_of_an_mmlu_row_becomes_the_hubs(write, tmp_path, given):
    write("anatomy/test.jsonl", [given])
    assert load_benchmark(tmp_path, mmlu(splits=("test",)))["test"].to_list() == [row()]


@pytest.mark.parametrize("answer", ["C", "2"])
def test_a_csv_with_a_header_is_not_taken_for_the_original(write, tmp_path, answer):
    write("anatomy_test.csv", f"answer,question,A,B,C,D\n{answer},What is it?,one, two,3,NA\n")
    assert load_benchmark(tmp_path, mmlu(splits=("test",)))["test"].to_list() == [row()]


@pytest.mark.parametrize(
    "name",
    [
        "anatomy/test.jsonl",
        "test/anatomy.jsonl",
        "test/anatomy_test.jsonl",
        "anatomy_test.jsonl",
        "data/anatomy_test.jsonl",
        "data/anatomy/test.jsonl",
        "anatomy/test-00000-of-00001.jsonl",
        "test.jsonl",
        "data/test.jsonl",
        "all/test.jsonl",
    ],
)
def test_a_split_is_found_under_each_of_its_names(write, tmp_path, name):
    write(name, [row()])
    assert load_benchmark(tmp_path, mmlu(splits=("test",)))["test"].to_list() == [row()]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "csv", "parquet"])
def test_gsm8k_is_read_from_each_type_of_file(write, tmp_path, suffix):
    rows = [{"question": 'Say "1",\n2 ', "answer": "so\n#### 3"}]
    if suffix == "parquet":
        to_parquet(tmp_path / "test.parquet", rows)
    elif suffix == "csv":
        write("test.csv", 'question,answer\n"Say ""1"",\n2 ","so\n#### 3"\n')
    else:
        write(f"test.{suffix}", rows if suffix == "jsonl" else json.dumps(rows))
    assert load_benchmark(tmp_path, gsm8k("test"))["test"].to_list() == rows


def test_a_file_of_one_subset_is_preferred_to_the_file_of_all(write, tmp_path):
    write("test.jsonl", [row("from all")])
    write("anatomy_test.jsonl", [row("from its own")])
    data = load_benchmark(tmp_path, mmlu(splits=("test",)))
    assert data["test"]["question"][:] == ["from its own"]


def test_a_file_of_all_subsets_gives_the_wanted_ones_rows_in_order(write, tmp_path):
    write("test.jsonl", [row(str(i), ("anatomy", "virology")[i % 2]) for i in range(6)])
    assert load_benchmark(tmp_path, mmlu("virology", ("test",)))["test"]["question"][:] == [*"135"]
    assert load_benchmark(tmp_path, mmlu("anatomy", ("test",)))["test"]["question"][:] == [*"024"]
    assert len(load_benchmark(tmp_path, mmlu("all", ("test",)))["test"]) == 6


def test_a_file_of_all_subsets_without_the_wanted_one_names_those_it_has(write, tmp_path):
    write("test.jsonl", [row(subject=f"subject_{i}") for i in range(20)] + [row()])
    told = refusal(tmp_path, mmlu("anatomie", ("test",)))
    assert "no row with the 'subject' 'anatomie'" in told
    assert "The nearest is 'anatomy'." in told and "and 13 more" in told


@pytest.mark.parametrize("lacking", [{}, {"subject": None}])
def test_an_mmlu_row_of_no_subject_is_never_given_to_all_subsets(write, tmp_path, lacking):
    given = {"question": "?", "choices": CHOICES, "answer": 0} | lacking
    write("test.jsonl", [row(), given])
    told = refusal(tmp_path, mmlu(splits=("test",)))
    assert "test.jsonl, line 2: the row has no 'subject'" in told and "anatomy_test.jsonl" in told
    write("test.jsonl", [given])
    assert "line 1: the row has no 'subject'" in refusal(tmp_path, mmlu(splits=("test",)))


@pytest.mark.parametrize("name", ["validation", "val", "valid", "dev"])
def test_the_validation_split_goes_by_several_names(write, tmp_path, name):
    write(f"{name}.jsonl", [{"question": "?", "answer": "!"}])
    for split in ("validation", "val", "valid"):
        assert list(load_benchmark(tmp_path, gsm8k(split))) == [split]


def test_dev_is_the_validation_split_only_where_nothing_else_claims_the_name(write, tmp_path):
    write("dev.jsonl", [{"question": "dev", "answer": "!"}])
    told = refusal(tmp_path, gsm8k("dev", "validation"))
    assert "no file of the split 'validation'" in told and "also val, valid)" in told
    write("valid.jsonl", [{"question": "valid", "answer": "!"}])
    data = load_benchmark(tmp_path, gsm8k("validation"))
    assert data["validation"]["question"][:] == ["valid"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ('{"question": "Why?"', "broken JSON"),
        ("[1]", "must be a JSON object"),
        (row(choices=CHOICES[:3]), "'choices' must be a list of 4 texts, got 3: ['one'"),
        (row(choices=[1, 2, 3, 4]), "'choices' must be a list of 4 texts, got 4: [1, 2"),
        (row(choices="abcd"), "'choices' must be a list of 4 texts, got 'abcd'"),
        (row(answer=7), "'answer' must be A, B, C or D, or their number 0, 1, 2 or 3, got 7"),
        (row(answer=True), "got True"),
        (row(answer=2.0), "got 2.0"),
        (row(answer="E"), "got 'E'"),
        (row(answer=None), "the column 'answer' is null"),
        (row(subject=None), "the column 'subject' is null"),
        (row(question=""), "'question' must be a text that is not empty"),
        (row(question=["?"]), "'question' must be a text"),
        (LETTERS | {"A": None, "answer": 0}, "'choices' must be a list of 4 texts, got 4: [None"),
        (
            {"question": "?", "answer": 1},
            "has no column 'choices', which the benchmark reads; it has",
        ),
        ({"choices": CHOICES, "answer": 1}, "has no column 'question'"),
    ],
)
def test_a_malformed_mmlu_row_is_refused_by_file_and_line(write, tmp_path, given, expected):
    given = given if isinstance(given, str) else json.dumps(given)
    write("anatomy/test.jsonl", json.dumps(row()) + "\n" + given)
    told = refusal(tmp_path, mmlu(splits=("test",)))
    assert "anatomy/test.jsonl, line 2: " in told and expected in told


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"question": "?"}, "has no column 'answer', which the benchmark reads; it has question"),
        ({"question": "?", "answer": None}, "the column 'answer' is null"),
        ({}, "the row has no columns"),
        ({"question": "?", "answer": ["!"]}, "'answer' has the type list here, and str in"),
        ({"question": "?", "answer": 4}, "'answer' has the type int here, and str in"),
    ],
)
def test_every_row_must_have_every_wanted_column(write, tmp_path, given, expected):
    write("test.jsonl", [{"question": "?", "answer": "!"}, given])
    told = refusal(tmp_path, gsm8k("test"))
    assert "test.jsonl, line 2: " in told and expected in told


def test_a_null_in_parquet_is_refused_by_its_row_and_in_csv_by_its_line(write, tmp_path):
    to_parquet(tmp_path / "p/test.parquet", [{"question": "?", "answer": a} for a in ("!", None)])
    told = refusal(tmp_path / "p", gsm8k("test"))
    assert "test.parquet, row 2: the column 'answer' is null" in told
    write("c/test.csv", "question,answer\nWhy?,Because.\nWhy?,\n")
    assert "test.csv, line 3: the column 'answer' is empty" in refusal(
        tmp_path / "c", gsm8k("test")
    )


def test_columns_that_the_task_does_not_read_may_be_absent_or_null(write, tmp_path):
    rows = [{"question": "?", "answer": "!"}, {"question": "?", "answer": "!", "note": None}]
    write("test.jsonl", [*rows, rows[0] | {"note": "a note"}])
    assert load_benchmark(tmp_path, gsm8k("test"))["test"]["note"][:] == [None, None, "a note"]


def test_a_csv_column_of_bare_numbers_is_refused_since_its_type_is_not_known(write, tmp_path):
    wanted = Wanted("piqa", "ybisk/piqa", None, ("test",), ("goal", "label"))
    write("test.csv", "goal,label,id\nSit,0,1\nStand,1,2\n")
    told = refusal(tmp_path, wanted)
    assert "'label' holds only numbers" in told and ".jsonl or .parquet" in told
    write("test.csv", "goal,label,id\nSit,left,1\nStand,1,2\n")
    assert load_benchmark(tmp_path, wanted)["test"]["label"][:] == ["left", "1"]


def test_other_sets_that_resemble_mmlu_keep_their_own_columns(write, tmp_path):
    wanted = Wanted("turkishmmlu", "AYueksel/TurkishMMLU", "Biology", ("test",), COLUMNS)
    given = {"question": "Ne?", "choices": [*"vwxyz"], "answer": "E"}
    write("Biology/test.jsonl", [given])
    assert load_benchmark(tmp_path, wanted)["test"].to_list() == [given]


# Clones of the hub's repositories


README = """---
language: en
configs:
- config_name: anatomy
  data_files:
  - split: test
    path: parts/anat-t*
  - split: validation
    path: [parts/anat-v.jsonl]
- config_name: virology
  default: true
  data_dir: other
  data_files:
    test: v.jsonl
---
# A card
"""


def test_a_clone_is_read_by_what_its_readme_declares(write, tmp_path):
    write("README.md", README)
    write("parts/anat-t-00000-of-00002.jsonl", [row("1")])
    write("parts/anat-t-00001-of-00002.jsonl", [row("2")])
    write("parts/anat-v.jsonl", [row("3")])
    write("other/v.jsonl", [row("4", "virology")])
    write("test.jsonl", [row("not declared")])
    data = load_benchmark(tmp_path, mmlu(splits=("test", "val")))
    assert data["test"]["question"][:] == ["1", "2"]
    assert data["val"]["question"][:] == ["3"]
    assert load_benchmark(tmp_path, mmlu(None, ("test",)))["test"]["question"][:] == ["4"]
    write("parts/anat-v.jsonl", "")
    assert "anat-v.jsonl is empty" in refusal(tmp_path, mmlu(splits=("val",)))


@pytest.mark.parametrize(
    "pattern", ["**.jsonl", "data/**", "**/x.*", "./data/x.jsonl", "*/x-*[0-9]*"]
)
def test_a_readmes_patterns_are_the_hubs(write, tmp_path, pattern):
    parts = [{"split": "test", "path": pattern}]
    configs = json.dumps([{"config_name": "main", "data_files": parts}])
    write("README.md", f"---\nconfigs: {configs}\n---\n")
    name = "x.jsonl" if pattern == "**.jsonl" else "data/x.jsonl"
    write(name if "-" not in pattern else "data/x-1.jsonl", [{"question": "?", "answer": "!"}])
    write("data/.x.jsonl", "hidden")
    assert len(load_benchmark(tmp_path, gsm8k("test"))["test"]) == 1


@pytest.mark.parametrize(
    "readme",
    ["no front matter", "---\n: [\n---\n", "---\nconfigs: 3\n---\n", "---\nconfigs: [a, b]\n---\n",
     "---\nconfigs:\n- config_name: main\n  data_files: test.csv\n---\n",
     "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: /etc/*\n---\n",
     "---\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: 3\n---\n"],
)  # fmt: skip
def test_a_readme_that_declares_nothing_leaves_it_to_the_names_of_files(write, tmp_path, readme):
    write("README.md", readme)
    write("main/test.jsonl", [{"question": "?", "answer": "!"}])
    assert len(load_benchmark(tmp_path, gsm8k("test"))["test"]) == 1


@pytest.mark.parametrize("place", ["main", "data", "main/../data", "default", ""])
def test_a_clone_without_a_readme_is_read_by_its_folders_and_names(tmp_path, place):
    for i in range(2):
        rows = [{"question": f"{i}", "answer": "!"}]
        to_parquet(tmp_path / place / f"train-0000{i}-of-00002.parquet", rows)
    to_parquet(tmp_path / place / "test-00000-of-00001-0123456789abcdef.parquet", rows)
    to_parquet(tmp_path / "socratic" / "test-00000-of-00001.parquet", rows * 9)
    data = load_benchmark(tmp_path, gsm8k())
    assert data["train"]["question"][:] == ["0", "1"] and len(data["test"]) == 1


def test_parquet_keeps_the_features_that_it_carries(tmp_path):
    features = Features(
        {
            "question": Value("large_string"),
            "answer": ClassLabel(names=["no", "yes"]),
            "choices": {"text": List(Value("string")), "label": List(Value("int8"))},
        }
    )
    rows = [{"question": "?", "answer": 1, "choices": {"text": ["a"], "label": [1]}}]
    to_parquet(tmp_path / "main/test-00000-of-00001.parquet", rows, features)
    data = load_benchmark(tmp_path, gsm8k("test"))["test"]
    assert data.features == features and data.to_list() == rows


def test_the_hubs_mmlu_is_read_from_its_subsets_and_from_all(tmp_path):
    features = Features(
        question=Value("string"),
        subject=Value("string"),
        choices=List(Value("string")),
        answer=ClassLabel(names=["A", "B", "C", "D"]),
    )
    rows = [row(), row("Another?", "virology", 0)]
    for folder in ("anatomy", "all"):
        for split in ("test", "validation", "dev"):
            given = rows if folder == "all" else rows[:1]
            to_parquet(tmp_path / f"{folder}/{split}-00000-of-00001.parquet", given, features)
    for subset, split in [("anatomy", "test"), ("virology", "dev"), ("virology", "validation")]:
        data = load_benchmark(tmp_path, mmlu(subset, (split,)))[split]
        assert data.features == features
        assert data.to_list() == [one for one in rows if one["subject"] == subset]


def test_a_folder_of_the_hubs_cache_is_read_through_its_links(write, tmp_path):
    blob = write("cache/blobs/0af3", [row()])
    link = tmp_path / "cache/snapshots/12ab/anatomy/test.jsonl"
    link.parent.mkdir(parents=True)
    link.symlink_to(blob)
    data = load_benchmark(tmp_path / "cache", mmlu(splits=("test",)))
    assert data["test"].to_list() == [row()]
    Path(blob).unlink()
    assert "test.jsonl cannot be read: No such file" in refusal(
        tmp_path / "cache", mmlu(splits=("test",))
    )


@pytest.mark.parametrize("name", ["main/test-00000-of-00001.parquet", "test.jsonl", "test.csv"])
def test_a_git_lfs_pointer_is_named_as_one(write, tmp_path, name):
    write(name, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    told = refusal(tmp_path, gsm8k("test"))
    assert f"{name} is a git-lfs pointer, not the data. Type: git lfs pull" in told


def test_a_missing_or_superfluous_shard_is_refused(write, tmp_path):
    write("main/test-00000-of-00002.jsonl", [{"question": "?", "answer": "!"}])
    told = refusal(tmp_path, gsm8k("test"))
    assert "is one of 2 shards by its name, and 1 were found" in told
    shard = tmp_path / "main/test-00000-of-00002.jsonl"
    assert "is one of 2 shards by its name" in refusal(shard, gsm8k("test"))
    write("main/test-00001-of-00002.jsonl", [{"question": "?", "answer": "!"}])
    assert len(load_benchmark(tmp_path, gsm8k("test"))["test"]) == 2
    write("main/test-00001-of-00002-0123456789.jsonl", [{"question": "?", "answer": "!"}])
    assert "is one of 2 shards by its name, and 3 were found" in refusal(tmp_path, gsm8k("test"))


def test_shards_of_two_folders_are_two_series(write, tmp_path):
    part = {"split": "test", "path": ["a/*", "b/*"]}
    configs = json.dumps([{"config_name": "main", "data_files": [part]}])
    write("README.md", f"---\nconfigs: {configs}\n---\n")
    for folder in "ba":
        write(f"{folder}/test-00000-of-00001.jsonl", [{"question": folder, "answer": "!"}])
    assert load_benchmark(tmp_path, gsm8k("test"))["test"]["question"][:] == ["a", "b"]


def test_two_files_for_one_split_are_refused_rather_than_joined(write, tmp_path):
    write("test.jsonl", [{"question": "?", "answer": "!"}])
    write("test.csv", "question,answer\n?,!\n")
    told = refusal(tmp_path, gsm8k("test"))
    assert "holds test.csv and test.jsonl" in told and "Keep one" in told


# What is missing


def test_a_path_that_does_not_exist_suggests_near_names(write, tmp_path):
    write("gsm8k.jsonl", [{}])
    told = refusal(tmp_path / "gsm8.jsonl", gsm8k("test"))
    assert "do not exist" in told and f"Did you mean {tmp_path}/gsm8k.jsonl?" in told


def test_a_missing_split_is_named_with_the_files_that_were_looked_for(write, tmp_path):
    write("test/anatomy_test.csv", CSV_ROW)
    told = refusal(tmp_path, mmlu())
    assert "no file of the split 'dev' of the subset 'anatomy'" in told
    assert "dev/anatomy_dev" in told and "anatomy/dev" in told and ".parquet" in told
    assert "Its data files are: test/anatomy_test.csv." in told
    (tmp_path / "empty").mkdir()
    assert "Its data files are: none." in refusal(tmp_path / "empty", gsm8k())


@pytest.mark.parametrize(
    "form", ["{0}/test.jsonl", "test/{0}_test.jsonl", "data/test/{0}.jsonl", "{0}_test.jsonl"]
)
def test_a_missing_subset_is_told_with_the_nearest_there(write, tmp_path, form):
    for subset in ("anatomy", "astronomy", "virology"):
        write(form.format(subset), [row()])
    told = refusal(tmp_path, mmlu("anatomie", ("test",)))
    assert "There is no subset 'anatomie'. The nearest is 'anatomy'" in told
    assert "There are: anatomy, astronomy, virology." in told


def test_a_subset_that_a_readme_does_not_declare_is_told_with_those_it_does(write, tmp_path):
    write("README.md", README)
    told = refusal(tmp_path, mmlu("anatomie", ("test",)))
    assert "The nearest is 'anatomy'. There are: anatomy, virology." in told


# A single file


def test_a_single_file_serves_one_split(write, tmp_path):
    file = write("anything.jsonl", [{"question": "?", "answer": "!"}])
    assert len(load_benchmark(Path(file), gsm8k("test"))["test"]) == 1
    told = refusal(file, gsm8k())
    assert "reads the splits train and test" in told and "is one file" in told
    assert "train.jsonl and test.jsonl, or main/train.jsonl and main/test.jsonl" in told


def test_a_single_file_of_all_subsets_is_chosen_from(write, tmp_path):
    file = Path(write("mmlu.jsonl", [row(), row("?", "virology")]))
    data = load_benchmark(file, mmlu("virology", ("test",)))
    assert data["test"]["question"][:] == ["?"]


@pytest.mark.parametrize("name", ["anatomy_test.csv", "anatomy.csv", "test/anatomy.csv"])
def test_a_single_file_named_after_a_subset_is_that_subsets_and_no_others(write, name):
    file = Path(write(name, CSV_ROW))
    assert load_benchmark(file, mmlu(splits=("test",)))["test"].to_list() == [row()]
    told = refusal(file, mmlu("virology", ("test",)))
    assert "line 1: the row has no 'subject', so nothing says whether it is of 'virology'" in told


def test_a_single_file_named_as_another_split_is_refused(write):
    file = write("gsm8k-train.jsonl", [{"question": "?", "answer": "!"}])
    told = refusal(file, gsm8k("test"))
    assert "reads the split 'test'" in told and "named as the split 'train'" in told
    assert len(load_benchmark(Path(file), gsm8k("train"))["train"]) == 1


def test_a_file_of_an_unknown_type_is_told_the_known_ones(write):
    assert ".jsonl, .json, .csv, .parquet" in refusal(write("test.txt", "x"), gsm8k("test"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_refused(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir(mode=0)
    assert "cannot be read: Permission denied" in refusal(folder, gsm8k("test"))


def test_a_folder_in_place_of_a_file_is_refused(tmp_path):
    (tmp_path / "test.jsonl").mkdir()
    assert "test.jsonl cannot be read: Is a directory" in refusal(tmp_path, gsm8k("test"))


# Speed, and files that change


def test_a_changed_file_never_serves_old_rows(write, tmp_path):
    file = Path(write("test.jsonl", [{"question": "old", "answer": "!"}]))
    before = file.stat()
    assert load_benchmark(file, gsm8k("test"))["test"]["question"][:] == ["old"]
    time.sleep(0.02)
    write("test.jsonl", [{"question": "new", "answer": "!"}])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert load_benchmark(file, gsm8k("test"))["test"]["question"][:] == ["new"]


def test_a_caller_that_changes_rows_does_not_change_what_is_read_next(write, tmp_path):
    write("test.jsonl", [row(), row("?", "virology")])
    data = load_benchmark(tmp_path, mmlu("all", ("test",)))["test"]
    data.to_list()[0]["choices"].append("five")
    data[0]["choices"].append("five")
    assert load_benchmark(tmp_path, mmlu("all", ("test",)))["test"][0] == row()


def test_reading_says_nothing_and_leaves_no_cache(write, tmp_path, capfd):
    to_parquet(tmp_path / "a/main/test-00000-of-00001.parquet", [{"question": "?", "answer": "!"}])
    capfd.readouterr()
    load_benchmark(tmp_path / "a", gsm8k("test"))
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "cache").exists()


def test_a_file_of_all_subsets_is_parsed_once(write, tmp_path):
    write("test.jsonl", [row(str(i), f"subject_{i % 57}") for i in range(5700)])
    write("dev.jsonl", [row(str(i), f"subject_{i % 57}") for i in range(285)])
    benchmark._parse.cache_clear()
    for i in range(57):
        data = load_benchmark(tmp_path, mmlu(f"subject_{i}"))
        assert (len(data["test"]), len(data["dev"])) == (100, 5)
    assert benchmark._parse.cache_info().misses == 2


# The real data


@real_data
def test_all_57_subjects_of_the_real_mmlu_are_read():
    files = sorted((SHARED / "mmlu" / "test").glob("*_test.csv"))
    subjects = [file.stem.removesuffix("_test") for file in files]
    assert len(subjects) == 57
    splits = ("test", "validation", "dev")
    benchmark._parse.cache_clear()
    all_data = [load_benchmark(SHARED / "mmlu", mmlu(subject, splits)) for subject in subjects]
    counts = [sum(len(data[split]) for data in all_data) for split in splits]
    assert counts == [14_079, 1_542, 285]
    for subject, file, data in zip(subjects, files, all_data, strict=True):
        with open(file, encoding="utf-8", newline="") as lines:
            cells = [
                [one["question"], *one["choices"], "ABCD"[one["answer"]]] for one in data["test"]
            ]
            assert cells == list(csv.reader(lines))
        assert {*data["test"]["subject"]} == {subject}


@real_data
def test_the_real_gsm8k_is_read():
    data = load_benchmark(SHARED / "gsm8k", gsm8k())
    assert (len(data["train"]), len(data["test"])) == (7_473, 1_319)
    lines = (SHARED / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    assert data["test"].to_list() == [json.loads(line) for line in lines]

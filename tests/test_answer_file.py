"""The file of answers: it replaces nothing of the user's, and loses no finished answer."""

import json
import os
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from prefixtune_cli.answer_file import AnswerFile
from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import Interrupted, PtpError, ResourceError, RunDirError

ROWS: list[dict[str, Any]] = [{"prompt": "One?", "answer": "1"}, {"prompt": "Two?"}]


def opened(path: Path, rows: list[dict[str, Any]] = ROWS, *, overwrite: bool = False) -> AnswerFile:
    return AnswerFile(path, rows, [], overwrite=overwrite)


def fail(file: AnswerFile, error: BaseException) -> None:
    """Answer one row, and fail."""
    with file:
        file.add(1, "x")
        raise error


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_answers_stand_in_the_order_of_the_rows_beside_their_columns(tmp_path: Path) -> None:
    with opened(tmp_path / "new" / "answers.jsonl") as file:
        file.add(1, "zwei")
        assert [row["generated"] for row in lines(file.part)] == ["zwei"]
        file.add(0, "eins")
    assert lines(file.path) == [
        {"prompt": "One?", "answer": "1", "generated": "eins"},
        {"prompt": "Two?", "generated": "zwei"},
    ]
    assert os.listdir(file.path.parent) == ["answers.jsonl"]


def test_the_models_column_has_a_name_that_the_data_has_not(tmp_path: Path) -> None:
    rows = [{"generated": "of the base"}, {"generated_2": "of another"}]
    assert opened(tmp_path / "a", rows).column == "generated_3"


def test_what_json_does_not_know_stays_readable(tmp_path: Path) -> None:
    rows = [{"day": date(2020, 1, 2), "share": float("nan"), "half": "\ud83d"}]
    with opened(tmp_path / "answers.jsonl", rows) as file:
        file.add(0, "x")
    assert lines(file.path) == [
        {"day": "2020-01-02", "share": None, "half": "\ud83d", "generated": "x"}
    ]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("as_what", ["itself", "link", "other spelling"])
def test_the_data_is_never_replaced(as_what: str, overwrite: bool, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}")
    out = {"link": tmp_path / "link.jsonl", "other spelling": tmp_path / "x" / ".." / "data.jsonl"}
    (tmp_path / "link.jsonl").symlink_to(data)
    (tmp_path / "x").mkdir()
    with pytest.raises(RunDirError, match=r"would replace .*, which --data reads"):
        AnswerFile(out.get(as_what, data), ROWS, [data], overwrite=overwrite)
    assert data.read_text() == "{}"


def test_a_file_that_is_there_is_replaced_by_request_alone_and_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    out.write_text("mine")
    with pytest.raises(RunDirError, match=r"exists already\. Type --overwrite"):
        opened(out)
    with opened(out, overwrite=True) as file:
        file.add(0, "x")
        assert out.read_text() == "mine"
    assert lines(out)[0]["generated"] == "x"


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="is a folder"):
        opened(tmp_path, overwrite=True)


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_answered(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="file is a file"), opened(tmp_path / "file" / "a"):
        pytest.fail("the block was entered")


def test_an_interrupted_command_keeps_its_answers_and_says_where(tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    file = opened(out)
    with pytest.raises(Interrupted, match=r"1 of 2 answers are kept in .*answers\.part\.jsonl"):
        fail(file, KeyboardInterrupt())
    assert lines(file.part)[0]["generated"] == "x"
    assert not out.exists()
    with pytest.raises(RunDirError, match="holds the answers of a command that was cut off"):
        opened(out)


def test_a_failing_command_keeps_its_answers_and_says_where(tmp_path: Path) -> None:
    file = opened(tmp_path / "answers.jsonl")
    with pytest.raises(PtpError) as failed:
        fail(file, PtpError("The memory does not suffice."))
    assert failed.value.__notes__ == [f"1 of 2 answers are kept in {file.part}."]
    assert lines(file.part)[0]["generated"] == "x"


def test_a_command_that_fails_before_its_first_answer_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "asked.jsonl"
    data.write_text(json.dumps(ROWS[0]))
    arguments = ["generate", "--model", str(tmp_path / "none"), "--data", str(data)]
    done = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "answers.jsonl")])
    assert done.exit_code != 0
    assert list(tmp_path.iterdir()) == [data]

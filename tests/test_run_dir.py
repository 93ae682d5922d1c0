"""The run directory: names, and files that are whole or not there."""

import json
import math
from pathlib import Path

import pytest

from prefixtune_cli.errors import RunDirError
from prefixtune_cli.run_dir import RunDir, write_atomically, write_json


def test_a_failing_writer_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"loss": 1})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        write_atomically(file, fail)
    assert json.loads(file.read_text()) == {"loss": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_content_may_be_text_bytes_or_a_writer(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "a", "é")
    write_atomically(tmp_path / "b", b"\xff")
    write_atomically(tmp_path / "c", lambda path: path.write_text("c"))
    assert (tmp_path / "new" / "a").read_text(encoding="utf-8") == "é"
    assert (tmp_path / "b").read_bytes() == b"\xff"
    assert (tmp_path / "c").read_text() == "c"


def test_only_whole_checkpoints_count_and_the_newest_is_last(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-11", "checkpoint-best"):
        (tmp_path / name).mkdir()
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best"):
        (tmp_path / name / "trainer_state.json").write_text("{}")
    assert [p.name for p in RunDir(tmp_path).checkpoints()] == ["checkpoint-9", "checkpoint-10"]


def test_a_taken_directory_is_refused_with_what_to_type(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(overwrite=False)
    run_dir.recipe.write_text("model: {}")
    with pytest.raises(RunDirError) as unfinished:
        run_dir.create(overwrite=False)
    assert "--overwrite" in str(unfinished.value)
    assert "Type --resume to go on" in str(unfinished.value)
    write_json(run_dir.summary, {})
    with pytest.raises(RunDirError) as finished:
        run_dir.create(overwrite=False)
    assert "--resume" not in str(finished.value)
    run_dir.create(overwrite=True)
    assert list(run_dir.path.iterdir()) == []


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir(tmp_path / "run").create(overwrite=True)


def test_metrics_survive_a_torn_last_line_and_can_be_cut_back(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    for step in (1, 2, 3):
        run_dir.append_metrics({"step": step, "loss": 1 / step})
    with open(run_dir.metrics, "a") as file:
        file.write('{"step": 4, "lo')
    assert [row["step"] for row in run_dir.read_metrics()] == [1, 2, 3]
    run_dir.truncate_metrics(2)
    assert run_dir.metrics.read_text().count("\n") == 2


def test_json_has_null_for_what_is_not_a_finite_number(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"a": [1.5, math.nan, (math.inf,)], "b": {"c": -math.inf, "d": "NaN"}})
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    assert found == {"a": [1.5, None, [None]], "b": {"c": None, "d": "NaN"}}

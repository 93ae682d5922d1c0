"""The run directory: its names, and files that are whole or absent."""

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


def test_half_a_surrogate_pair_is_written_as_the_escape_that_it_was(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"id": "é\ud83d"})
    assert (tmp_path / "a.json").read_text() == '{\n  "id": "\\u00e9\\ud83d"\n}\n'


def checkpoint(run_dir: RunDir, step: int, content: bytes = b"weights") -> Path:
    part = run_dir.checkpoint_part / f"checkpoint-{step}"
    part.mkdir(parents=True)
    (part / "adapter_model.safetensors").write_bytes(content)
    (part / "trainer_state.json").write_text("{}")
    run_dir.seal(part, step)
    return run_dir.checkpoint(step)


def test_only_sealed_checkpoints_count_and_the_newest_is_last(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.newest_whole_checkpoint() == (None, [])
    for step in (9, 10):
        checkpoint(run_dir, step)
    (tmp_path / "checkpoint-11").mkdir()
    (tmp_path / "checkpoint-11" / "trainer_state.json").write_text("{}")
    assert [p.name for p in run_dir.checkpoints()] == ["checkpoint-9", "checkpoint-10"]
    assert run_dir.newest_whole_checkpoint() == (tmp_path / "checkpoint-10", [])
    run_dir.drop_old_checkpoints(1)
    assert [p.name for p in run_dir.checkpoints()] == ["checkpoint-10"]


@pytest.mark.parametrize("harm", ["truncated", "changed", "missing", "unreadable"])
def test_a_damaged_checkpoint_is_skipped_and_told(harm: str, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    older, newer = checkpoint(run_dir, 9), checkpoint(run_dir, 10)
    weights = newer / "adapter_model.safetensors"
    if harm == "truncated":
        weights.write_bytes(b"weig")
    elif harm == "changed":
        weights.write_bytes(b"weighty")
    elif harm == "missing":
        weights.unlink()
    else:
        (newer / "sha256.json").write_text("{")
    found, said = run_dir.newest_whole_checkpoint()
    assert found == older
    assert len(said) == 1
    assert "checkpoint-10 is damaged and left out: " in said[0]
    if harm != "unreadable":
        assert "adapter_model.safetensors" in said[0]


def test_a_checkpoint_is_replaced_whole(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    checkpoint(run_dir, 9, b"old")
    replaced = checkpoint(run_dir, 9, b"new")
    assert (replaced / "adapter_model.safetensors").read_bytes() == b"new"
    assert run_dir.newest_whole_checkpoint() == (replaced, [])


def test_what_a_run_leaves_that_died_before_its_recipe_was_written_takes_no_directory(
    tmp_path: Path,
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run_dir.create(overwrite=False)
    write_json(run_dir.environment, {})
    (run_dir.path / ".recipe.123.part.yaml").write_text("half")
    run_dir.create(overwrite=False)
    assert list(run_dir.path.iterdir()) == []
    (run_dir.path / "notes.txt").write_text("mine")
    with pytest.raises(RunDirError, match="is not empty"):
        run_dir.create(overwrite=False)
    with pytest.raises(RunDirError, match="not a run directory"):
        run_dir.create(overwrite=True)


def test_what_is_left_of_a_dead_run_is_told_with_what_to_type(tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    assert run_dir.how_to_go_on == "No checkpoint was saved yet."
    run_dir.recipe.write_text("model: {}")
    assert run_dir.how_to_go_on.startswith(
        "No checkpoint was saved yet. To begin again, type: ptp "
    )
    checkpoint(run_dir, 7)
    assert "saved up to step 7" in run_dir.how_to_go_on
    assert run_dir.how_to_go_on.endswith(run_dir.resume_command)


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

"""What the user points at, with hand-made folders; no model is needed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import AdapterError, RunDirError, UsageError
from prefixtune_cli.lock import locked
from prefixtune_cli.pointed import base_key, choose, point, settings_of_start
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.run_list import list_runs, newest_finished


def adapter(folder: Path, base: str | None = "tiny") -> Path:
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "base_model_name_or_path": base, "revision": None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    return folder


def run(folder: Path, *, finished: bool = True, **data: Any) -> Path:
    """A run on `tiny` in 32 bits, with or without its adapter."""
    folder.mkdir(parents=True)
    recipe = {"model": {"name": "tiny", "bits": 32}, "adapter": {"method": "lora"}, "data": data}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    if finished:
        adapter(folder / "adapter")
        (folder / "summary.json").write_text('{"adapter": {"loss": 0.25}}')
    return folder


def checkpoint(of: Path, step: int) -> Path:
    saved = adapter(of / f".part-{step}")
    RunDir(of).seal(saved, step)
    return of / f"checkpoint-{step}"


def test_a_run_on_pairs_reads_answers_without_the_columns_of_pairs(tmp_path: Path) -> None:
    folder = run(
        tmp_path / "mine",
        map={"prompt": "ask", "chosen": "better"},
        format="preference",
        max_length=64,
    )
    saved = json.loads((folder / "recipe.yaml").read_text())
    saved["train"] = {"objective": "dpo"}
    (folder / "recipe.yaml").write_text(json.dumps(saved))
    reading = point(folder).reading
    assert (reading.map, reading.format, reading.max_length) == ({"prompt": "ask"}, "auto", 64)


def started(folder: Path, *sets: str) -> Any:
    return resolve(None, [f"train.start_from={folder}", *sets], None, settings_of_start)


def test_what_a_recipe_leaves_open_is_that_of_the_run_it_goes_on_from(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine")
    saved = json.loads((folder / "recipe.yaml").read_text())
    saved["adapter"] |= {"r": 3, "dropout": 0.1, "config": {"use_rslora": True}}
    (folder / "recipe.yaml").write_text(json.dumps(saved))
    found = started(folder)
    assert (found.model.name, found.model.bits, found.names_base) == ("tiny", 32, True)
    assert (found.adapter.r, found.adapter.dropout) == (3, 0.1)
    assert found.adapter.config == {"use_rslora": True}
    assert found.train.learning_rate is None
    typed = started(folder, "model.bits=4", "adapter.alpha=5")
    assert (typed.model.name, typed.model.bits) == ("tiny", 4)
    assert (typed.adapter.r, typed.adapter.alpha) == (3, 5)
    assert started(folder, "model.name=other").model.bits == 16
    assert started(folder, "adapter.method=ia3").adapter.config == {}
    for objective in ("dpo", "kto"):
        assert started(folder, f"train.objective={objective}").adapter.dropout == 0


def test_a_bare_folder_tells_what_its_configuration_has(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "bare", base=None)
    config = {"peft_type": "LORA", "r": 3, "lora_dropout": 0.1, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = started(folder)
    assert (found.adapter.r, found.adapter.dropout) == (3, 0.1)
    assert found.adapter.target_modules == ["q_proj"]
    assert not found.names_base
    config = {"peft_type": "PREFIX_TUNING_PLUS", "sites": "ffn", "rank": 2, "layers": [1, 2]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    found = started(folder, "train.objective=dpo")
    assert (found.adapter.sites, found.adapter.rank, found.adapter.layers) == ("ffn", 2, [1, 2])
    assert found.adapter.basis


def test_a_run_its_adapter_folder_and_its_checkpoint_are_known_as_the_runs(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine", map={"prompt": "ask", "completion": "say"})
    saved = checkpoint(folder, 7)
    for given, where, name in (
        (folder, folder / "adapter", "mine"),
        (folder / "adapter", folder / "adapter", "mine"),
        (saved, saved, "mine-checkpoint-7"),
    ):
        found = point(given)
        assert found.run is not None
        assert (found.folder, found.run.path, found.name) == (where, folder, name)
        assert (found.base.name, found.base.bits, found.method) == ("tiny", 32, "lora")
        assert found.reading.map == {"prompt": "ask", "completion": "say"}
        assert found.as_trained == (where.name == "adapter")


@pytest.mark.parametrize("flag", ["runs", "adapters", "model"])
@pytest.mark.parametrize("what", ["", "adapter", "checkpoint-7"])
def test_what_lies_in_a_run_is_understood_whatever_flag_it_is_given_to(
    flag: str, what: str, tmp_path: Path
) -> None:
    folder = run(tmp_path / "mine")
    checkpoint(folder, 7)
    given = str(folder / what)
    [found] = choose(**{flag: given if flag == "model" else [given]})
    same = point(given)
    assert (found.folder, found.model, found.method) == (same.folder, same.model, same.method)
    assert found.run is not None


def test_an_adapter_folder_that_names_its_base_needs_no_model(tmp_path: Path) -> None:
    [found] = choose(adapters=[str(adapter(tmp_path / "a"))], typed={"bits": 4})
    assert (found.base.name, found.base.bits) == ("tiny", 4)


def test_an_adapter_folder_that_names_none_is_told_what_to_type(tmp_path: Path) -> None:
    [found] = choose(adapters=[str(adapter(tmp_path / "a", None))])
    with pytest.raises(UsageError, match="Type --model NAME"):
        _ = found.base
    [found] = choose(adapters=[str(tmp_path / "a")], model="tiny")
    assert found.base.name == "tiny"


def test_a_base_that_has_moved_is_named_beside_the_run(tmp_path: Path) -> None:
    folder = run(tmp_path / "mine")
    [found] = choose(runs=[str(folder)], model=str(tmp_path))
    assert (found.base.name, found.base.bits) == (str(tmp_path), 32)
    assert not found.as_trained  # results on another base do not belong to the run


def test_an_unfinished_run_is_used_through_its_newest_whole_checkpoint_and_says_so(
    tmp_path: Path,
) -> None:
    folder = run(tmp_path / "mine", finished=False)
    with pytest.raises(RunDirError, match=r"has no adapter yet and no checkpoint.*--resume"):
        point(folder)
    older, damaged = checkpoint(folder, 5), checkpoint(folder, 10)
    (damaged / "adapter_model.safetensors").write_bytes(b"cut")
    found = point(folder)
    assert (found.folder, found.given, found.as_trained) == (older, str(older), False)
    said = " ".join(found.notices)
    assert "checkpoint-10 is damaged and left out" in said
    assert "is not finished: its checkpoint of step 5 is used" in said
    assert "--resume" in said


def test_without_a_flag_the_newest_finished_run_below_runs_is_taken_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"no finished run below runs/.*--run FOLDER, or --model"):
        choose()
    for age, name in ((30, "old"), (10, "deeper/new")):
        summary = run(Path("runs") / name) / "summary.json"
        os.utime(summary, (1e9 - age, 1e9 - age))
    run(Path("runs/going-on"), finished=False)
    [found] = choose()
    assert found.given == "runs/deeper/new"
    assert found.notices[0].startswith(
        "Taking runs/deeper/new, the newest finished run below runs/"
    )


def test_flags_that_name_two_things_are_refused(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), adapter(tmp_path / "b")
    with pytest.raises(UsageError, match="--run has its own adapter"):
        choose(runs=[str(one)], adapters=[str(other)])
    with pytest.raises(UsageError, match="is a run or an adapter, and so is"):
        choose(runs=[str(one)], model=str(other))


def test_what_is_neither_a_run_nor_an_adapter_is_told_from_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(Path("runs/mine"))
    Path("base").mkdir()
    Path("base/config.json").write_text("{}")
    Path("bare").mkdir()
    Path("bare/adapter_model.safetensors").write_bytes(b"")
    Path("file.txt").write_text("")
    adapter(Path("pickled"))
    Path("pickled/adapter_model.safetensors").rename("pickled/adapter_model.bin")
    adapter(Path("cut"))
    Path("cut/adapter_config.json").write_text("{")
    for given, said in {
        "mine": "There is no run or adapter mine. Did you mean runs/mine?",
        "runs/mime": "Did you mean runs/mine?",
        "runs": "It holds 1: runs/mine",
        "base": "is a base, not a run or an adapter. Type: --model base",
        "bare": "has weights but no adapter_config.json",
        "file.txt": "is a file, not a run or an adapter",
        "pickled": "pickle (adapter_model.bin), which is never read",
        "cut": "cannot be read",
    }.items():
        with pytest.raises(AdapterError) as caught:
            point(given)
        assert said in str(caught.value), given


def test_bases_are_the_same_however_they_are_spelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("b").mkdir()

    def key(name: str, revision: str | None = None) -> str:
        return base_key(ModelSection(name=name, revision=revision))

    assert key("b") == key("./b") == key(str(tmp_path / "b"))
    assert key("mistral-7b") == key("mistralai/Mistral-7B-v0.3")
    assert key("mistral-7b") != key("mistral-7b", "v2")
    assert key("./gone") == "./gone"


def test_runs_are_listed_newest_first_with_their_state(tmp_path: Path) -> None:
    done, going, broken = (tmp_path / name for name in ("done", "x/going", "broken"))
    run(done)
    run(going, finished=False)
    checkpoint(going, 5)
    run(broken, finished=False)
    (broken / "recipe.yaml").write_text("model: [")
    for age, file in enumerate(
        (going / "recipe.yaml", done / "summary.json", broken / "recipe.yaml")
    ):
        os.utime(file, (1e9 - age, 1e9 - age))
    told = [(one.run, one.model, one.method, one.state, one.loss) for one in list_runs(tmp_path)]
    assert told == [
        (str(going), "tiny", "lora", "unfinished, saved at step 5", None),
        (str(done), "tiny", "lora", "finished", 0.25),
        (str(broken), None, None, "its recipe cannot be read", None),
    ]
    with locked(done), locked(going):
        states = {one.run: one.state for one in list_runs(tmp_path)}
    assert states[str(going)] == "running, saved at step 5"
    assert states[str(done)] == "finished"
    newest = newest_finished(tmp_path)
    assert newest is not None
    assert newest.path == done

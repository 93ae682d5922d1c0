"""Methods are trained, judged and compared, on a base of two layers, for two steps."""

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from prefixtune_cli.compare import cells
from prefixtune_cli.compare.cells import BASES, is_done
from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Comparison
from prefixtune_cli.compare.contest import Settings
from prefixtune_cli.compare.legend import legend
from prefixtune_cli.compare.run import compare
from prefixtune_cli.errors import UsageError
from prefixtune_cli.parallel import devices
from prefixtune_cli.recipe.load import difference, resolve
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.train import train
from tests.heard import Heard
from tests.train.zygote import Start

COLOURS = ("red", "blue", "green", "white")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"say {COLOURS[i % 4]} {i}", "completion": COLOURS[i % 4]} for i in range(80)
    ]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def settings(base: Path, data: Path, out: Path, **changes: Any) -> Settings:
    flags = {
        "model": {"name": str(base), "bits": 32},
        "data": {"train": str(data), "eval_split": 0.1},
        "train": {"max_steps": 2, "batch_size": 4},
        "evaluate": {"max_rows": 8, "max_new_tokens": 8},
    }
    how = {"seeds": 2, "sweep": 2, "speed": False, "workers": 1, "methods": ("lora", "full")}
    return Settings(**{"flags": flags, "out": str(out), **how, **changes})


def found(made: Settings) -> Comparison:
    return compare(made)[0]


@pytest.fixture(autouse=True)
def _no_base_is_left() -> Any:
    yield
    BASES.release()


def test_each_method_has_its_sweep_and_a_cell_a_seed_on_the_same_rows(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The sun is in the sky. " * 20, encoding="utf-8")
    out = tmp_path / "out"
    made = settings(
        random_base, data, out, ood=str(data), text=str(text),
        methods=("prefix-tuning-plus", "lora", "prefix-tuning", "full"),
    )  # fmt: skip
    told = found(made)
    assert not told.failed
    assert [c.label for c in told.contestants] == list(made.methods)
    for one in told.contestants:
        rates = [point.learning_rate for point in one.sweep]
        assert len(rates) == 2
        assert one.learning_rate in rates
        best = max(one.sweep, key=lambda p: (p.exact_match or 0.0, -(p.loss or 0.0)))
        assert one.learning_rate == best.learning_rate
        assert [cell.seed for cell in one.cells] == [0, 1]
        assert all(cell.steps == 2 and cell.losses for cell in one.cells)
        for name in (TEST, OOD, FORGETTING):
            for mine, base in zip(one.results(name), [told.base[name]] * 2, strict=True):
                assert mine.tokens == base.tokens
                assert len(mine.nats) == len(base.nats)
        assert all(len(result.right or ()) == 8 for result in one.results())
        assert one.results()[0].nats != told.base[TEST].nats
    recipes = [resolve(f"{c.cells[0].run}/recipe.yaml") for c in told.contestants]
    for other in recipes[1:]:
        differing = {line.split(":")[0] for line in difference(recipes[0], other)}
        assert {k for k in differing if not k.startswith("adapter.")} <= {
            "train.learning_rate", "train.save_minutes", "out",
        }  # fmt: skip
    again = Comparison.read(out / "results.json")
    assert json.loads(json.dumps(again.to_json())) == json.loads(json.dumps(told.to_json()))


def test_a_cell_is_the_run_that_train_makes_of_its_recipe_byte_for_byte(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    """Even though earlier cells have used the same base."""
    methods = ("prefix-tuning-plus", "lora", "prefix-tuning", "full")
    told = found(settings(random_base, data, tmp_path / "out", methods=methods, sweep=1, seeds=2))
    for one in told.contestants:
        cell = Path(one.cells[-1].run)
        alone = tmp_path / "alone" / one.label
        recipe = resolve(str(cell / "recipe.yaml")).model_copy(update={"out": str(alone)})
        train(recipe)
        for file in alone.joinpath("adapter").glob("*.safetensors"):
            assert file.read_bytes() == (cell / "adapter" / file.name).read_bytes(), one.label
        scores = [json.loads((run / "summary.json").read_text()) for run in (alone, cell)]
        for who in ("base", "adapter"):
            assert scores[0][who] == scores[1][who]


def test_a_precision_that_is_slow_here_is_told_though_the_cells_are_silent(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(devices, "multiplies_bfloat16", lambda _: False)
    heard = Heard()
    made = settings(random_base, data, tmp_path / "out", methods=("lora",), seeds=1, sweep=1)
    made.flags["model"]["bits"] = 16
    compare(made, reporter=heard)
    assert [n for n in heard.notices if "--bits 32 is several times as fast" in n]


def test_one_learning_rate_is_no_sweep_and_answers_too_long_to_match_are_told(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    heard = Heard()
    made = settings(
        random_base, data, tmp_path / "out", methods=("lora",), seeds=1, sweep=1, ood=str(data)
    )
    made.flags["evaluate"]["max_new_tokens"] = 1
    told, _ = compare(made, reporter=heard)
    stages = {task for task in heard.tasks if task.startswith("cells")}
    assert stages == {"cells (first seed)", "cells (seeds)", "cells (test)"}
    assert told.contestants[0].results()[0].right is None
    why = [line for line in legend(told) if "No exact match" in line]
    assert len(why) == 2
    assert why[0].startswith("No exact match: more than one answer in twenty has more tokens than")
    assert why[1] == f"Of the out-of-distribution data: {why[0]}"


def written(out: Path) -> dict[str, int]:
    return {str(f): f.stat().st_mtime_ns for f in out.glob("cells/*/*/*/summary.json")}


def test_what_is_finished_is_not_done_again_unless_its_recipe_or_data_has_changed(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    made = settings(random_base, data, out, sweep=1, methods=("lora", "prefix-tuning-plus"))
    first, before = found(made), written(out)
    again = found(made)
    assert written(out) == before
    assert [c.cells for c in again.contestants] == [c.cells for c in first.contestants]
    found(settings(random_base, data, out, sweep=1, methods=made.methods, sets=("adapter.r=4",)))
    after = written(out)
    assert {f for f in before if before[f] != after[f]} == {f for f in before if "/lora/" in f}
    data.write_text(data.read_text().replace("say", "tell"), encoding="utf-8")
    found(made)
    assert all(written(out)[file] != after[file] for file in before)


def test_a_cell_of_another_base_is_not_taken_for_finished(
    random_base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    shutil.copytree(random_base, base)
    made = settings(base, data, tmp_path / "out", sweep=1, seeds=1, methods=("lora",))
    cell = found(made).contestants[0].cells[0].run
    recipe = resolve(f"{cell}/recipe.yaml")
    assert is_done(recipe)
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: w * 2 for name, w in weights.items()}, base / "model.safetensors", {"format": "pt"}
    )
    monkeypatch.setattr(cells, "BASES", SharedBase())  # as in another process
    assert not is_done(recipe)


def test_a_cell_that_fails_says_why_and_the_rest_goes_on(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    made = settings(
        random_base, data, tmp_path / "out", sweep=1, methods=("lora",),
        grids={"train.learning_rate": [1e-3, 1e36]},
    )  # fmt: skip
    told = found(made)
    assert told.failed
    good, bad = told.contestants
    assert good.failures == []
    assert len(good.results()) == 2
    assert len(bad.failures) == 2
    assert "scores are not numbers" in bad.failures[0]
    assert bad.results() == []
    assert bad.trainable_parameters is None


def test_processes_side_by_side_find_the_same(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    one, two = (
        found(settings(random_base, data, tmp_path / str(n), sweep=1, workers=n, methods=("lora",)))
        for n in (1, 2)
    )
    for a, b in zip(one.contestants[0].cells, two.contestants[0].cells, strict=True):
        assert a.results == b.results


def test_a_folder_of_something_else_is_left_alone(
    random_base: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis" / "data").mkdir(parents=True)
    (tmp_path / "thesis" / "chapter.tex").write_text("text")
    with pytest.raises(UsageError, match="no comparison's folder"):
        found(settings(random_base, data, tmp_path / "thesis"))


COMMAND = ("compare", "--methods", "lora,prefix-tuning-plus", "--sweep", 1)


def test_a_signal_ends_all_processes_and_begins_no_further_cell(
    start: Start, random_base: Path, data: Path, tmp_path: Path
) -> None:
    run = start(
        *COMMAND, "--seeds", 3, "--no-speed", "--workers", 2, "--model", random_base, "--bits", 32,
        "--data", data, "--steps", 2000, "--batch-size", 4, "--out", tmp_path / "out",
    )  # fmt: skip
    begun = "out/cells/*/*/*/metrics.jsonl"
    while len(list(tmp_path.glob(begun))) < 2:
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate()
    assert run.returncode == 0
    assert "the same command goes on" in said
    assert len(list(tmp_path.glob(begun))) == 2
    assert len(list(tmp_path.glob("out/cells/*/*/*/checkpoint-*/sha256.json"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_the_same_command_goes_on_where_a_signal_stopped_it(
    number: int, start: Start, random_base: Path, data: Path, tmp_path: Path
) -> None:
    typed = [
        *COMMAND, "--seeds", 1, "--no-speed", "--workers", 1, "--model", random_base,
        "--bits", 32, "--data", data, "--steps", 100, "--batch-size", 4, "--set",
        "train.save_steps=5", "--set", "evaluate.max_rows=8", "--set",
        "evaluate.max_new_tokens=8", "--out", tmp_path / "out",
    ]  # fmt: skip
    run = start(*typed)
    second = tmp_path / "out/cells/prefix-tuning-plus/lr-0.03/seed-0"
    while not list(second.glob("checkpoint-*/sha256.json")):
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(number)
    _, said = run.communicate()
    assert run.returncode == (130 if number == signal.SIGINT else -number)
    assert number == signal.SIGKILL or "the same command goes on" in said
    first = tmp_path / "out/cells/lora/lr-0.003/seed-0/summary.json"
    before = first.stat().st_mtime_ns
    again = start(*typed)
    _, said = again.communicate()
    assert again.returncode == 0, said
    assert "1 of 2 cells are finished already" in said
    assert first.stat().st_mtime_ns == before
    assert "Resuming" in said
    steps = [json.loads(row)["step"] for row in (second / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 100


def test_a_signal_while_costs_are_measured_loses_no_cell(
    start: Start, random_base: Path, data: Path, tmp_path: Path
) -> None:
    typed = [
        *COMMAND, "--seeds", 1, "--workers", 1, "--model", random_base, "--bits", 32,
        "--data", data, "--steps", 2, "--batch-size", 4, "--max-length", 64,
        "--prompt-tokens", 16, "--set", "evaluate.max_rows=8", "--out", tmp_path / "out",
    ]  # fmt: skip
    run = start(*typed, "--rounds", 10000)
    while "\nmeasuring" not in run.said():
        assert run.poll() is None, run.communicate()
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    _, said = run.communicate(timeout=120)
    assert run.returncode == 0, said
    assert "the same command goes on" in said
    done = start(*typed, "--rounds", 1)
    _, said = done.communicate()
    assert done.returncode == 0, said
    assert "2 of 2 cells are finished already" in said
    assert (tmp_path / "out/results.json").exists()

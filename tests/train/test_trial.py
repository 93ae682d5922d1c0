"""The longest batch is tried first: too little memory is reported before the first step, or avoided."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import train
from prefixtune_cli.train.trainer import SafeTrainer
from prefixtune_cli.train.trial import longest_rows
from tests.train.test_run import recipe

# A process that may take so many bytes more than it has after the base is loaded.
LIMITED = """
import resource, sys
from prefixtune_cli import model as models
from prefixtune_cli.cli.app import main
attach, mebibytes = models.attach, int(sys.argv.pop())
def attach_and_limit(*args):
    attached = attach(*args)
    pages = int(open("/proc/self/statm").read().split()[0])
    most = pages * resource.getpagesize() + mebibytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    return attached
models.attach = attach_and_limit
main()
"""


def test_the_longest_rows_are_found_wherever_they_are() -> None:
    rows = Dataset.from_dict({"input_ids": [[1] * n for n in (3, 9, 1, 7, 9)], "row": range(5)})
    assert sorted(longest_rows(rows, 3)) == [1, 3, 4]
    assert sorted(longest_rows(rows.select([2, 0, 3]), 2)) == [1, 2]
    assert sorted(longest_rows(rows, 9)) == [0, 1, 2, 3, 4]


def test_the_trial_leaves_no_trace(random_base: Path, colours: Path, tmp_path: Path) -> None:
    """No trace in the weights, nor in the random numbers, which dropout would show."""
    from prefixtune_cli.train.trial import Trial

    lora = {"method": "lora", "dropout": 0.3}
    train(recipe(random_base, colours, tmp_path / "tried", adapter=lora))
    tried, Trial.on_train_begin = Trial.on_train_begin, lambda self, *_, **__: None  # type: ignore[method-assign]
    try:
        train(recipe(random_base, colours, tmp_path / "untried", adapter=lora))
    finally:
        Trial.on_train_begin = tried  # type: ignore[method-assign]
    runs = [RunDir(tmp_path / name) for name in ("tried", "untried")]
    weights = [(run.adapter / "adapter_model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]
    losses = [[row["loss"] for row in run.read_metrics()] for run in runs]
    assert losses[0] == losses[1] != []


def test_the_batch_that_is_tried_has_the_longest_rows(random_base: Path, tmp_path: Path) -> None:
    data = tmp_path / "rows.jsonl"
    lengths = [1, 20, 2, 30, 3, 4, 5, 6, 7, 8]
    rows = [{"prompt": "red " * n, "completion": "RED"} for n in lengths]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shapes: list[tuple[int, ...]] = []
    plain = SafeTrainer.plain_training_step

    def watched(self: SafeTrainer, model: object, inputs: dict, *args: object) -> object:
        shapes.append(tuple(inputs["input_ids"].shape))
        return plain(self, model, inputs, *args)

    SafeTrainer.plain_training_step = watched  # type: ignore[method-assign]
    try:
        settings = {"max_steps": 3, "batch_size": 2}
        train(recipe(random_base, data, tmp_path / "run", train=settings, data={"eval": str(data)}))
    finally:
        SafeTrainer.plain_training_step = plain  # type: ignore[method-assign]
    assert len(shapes) == 1 + 3
    assert shapes[0] == max(shapes, key=lambda shape: shape[1])
    assert shapes[0][0] == 2


@pytest.fixture(scope="module")
def wide_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base whose activations are large beside what Python takes by itself."""
    config = AutoConfig.from_pretrained(random_base, hidden_size=64, intermediate_size=5120)
    folder = tmp_path_factory.mktemp("wide-base")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("long") / "long.jsonl"
    row = json.dumps({"prompt": "red green blue " * 60, "completion": "RED"})
    file.write_text(f"{row}\n" * 80)
    return file


def limited(
    base: Path, data: Path, out: Path, mebibytes: int, *flags: str
) -> subprocess.CompletedProcess[str]:
    typed = ["train", "--model", base, "--data", data, "--out", out, "--bits", 32, "--steps", 1]
    more = ["--batch-size", 32, "--max-length", 256, "--set", "evaluate.max_rows=2", *flags]
    return subprocess.run(
        [sys.executable, "-c", LIMITED, *map(str, typed + more), str(mebibytes)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},
    )


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory by RLIMIT_AS")
def test_too_little_memory_is_one_error_before_the_first_step_that_names_what_helps(
    wide_base: Path, long_rows: Path, tmp_path: Path
) -> None:
    done = limited(wide_base, long_rows, tmp_path / "run", 700)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("error: ") == 1
    assert "The longest batch (32 rows of up to 256 tokens) does not fit in memory" in done.stderr
    assert "By `ptp plan`, --" in done.stderr
    assert "--auto-batch" in done.stderr
    assert "Traceback" not in done.stderr
    assert RunDir(tmp_path / "run").read_metrics() == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory by RLIMIT_AS")
def test_auto_batch_halves_the_batch_keeps_the_step_and_says_so(
    wide_base: Path, long_rows: Path, tmp_path: Path
) -> None:
    done = limited(wide_base, long_rows, tmp_path / "run", 1000, "--auto-batch")
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "does not fit in memory" in line]
    assert said
    assert "--batch-size 16 --gradient-accumulation 2 instead" in said[0]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 1

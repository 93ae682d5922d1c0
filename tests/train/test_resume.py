"""Nothing is lost: a run that was killed or interrupted ends with the weights of one that was not."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from prefixtune_cli.run_dir import RunDir
from tests.train.test_run import recipe

STEPS = 40


def command(base: Path, data: Path, out: Path, *more: str) -> list[str]:
    flags = {
        "--model": base,
        "--data": data,
        "--out": out,
        "--bits": 32,
        "--steps": STEPS,
        "--batch-size": 4,
        "--max-length": 64,
        "--set": "train.save_steps=5",
    }
    return [
        sys.executable,
        "-m",
        "prefixtune_cli",
        "train",
        *(str(part) for pair in flags.items() for part in pair),
        *more,
    ]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ.copy()
    )


def wait_for_checkpoint(run: subprocess.Popen[str], run_dir: RunDir) -> None:
    deadline = time.monotonic() + 120
    while not run_dir.checkpoints():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def files(run_dir: RunDir) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run_dir.adapter.glob("*.safetensors")}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param([], id="prefix-tuning-plus"),
        pytest.param(["--method", "lora", "--set", "adapter.dropout=0.3"], id="lora-with-dropout"),
    ],
)
def test_a_killed_run_resumes_to_the_same_bytes(
    flags: list[str], random_base: Path, colours: Path, tmp_path: Path
) -> None:
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    uninterrupted = start(command(random_base, colours, whole.path, *flags))
    run = start(command(random_base, colours, killed.path, *flags))
    wait_for_checkpoint(run, killed)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not killed.finished
    assert killed.checkpoints()[-1].name != f"checkpoint-{STEPS}", "killed too late to tell"
    resumed = start(command(random_base, colours, killed.path, *flags, "--resume"))
    _, said = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, said
    assert "Resuming" in said
    assert uninterrupted.communicate(timeout=300) is not None
    assert uninterrupted.returncode == 0
    assert files(killed) == files(whole) != {}
    assert [row["step"] for row in killed.read_metrics()] == [
        row["step"] for row in whole.read_metrics()
    ]
    scores = [json.loads(run.summary.read_text())["adapter"] for run in (killed, whole)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=lambda s: s.name)
def test_a_stop_signal_saves_a_checkpoint_and_says_how_to_go_on(
    how: signal.Signals, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run = start(command(random_base, colours, run_dir.path, "--set", "train.log_steps=1"))
    deadline = time.monotonic() + 120
    while not run_dir.read_metrics():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert f"Stopped by {how.name} at step" in said
    assert f"ptp train --recipe {run_dir.recipe} --resume" in said
    assert "Traceback" not in said
    last = run_dir.checkpoints()[-1]
    assert f"at step {last.name.split('-')[1]} of {STEPS}" in said
    assert not run_dir.finished


def test_a_run_killed_before_its_first_checkpoint_starts_again(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.recipe.load import dump
    from prefixtune_cli.train import train

    chosen = recipe(random_base, colours, tmp_path / "run")
    train(chosen)
    run_dir = RunDir(tmp_path / "run")
    before = files(run_dir)
    run_dir.summary.unlink()
    for checkpoint in run_dir.checkpoints():
        (checkpoint / "trainer_state.json").unlink()  # as a crash in the middle of a copy leaves it
    run_dir.recipe.write_text(dump(chosen), encoding="utf-8")
    train(chosen, resume=True)
    assert files(run_dir) == before
    steps = [row["step"] for row in run_dir.read_metrics()]
    assert steps == sorted(set(steps))


def test_a_run_killed_while_it_was_scored_trains_no_further_step(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.train import train

    chosen = recipe(random_base, colours, tmp_path / "run", train={"max_steps": 10})
    whole = train(chosen)  # 10 steps: one epoch of 7, and a part of the next
    run_dir = RunDir(tmp_path / "run")
    before = files(run_dir)
    run_dir.summary.unlink()
    shutil.rmtree(run_dir.adapter)
    resumed = train(chosen, resume=True)
    assert files(run_dir) == before
    assert resumed == whole

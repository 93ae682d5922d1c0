"""Nothing is lost: a run that was killed or interrupted ends with the weights of an undisturbed run."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, step_of
from tests.train.test_run import Listener, recipe
from tests.train.zygote import Command, Start

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
    return ["train", *(str(part) for pair in flags.items() for part in pair), *more]


def wait_for_checkpoint(run: Command, run_dir: RunDir) -> None:
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
    flags: list[str], start: Start, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    whole, killed = RunDir(tmp_path / "whole"), RunDir(tmp_path / "killed")
    uninterrupted = start(*command(random_base, colours, whole.path, *flags))
    run = start(*command(random_base, colours, killed.path, *flags))
    wait_for_checkpoint(run, killed)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    assert not killed.finished
    assert killed.checkpoints()[-1].name != f"checkpoint-{STEPS}", "killed too late to tell"
    resumed = start(*command(random_base, colours, killed.path, *flags, "--resume"))
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


@pytest.mark.parametrize(
    ("how", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)],
    ids=["Ctrl-C", "SIGTERM", "SIGUSR1"],
)
def test_a_stop_signal_saves_a_checkpoint_and_says_how_to_go_on(
    how: signal.Signals,
    code: int,
    start: Start,
    random_base: Path,
    colours: Path,
    tmp_path: Path,
) -> None:
    run_dir = RunDir(tmp_path / "run")
    run = start(*command(random_base, colours, run_dir.path, "--set", "train.log_steps=1"))
    deadline = time.monotonic() + 120
    while not run_dir.read_metrics():
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    run.send_signal(how)
    _, said = run.communicate(timeout=60)
    assert run.returncode == code, said
    assert f"Stopped by {how.name} at step" in said
    assert f"ptp train --recipe {run_dir.recipe} --resume" in said
    assert "Traceback" not in said
    last = run_dir.checkpoints()[-1]
    assert f"at step {last.name.split('-')[1]} of {STEPS}" in said
    assert run_dir.loss_plot.exists()
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
        (checkpoint / "sha256.json").unlink()  # as a crash in the middle of a copy leaves it
    run_dir.recipe.write_text(dump(chosen.with_learning_rate(64)), encoding="utf-8")
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
    clock = {name: getattr(whole, name) for name in ("finished", "seconds", "peak_memory_gib")}
    assert replace(resumed, **clock) == whole


@pytest.fixture
def half_done(
    random_base: Path, colours: Path, tmp_path: Path
) -> tuple[Recipe, RunDir, dict[str, bytes]]:
    """A run that stopped at step 6 of 8, with checkpoints at 2, 4 and 6, and the weights of its undisturbed end."""
    from prefixtune_cli.recipe.load import dump
    from prefixtune_cli.train import train

    chosen = recipe(
        random_base, colours, tmp_path / "run", train={"save_steps": 2, "keep_checkpoints": 4}
    )
    train(chosen)
    run_dir = RunDir(tmp_path / "run")
    whole = files(run_dir)
    run_dir.summary.unlink()
    shutil.rmtree(run_dir.adapter)
    shutil.rmtree(run_dir.checkpoint(8))
    run_dir.recipe.write_text(dump(chosen.with_learning_rate(64)), encoding="utf-8")
    return chosen, run_dir, whole


def test_a_truncated_newest_checkpoint_is_skipped_with_a_warning(
    half_done: tuple[Recipe, RunDir, dict[str, bytes]],
) -> None:
    from prefixtune_cli.train import train

    chosen, run_dir, whole = half_done
    optimizer = run_dir.checkpoint(6) / "optimizer.pt"
    os.truncate(optimizer, optimizer.stat().st_size // 2)
    listener = Listener()
    train(chosen, resume=True, reporter=listener)
    assert [
        w
        for w in listener.warnings
        if "checkpoint-6 is damaged and left out" in w and "optimizer.pt" in w
    ]
    assert f"Resuming {run_dir.path} from checkpoint-4." in listener.notices
    assert files(run_dir) == whole
    assert run_dir.newest_whole_checkpoint()[0] == run_dir.checkpoint(8)


def test_resume_auto_starts_goes_on_and_is_content_with_a_finished_run(
    half_done: tuple[Recipe, RunDir, dict[str, bytes]], tmp_path: Path
) -> None:
    from prefixtune_cli.train import train

    chosen, run_dir, whole = half_done
    listener = Listener()
    summary = train(chosen, resume="auto", reporter=listener)
    assert f"Resuming {run_dir.path} from checkpoint-6." in listener.notices
    assert files(run_dir) == whole
    changed = run_dir.summary.stat().st_mtime_ns
    assert train(chosen, resume="auto") == summary
    assert run_dir.summary.stat().st_mtime_ns == changed
    fresh = chosen.model_copy(update={"out": str(tmp_path / "fresh")})
    train(fresh, resume="auto")
    assert files(RunDir(tmp_path / "fresh")) == whole


def test_a_signal_in_the_middle_of_a_step_loses_that_step_alone(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    """With dropout and several forward passes a step, the first of which have already drawn random numbers."""
    from prefixtune_cli.errors import Preempted
    from prefixtune_cli.train import train
    from prefixtune_cli.train.trainer import SafeTrainer

    changes: dict[str, Any] = {
        "adapter": {"method": "lora", "dropout": 0.3},
        "train": {"batch_size": 2, "gradient_accumulation": 4, "save_steps": 100},
    }
    train(recipe(random_base, colours, tmp_path / "whole", **changes))
    passes = iter(range(100))
    plain = SafeTrainer.plain_training_step

    def interrupted(self: SafeTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = plain(self, *args, **kwargs)
        if next(passes) == 1 + 4 * 5 + 2:  # the trial; five steps; the second pass of the sixth
            os.kill(os.getpid(), signal.SIGUSR1)
        return loss

    chosen = recipe(random_base, colours, tmp_path / "run", **changes)
    SafeTrainer.plain_training_step = interrupted  # type: ignore[method-assign]
    try:
        with pytest.raises(
            Preempted, match=r"Stopped by SIGUSR1 at step 5 of 8; a checkpoint is saved"
        ):
            train(chosen)
    finally:
        SafeTrainer.plain_training_step = plain  # type: ignore[method-assign]
    train(chosen, resume=True)
    assert files(RunDir(tmp_path / "run")) == files(RunDir(tmp_path / "whole")) != {}


@pytest.mark.parametrize("moment", ["in the last step", "in an evaluation", "while it is scored"])
def test_a_signal_at_an_odd_moment_is_heard_and_loses_nothing(
    moment: str, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.errors import Preempted
    from prefixtune_cli.train import train
    from prefixtune_cli.train.judge import Judge
    from prefixtune_cli.train.trainer import SafeTrainer

    settings = {"save_steps": 100, "eval_steps": 3}
    train(recipe(random_base, colours, tmp_path / "whole", train=settings))
    chosen = recipe(random_base, colours, tmp_path / "run", train=settings)
    owner, name, when, step = {
        "in the last step": (SafeTrainer, "plain_training_step", 1 + 8, 8),
        "in an evaluation": (SafeTrainer, "prediction_step", 1, 3),
        "while it is scored": (Judge, "score", 1, 8),
    }[moment]
    plain, calls = getattr(owner, name), iter(range(1, 100))

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    setattr(owner, name, interrupted)
    try:
        with pytest.raises(Preempted, match="Stopped by SIGTERM"):
            train(chosen)
    finally:
        setattr(owner, name, plain)
    run_dir = RunDir(tmp_path / "run")
    assert [step_of(checkpoint) for checkpoint in run_dir.checkpoints()] == [step]
    train(chosen, resume=True)
    assert files(run_dir) == files(RunDir(tmp_path / "whole")) != {}


@pytest.mark.parametrize("there", [False, True], ids=["new", "in place of another run"])
def test_a_stop_while_the_base_loads_names_no_recipe_of_another_run_and_none_that_is_not_there(
    there: bool, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.errors import Interrupted
    from prefixtune_cli.shared_base import SharedBase
    from prefixtune_cli.train import train

    class StoppedThere(SharedBase):
        def lent(self, section: Any) -> Any:
            os.kill(os.getpid(), signal.SIGINT)

    run_dir = RunDir(tmp_path / "run")
    if there:
        run_dir.path.mkdir()
        run_dir.recipe.write_text("out: null")
    with pytest.raises(Interrupted, match="nothing was begun") as stopped:
        train(recipe(random_base, colours, run_dir.path), overwrite=there, bases=StoppedThere())
    assert str(stopped.value).endswith("To go on, type: the same command again")
    assert run_dir.recipe.exists() == run_dir.path.exists() == there


def test_minutes_make_checkpoints_beside_the_steps_and_change_nothing_else(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.train import train

    settings = {"save_steps": 100, "keep_checkpoints": 20}
    train(recipe(random_base, colours, tmp_path / "whole", train=settings))
    often = {**settings, "save_minutes": 1e-9}
    train(recipe(random_base, colours, tmp_path / "run", train=often))
    whole, run = RunDir(tmp_path / "whole"), RunDir(tmp_path / "run")
    assert [step_of(c) for c in whole.checkpoints()] == [8]
    assert [step_of(c) for c in run.checkpoints()] == list(range(1, 9))
    assert files(run) == files(whole)


@pytest.mark.parametrize(
    "adapter",
    [{"method": "p-tuning"}, {"method": "prefix-tuning", "prefix_projection": True}],
    ids=lambda adapter: adapter["method"],
)
def test_a_network_that_no_checkpoint_holds_is_said_before_the_run_and_where_it_is_resumed(
    adapter: dict[str, Any], random_base: Path, colours: Path, tmp_path: Path
) -> None:
    from prefixtune_cli.errors import RunDirError
    from prefixtune_cli.train import train

    asked = recipe(random_base, colours, tmp_path / "run", adapter=adapter)
    heard = Listener()
    train(asked, reporter=heard)
    (said,) = [text for text in heard.warnings if "cannot be resumed" in text]
    assert "network of p" in said
    run_dir = RunDir(tmp_path / "run")
    run_dir.summary.unlink()
    with pytest.raises(RunDirError, match="cannot go on from its checkpoint: the network of p"):
        train(asked, resume=True)
    for checkpoint in run_dir.checkpoints():
        shutil.rmtree(checkpoint)
    assert train(asked, resume=True).steps == 8  # from the start


def test_a_run_is_not_resumed_with_another_number_of_processes(
    half_done: tuple[Recipe, RunDir, dict[str, bytes]],
) -> None:
    from prefixtune_cli.errors import RunDirError
    from prefixtune_cli.train import train

    chosen, run_dir, _ = half_done
    environment = json.loads(run_dir.environment.read_text())
    assert environment["processes"] == 1
    run_dir.environment.write_text(json.dumps({**environment, "processes": 2}))
    with pytest.raises(RunDirError, match=r"started with 2 processes.*resumed with 1"):
        train(chosen, resume=True)

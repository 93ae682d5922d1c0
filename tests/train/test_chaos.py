"""Chaos: runs that are killed with -9 at random moments, again and again, end as if nothing had happened.

A run is killed eight times. If it ends before a kill, its result is compared, and another run begins. PTP_CHAOS_SEED
(default 0) seeds the moments; what the machine is doing at a moment differs from time to time.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, step_of
from tests.ports import free_port
from tests.train.test_resume import files
from tests.train.test_run import recipe
from tests.train.zygote import NAMES, Zygote, save

SEED = int(os.environ.get("PTP_CHAOS_SEED", "0"))
PREPARING, CHECKPOINT, SCORING, ANY = "preparing", "writing a checkpoint", "scoring", "anything"
# Four kills at any moment, and four that wait for a phase, because a checkpoint takes only a twentieth of a second.
AIMS = (ANY, ANY, ANY, ANY, PREPARING, CHECKPOINT, CHECKPOINT, SCORING)
SECONDS_TO_END = 30  # for the surviving process
LORA = {"method": "lora", "dropout": 0.3}
PLUS = {"method": "prefix-tuning-plus"}


@dataclass
class Attempt:
    """One start of a run.

    Attributes:
        pids: its process ids, by rank.
        diary: the file with the reports of the first process.
    """

    pids: list[int]
    diary: Path

    @property
    def reports(self) -> list[str]:
        return self.diary.read_text(encoding="utf-8").splitlines() if self.diary.exists() else []

    @property
    def said(self) -> str:
        """All its output, for the message of a failure."""
        errors = sorted(self.diary.parent.glob(f"{self.diary.stem.split('-')[0]}-*.stderr"))
        return "\n".join([*self.reports, *(file.read_text()[-4000:] for file in errors)])

    def phase(self, run_dir: RunDir) -> str:
        """The phase in which it ended."""
        reports = self.reports
        trained = [line for line in reports if line.startswith("training ")]
        if not any(line.startswith("Loading ") for line in reports):
            return PREPARING
        if not trained:
            return "loading"
        part = run_dir.checkpoint_part
        with contextlib.suppress(FileNotFoundError):  # another attempt left an older one
            if part.stat().st_mtime_ns >= self.diary.stat().st_mtime_ns:
                return CHECKPOINT
        if reports[-1] != trained[-1]:
            return SCORING
        done, total = trained[-1].split()[1].split("/")
        return "training" if done != total else "saving the adapter"


class Chaos:
    """Starts and kills runs of one recipe.

    Args:
        zygote: makes the processes.
        chosen: the recipe; its `out` changes.
        folder: holds everything.
        processes: the number of processes of each run.
    """

    def __init__(self, zygote: Zygote, chosen: Recipe, folder: Path, processes: int) -> None:
        self.zygote = zygote
        self.chosen = chosen
        self.folder = folder
        self.processes = processes
        self.random = random.Random(f"{SEED} {processes} {chosen.adapter.method}")
        self.attempts = 0
        self.phases: Counter[str] = Counter()

    def start(self, run_dir: RunDir) -> Attempt:
        """Start all processes of a run, or continue it."""
        self.attempts += 1
        chosen = self.chosen.model_copy(update={"out": str(run_dir.path)})
        diaries = [self.folder / f"{self.attempts}-{rank}.diary" for rank in range(self.processes)]
        port = free_port()
        pids = [
            self.zygote.train(chosen, diary, among_several(rank, self.processes, port))
            for rank, diary in enumerate(diaries)
        ]
        return Attempt(pids, diaries[0])

    def finish(self, run_dir: RunDir) -> tuple[Attempt, float]:
        """Let a run finish; returns its seconds."""
        begun = time.monotonic()
        attempt = self.start(run_dir)
        for pid in attempt.pids:
            assert self.zygote.ended(pid, 120) == 0, f"seed {SEED}: {attempt.said}"
        assert run_dir.finished
        return attempt, time.monotonic() - begun

    def kill(self, run_dir: RunDir, seconds: float, aim: str) -> tuple[Attempt, bool]:
        """Kill one process of a run at random.

        Args:
            run_dir: of the run.
            seconds: the kill comes within so many seconds.
            aim: the phase to wait for after a random moment; ANY waits for none.

        Returns:
            The attempt, and whether it was killed, as it may have finished before.
        """
        moment, rank = self.random.uniform(0, seconds), self.random.randrange(self.processes)
        begun = time.monotonic()
        attempt = self.start(run_dir)
        killed, *others = [attempt.pids[rank], *attempt.pids[:rank], *attempt.pids[rank + 1 :]]
        early = {ANY: moment, PREPARING: moment / 20, CHECKPOINT: moment / 2, SCORING: 0.0}[aim]
        code = self.zygote.ended(killed, begun + early - time.monotonic())
        while code is None and aim in (CHECKPOINT, SCORING) and attempt.phase(run_dir) != aim:
            code = self.zygote.ended(killed, 0)
        if code is None:
            os.kill(killed, signal.SIGKILL)
            code = self.zygote.ended(killed, 10)
        if code != -signal.SIGKILL:  # it had finished
            codes = [code, *(self.zygote.ended(pid, SECONDS_TO_END) for pid in others)]
            assert not any(codes) and run_dir.finished, f"seed {SEED}: {codes}, {attempt.said}"
            return attempt, False
        joined = any(line.startswith("Loading ") for line in attempt.reports)
        for pid in others:
            if not joined:  # they had not met yet, and a launcher ends the others
                os.kill(pid, signal.SIGKILL)
            ended = self.zygote.ended(pid, SECONDS_TO_END)
            if ended is None:
                os.kill(pid, signal.SIGKILL)
            assert ended is not None, f"seed {SEED}: a process outlived the other: {attempt.said}"
        self.phases[attempt.phase(run_dir)] += 1
        return attempt, True


def among_several(rank: int, size: int, port: int) -> dict[str, str]:
    """The environment of one of a run's processes, as torchrun sets it."""
    if size == 1:
        return {}
    given = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": size,
        "LOCAL_WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return {name: str(value) for name, value in given.items()}


def assert_whole(run_dir: RunDir) -> None:
    """Every file with its final name is whole, whenever its writer was killed."""
    if not run_dir.path.exists():
        return
    folders = {path for path in run_dir.path.glob("checkpoint-*")}
    assert folders == set(run_dir.checkpoints()), "a checkpoint without the hashes of its files"
    for folder in folders:
        hashes = json.loads((folder / "sha256.json").read_text())
        found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}
        assert hashes == {name: found[name] for name in found if name != "sha256.json"} != {}
    assert run_dir.newest_whole_checkpoint()[1] == []
    for file in run_dir.path.rglob("*.*"):
        inside = file.relative_to(run_dir.path).parts
        if any(part.startswith(".") for part in inside):
            continue  # a file with its temporary name may be partial
        if file.suffix == ".json":
            json.loads(file.read_text(encoding="utf-8"))
        elif file.suffix == ".jsonl":
            text = file.read_text(encoding="utf-8")
            assert text == "" or text.endswith("\n")
            for line in text.splitlines():
                json.loads(line)
        elif file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                assert all(opened.get_tensor(name).numel() for name in opened.keys())  # noqa: SIM118
        elif file.suffix == ".png":
            assert file.read_bytes().endswith(b"IEND\xaeB`\x82")
    if run_dir.recipe.exists():
        assert resolve(str(run_dir.recipe)).out == str(run_dir.path)
        assert run_dir.environment.exists()
    if run_dir.adapter.exists():
        assert {p.name for p in run_dir.adapter.iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "tokenizer.json",
            "tokenizer_config.json",
        }


def logged(run_dir: RunDir) -> list[tuple[Any, ...]]:
    names = ("step", "loss", "learning_rate", "grad_norm")
    return [tuple(row[name] for name in names) for row in run_dir.read_metrics()]


def outcome(run_dir: RunDir) -> dict[str, Any]:
    """Everything of a finished run that does not depend on its speed or its folder."""
    summary = json.loads(run_dir.summary.read_text())
    return {
        "weights": files(run_dir),
        "metrics": logged(run_dir),
        "scores": (summary["base"], summary["adapter"], summary["steps"]),
        "answers": run_dir.answers.read_text(),
        "checkpoints": [step_of(folder) for folder in run_dir.checkpoints()],
    }


def resumed_from(attempt: Attempt) -> int | None:
    """The step of the checkpoint that it continued from, 0 for the start; None if it did not get so far."""
    for line in attempt.reports:
        if found := re.match(r"Resuming .* from (checkpoint-(\d+)|the start)", line):
            return int(found[2] or 0)
    return None


@pytest.mark.parametrize(
    ("processes", "adapter"),
    [
        pytest.param(1, LORA, id="one process, LoRA with dropout"),
        pytest.param(2, PLUS, id="two processes, PT+"),
        pytest.param(1, PLUS, id="one process, PT+", marks=pytest.mark.slow),
        pytest.param(2, LORA, id="two processes, LoRA with dropout", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_is_killed_eight_times_at_random_ends_like_one_that_was_not(
    processes: int,
    adapter: dict[str, Any],
    zygote: Zygote,
    random_base: Path,
    colours: Path,
    tmp_path: Path,
) -> None:
    chosen = recipe(
        random_base,
        colours,
        tmp_path / "whole",
        adapter=adapter,
        train={"max_steps": 20, "batch_size": 4, "log_steps": 1, "save_steps": 2},
        evaluate={"max_new_tokens": 4},
    )
    chaos = Chaos(zygote, chosen, tmp_path, processes)
    whole = RunDir(tmp_path / "whole")
    seconds = chaos.finish(whole)[1]
    wanted = outcome(whole)
    assert [row[0] for row in wanted["metrics"]] == list(range(1, 21))
    resumed, run_dir = 0, RunDir(tmp_path / "run-0")
    aims = chaos.random.sample(AIMS, len(AIMS))
    while aims:
        saved = newest(run_dir)
        attempt, killed = chaos.kill(run_dir, seconds, aims[-1])
        assert_whole(run_dir)
        step = resumed_from(attempt)
        assert step is None or step >= saved, f"seed {SEED}: steps are lost: {attempt.said}"
        resumed += bool(step)
        assert chaos.attempts < 3 * len(AIMS), f"seed {SEED}: the kills come too late"
        if killed:
            aims.pop()
        else:
            assert outcome(run_dir) == wanted, f"seed {SEED}, {run_dir.path.name}"
            run_dir = RunDir(tmp_path / f"run-{chaos.attempts}")
    saved, finished = newest(run_dir), run_dir.finished  # killed after everything was written
    attempt, _ = chaos.finish(run_dir)
    assert finished or (resumed_from(attempt) or 0) >= saved
    assert outcome(run_dir) == wanted, f"seed {SEED}, {run_dir.path.name}"
    assert resumed + bool(saved), f"seed {SEED}: no attempt had a checkpoint to go on from"
    print(f"seed {SEED}, a run of {seconds:.1f} s, kills while {dict(chaos.phases)}")


def newest(run_dir: RunDir) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return step_of(run_dir.checkpoints()[-1]) if run_dir.checkpoints() else 0


@pytest.mark.parametrize("step", [6, 4], ids=["a new one", "one that is there already"])
def test_a_kill_before_any_change_to_a_file_leaves_no_half_of_a_checkpoint(
    step: int, zygote: Zygote, tmp_path: Path
) -> None:
    """Write all files of a run, killed before the first change to a file, before the second, and so on."""
    for dies_before in range(200):
        run_dir = RunDir(tmp_path / f"{dies_before}")
        for old in (2, 4):
            save(run_dir, old, kept=2)
        ended = zygote.ended(zygote.save(run_dir, step, dies_before), 30)
        assert ended in (0, -signal.SIGKILL)
        assert json.loads(run_dir.environment.read_text())["step"] in (4, step)
        for folder in run_dir.path.glob("checkpoint-*"):
            assert folder in run_dir.checkpoints()
            assert saved_at(folder) == step_of(folder)
        assert run_dir.newest_whole_checkpoint()[1] == []
        assert newest(run_dir) in (step, 4 if step > 4 else 2)
        assert not run_dir.adapter.exists() or saved_at(run_dir.adapter) in (4, step)
        if ended == 0:
            break
        save(run_dir, 8, kept=1)
        parts = [path for path in run_dir.path.glob(".*.part") if any(path.iterdir())]
        assert parts == [], "what was left lying is still there after the next checkpoint"
    assert 20 < dies_before < 200


def saved_at(folder: Path) -> int:
    """The single step that all files of a folder belong to."""
    texts = {p.name: p.read_text() for p in folder.iterdir() if p.name != "sha256.json"}
    assert set(texts) == NAMES
    (step,) = {int(text.rpartition(" of step ")[2]) for text in texts.values()}
    return step

"""torchrun starts this twice (`in_two_processes`): several runs, one after the other, and what each process saw.

Usage: torchrun … -m tests.train.two_ranks JOBS.json, a list of {"recipe", "port", "seen"}. Each process writes
`<seen>-<rank>.json`. A job with "continue" resumes a copy of that run without its last checkpoint. A job with "fits"
has memory for so many rows at once, on the ranks of "poor". A job with "signalled" gets a SIGTERM on that rank in the
pass that finds the basis.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from torch.distributed.tensor import DTensor

from prefixtune_cli.errors import Interrupted
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import basis, prepare, train
from prefixtune_cli.train.trainer import SafeTrainer

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def in_two_processes(jobs: Sequence[dict[str, Any]], file: Path) -> None:
    """Have two processes do the jobs, which are written to `file`."""
    file.write_text(json.dumps(jobs))
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"),
            *("2", "-m", "tests.train.two_ranks", str(file)),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr[-4000:]


class Witness:
    """Notes the rows that a process trains on, what it tokenizes, and what it writes to the run directory."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.whole: list[int] = []  # frozen weights that are not sharded when a step begins
        self.tokenized: list[bool] = []  # whether the process group existed
        self.written: list[str] = []
        self.folder = "/nowhere"
        plain_step, plain_tokenize = SafeTrainer.training_step, prepare.tokenize

        def training_step(
            trainer: SafeTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any
        ) -> Any:
            frozen = (p for p in model.parameters() if not p.requires_grad)
            self.whole.append(sum(not isinstance(p, DTensor) for p in frozen))
            if "row" in inputs:  # packed rows have no numbers
                self.rows.append(inputs["row"].tolist())
            return plain_step(trainer, model, inputs, *args, **kwargs)

        def tokenize(*args: Any) -> Any:
            self.tokenized.append(dist.is_initialized())
            return plain_tokenize(*args)

        SafeTrainer.training_step, prepare.tokenize = training_step, tokenize
        sys.addaudithook(self.hear)

    def hear(self, event: str, args: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate")
        writes = writes or (event == "open" and bool((args[2] or 0) & WRITING))
        if writes and str(args[0]).startswith(self.folder):
            self.written.append(f"{event} {args[0]}")

    def report(self) -> dict[str, Any]:
        names = ("rows", "whole", "tokenized", "written")
        found = {name: getattr(self, name) for name in names}
        self.rows, self.whole, self.tokenized, self.written = [], [], [], []
        return found


@contextlib.contextmanager
def memory_for(rows: int, poor: list[int]) -> Iterator[None]:
    """Within the block, a backward pass of more rows fails in the lowest layer, on the ranks of `poor`."""
    plain = SafeTrainer.plain_training_step

    def run_out(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory. As it were.")

    def step(trainer: SafeTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if len(inputs["input_ids"]) <= rows or int(os.environ["RANK"]) not in poor:
            return plain(trainer, model, inputs, *args, **kwargs)
        layer = trainer.model.get_base_model().model.layers[0]
        hook = layer.register_full_backward_pre_hook(run_out)
        try:
            return plain(trainer, model, inputs, *args, **kwargs)
        finally:
            hook.remove()

    SafeTrainer.plain_training_step = step
    try:
        yield
    finally:
        SafeTrainer.plain_training_step = plain


@contextlib.contextmanager
def signalled(rank: int | None) -> Iterator[None]:
    """Within the block, `rank` gets a signal after the first batch of the pass that finds the basis."""
    plain, asked = SafeTrainer.stop_if_asked, iter(range(1000))

    def stop_if_asked(trainer: SafeTrainer) -> None:
        if next(asked) == 1 and int(os.environ["RANK"]) == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        plain(trainer)

    at_once = basis.AT_ONCE
    if rank is not None:
        SafeTrainer.stop_if_asked, basis.AT_ONCE = stop_if_asked, 1
    try:
        yield
    finally:
        SafeTrainer.stop_if_asked, basis.AT_ONCE = plain, at_once


def cut(whole: Path, out: Path) -> None:
    """A copy of a run as it was before its last checkpoint."""
    shutil.copytree(whole, out)
    run_dir = RunDir(out)
    shutil.rmtree(run_dir.checkpoints()[-1])
    shutil.rmtree(run_dir.adapter)
    run_dir.summary.unlink()


def main() -> None:
    witness = Witness()
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)  # a store for each run
    gc.collect()
    gc.freeze()  # each run collects, and need not go through the libraries' million objects
    for job in json.loads(Path(sys.argv[1]).read_text()):
        os.environ["MASTER_PORT"] = str(job["port"])
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        recipe = Recipe.model_validate(job["recipe"])
        witness.folder = str(recipe.out)
        resume = "continue" in job
        if resume and os.environ["RANK"] == "0":
            cut(Path(job["continue"]), Path(recipe.folder))
        told = ""
        with (
            memory_for(job.get("fits", 1000), job.get("poor", [])),
            signalled(job.get("signalled")),
        ):
            try:
                train(recipe, resume=resume)
            except Interrupted as end:
                if "signalled" not in job:
                    raise
                told = str(end)
        report = {**witness.report(), "told": told}
        Path(f"{job['seen']}-{os.environ['RANK']}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()

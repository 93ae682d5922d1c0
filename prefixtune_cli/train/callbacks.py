"""What happens between training steps: writing the journal, and watching the loss and the weights."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixtune_cli.errors import TrainingError
from prefixtune_cli.progress import Reporter
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.loss_plot import draw_loss

# What metrics.jsonl has of what the trainers log, under our names; the last four are those of DPO and
# KTO.
FIGURES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "rewards/accuracies": "preference_accuracy",
    "rewards/margins": "margin",
    "labelled/margin": "margin",
    "labelled/kl": "kl",
}
SECONDS_BETWEEN_PLOTS = 60  # each takes a tenth of a second, the first one half a second


class Journal(TrainerCallback):
    """Writes metrics.jsonl and loss.png, if it is the leader's, and tells the reporter.

    It draws the plot at checkpoints, but at most once a minute, because drawing takes a noticeable part of a short
    run. The code that ends the training draws the last plot.
    """

    def __init__(self, run_dir: RunDir, reporter: Reporter, *, writes: bool) -> None:
        self.run_dir = run_dir
        self.reporter = reporter
        self.writes = writes
        self._clock = Clock()
        self._drawn = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._clock.start()
        self._drawn = time.monotonic()
        self.reporter.progress("training", state.global_step, state.max_steps, {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == state.max_steps:
            control.should_log = True  # so that a short run, too, has a line of metrics
        if not control.should_log:  # otherwise `on_log` reports the step, with its figures
            self.reporter.progress("training", state.global_step, state.max_steps, {})

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any],
        **_: Any,
    ) -> None:
        if not self.writes:
            return
        if "loss" in logs:
            row: dict[str, Any] = {
                name: float(logs[of_trl]) for of_trl, name in FIGURES.items() if of_trl in logs
            }
            row["tokens_per_second"] = self._clock.tokens_per_second(
                float(logs.get("num_tokens", 0))
            )
            row["peak_memory_gib"] = peak_memory_gib()
        elif "eval_loss" in logs:
            row = {"eval_loss": float(logs["eval_loss"])}
        else:
            return
        at = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self.run_dir.append_metrics({**at, **row, "time": now})
        self.reporter.progress("training", state.global_step, state.max_steps, row)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.writes and time.monotonic() - self._drawn >= SECONDS_BETWEEN_PLOTS:
            draw_loss(self.run_dir)
            self._drawn = time.monotonic()


class Clock:
    """Measures tokens per second between two calls; TRL counts tokens from the start of the process."""

    def __init__(self) -> None:
        self._time = 0.0
        self._tokens = 0.0

    def start(self) -> None:
        self._time = time.perf_counter()

    def tokens_per_second(self, tokens: float) -> float:
        now = time.perf_counter()
        speed = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return round(speed, 1)


def peak_memory_gib() -> float:
    """The peak memory so far, in GiB: the GPU allocator's, or on a CPU the process's."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30, 3)


def forget_peak_memory() -> None:
    """Reset the GPU's peak for `peak_memory_gib`, because a process may do several runs."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.reset_peak_memory_stats()


class LossWatch(TrainerCallback):
    """Warns once, while there is time to stop, that the training loss has risen.

    It compares the last steps with the first ones, whose loss is about the base's, since the warm-up has hardly begun.
    A rise of more than 2 % and of three standard errors is more than the noise of batches.

    Args:
        losses: number of finished steps → loss of the next one; the trainer adds to them.
        reporter: hears the warning.
    """

    _FIRST, _LAST = 5, 10

    def __init__(self, losses: Mapping[int, float], reporter: Reporter) -> None:
        self._losses = losses
        self._reporter = reporter
        self._said = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        warmup = args.get_warmup_steps(state.max_steps)
        first = [  # empty if the run is resumed
            self._losses[i]
            for i in range(max(1, min(self._FIRST, warmup // 2)))
            if i in self._losses
        ]
        if self._said or not first or state.global_step < warmup + self._LAST:
            return
        last = [self._losses[i] for i in sorted(self._losses)[-self._LAST :]]
        began, now = statistics.fmean(first), statistics.fmean(last)
        error = statistics.stdev(last) * math.sqrt(1 / len(first) + 1 / len(last))
        if now > 1.02 * began and now - began > 3 * error:
            self._said = True
            self._reporter.warning(
                f"The training loss has risen: it is {now:.4g} over the last {self._LAST} steps, and was {began:.4g} "
                f"at first. {slower(args.learning_rate)}"
            )


def slower(rate: float) -> str:
    """What to type if a learning rate is too high."""
    return f"Try --learning-rate {rate / 3:.1g}, a third of it."


class WeightWatch(TrainerCallback):
    """Asserts after the first steps that the trained weights have changed, and that the base's have not.

    It compares a sample of about 1024 values of each tensor, which costs almost nothing compared with a step.
    """

    _AFTER_STEPS = 3

    def __init__(self) -> None:
        self._trained: dict[str, torch.Tensor] = {}
        self._frozen: dict[str, torch.Tensor] = {}
        self._due = 0

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **_: Any,
    ) -> None:
        self.start(model)
        self._due = min(state.global_step + self._AFTER_STEPS, state.max_steps)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: torch.nn.Module,
        **_: Any,
    ) -> None:
        if state.global_step == self._due:
            self.check(model, state.global_step)

    def start(self, model: torch.nn.Module) -> None:
        """Remember the weights; a checkpoint, if any, is loaded already."""
        named = list(model.named_parameters())
        self._trained = {name: _sample(p) for name, p in named if p.requires_grad}
        self._frozen = {name: _sample(p) for name, p in named if not p.requires_grad}

    def check(self, model: torch.nn.Module, step: int) -> None:
        """Raise TrainingError if a frozen weight changed, or if no trained weight did."""
        now = dict(model.named_parameters())
        trained = [(one, _sample(now[name])) for name, one in self._trained.items() if one.numel()]
        if trained and all(torch.equal(before, after) for before, after in trained):
            raise TrainingError(
                f"After {step} steps, no trained weight has changed: the data has no effect on the adapter. "
                "Check the learning rate, and check with `ptp inspect-data` that some tokens are trained."
            )
        for name, before in self._frozen.items():
            if not torch.equal(before, _sample(now[name])):
                raise TrainingError(
                    f"After {step} steps, the frozen base weight {name} has changed. This is a bug in ptp or in the "
                    "model's code: please report it with the recipe."
                )


def _sample(parameter: torch.Tensor) -> torch.Tensor:
    # This process's part of a weight that FSDP2 or DeepSpeed shards.
    here = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    here = getattr(parameter, "ds_tensor", here)
    flat = here.detach().reshape(-1)
    # As bytes, because quantized weights stored as floats may be NaN, which never equals itself.
    return flat[:: max(1, flat.numel() // 1024)].clone().view(torch.uint8)

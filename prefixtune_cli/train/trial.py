"""Tries one step with the longest batch before the first real step, so that memory runs out at once or never."""

from __future__ import annotations

import contextlib
import gc
import heapq
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from datasets import Dataset
from transformers import TrainerCallback

from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.parallel.sharding import is_sharded
from prefixtune_cli.train.order import ROW, row_lengths

SECONDS_TO_TRY = 120  # how long a process that has tried the longest batch waits for the others


class OutOfMemory(Exception):
    """The longest batch does not fit."""


class Trial(TrainerCallback):
    """Tries the longest batch when training begins, and leaves no trace of it.

    Args:
        trainer: the one that will train.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Raise OutOfMemory on all processes if any of them has too little memory."""
        trainer = self.trainer
        if trainer.is_deepspeed_enabled:
            return  # DeepSpeed's engine counts every backward pass as a part of a step
        fits = self._fits()
        trainer.model_wrapped.zero_grad(set_to_none=True)
        sharded = is_sharded(trainer.model)
        if not fits and sharded:
            trainer.model.get_base_model().reset_iter_state()  # FSDP's state of the pass that failed
        gc.collect()
        clear_device_cache()
        if sharded:
            # Not by a collective: if only one process ran out of memory, the others still wait in one.
            all_fit = all(trainer.processes.heard(int(fits), SECONDS_TO_TRY))
        else:
            all_fit = not trainer.processes.agree(int(not fits))[0]
        if not all_fit:
            raise OutOfMemory

    def _fits(self) -> bool:
        try:
            with without_a_trace(self.trainer):
                held = self._optimizer_state()
                self._step()
                del held
        except RuntimeError as error:  # torch.OutOfMemoryError is a subclass
            if not should_reduce_batch_size(error):
                raise
            return False
        return True

    def _step(self) -> None:
        trainer, model = self.trainer, self.trainer.model_wrapped
        rows = longest_rows(trainer.train_dataset, trainer.args.per_device_train_batch_size)
        batch = trainer.data_collator([trainer.train_dataset[i] for i in rows])
        batch = {key: value for key, value in batch.items() if key != ROW}
        # The Trainer sets this before each step, and TRL reads it.
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        # All processes take the same batch, since they gather the weights of a sharded base together.
        with trainer.without_reducing(model):
            trained = batch["labels"] != MASKED if "labels" in batch else batch["completion_mask"]
            trainer.plain_training_step(model, batch, trained.sum())

    def _optimizer_state(self) -> list[torch.Tensor]:
        """Memory for AdamW's two moments, which the optimizer allocates in the first step."""
        if self.trainer.optimizer.state:
            return []
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        return [torch.empty_like(p, dtype=torch.float32) for p in trained for _ in range(2)]


@contextlib.contextmanager
def without_a_trace(trainer: Any) -> Iterator[None]:
    """Let passes within the block leave no trace in what TRL counts, nor in the random states."""
    device = trainer.args.device
    tokens, metrics = trainer._total_train_tokens, trainer._metrics
    gathering = ("gather", "gather_for_metrics")
    gather = {name: getattr(trainer.accelerator, name) for name in gathering}
    # Otherwise a process that runs out of memory would leave the others waiting for its metrics.
    for name in gathering:
        setattr(trainer.accelerator, name, lambda value: value)
    trainer._metrics = {mode: counted.copy() for mode, counted in metrics.items()}
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        for name in gathering:
            setattr(trainer.accelerator, name, gather[name])
        trainer._total_train_tokens, trainer._metrics = tokens, metrics


def longest_rows(dataset: Dataset, count: int) -> list[int]:
    """The indices of the `count` longest rows."""
    lengths = row_lengths(dataset)
    return heapq.nlargest(count, range(len(lengths)), key=lengths.__getitem__)

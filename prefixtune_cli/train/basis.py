"""The basis of Prefix-Tuning+ in training: computed before the first step, kept in checkpoints, folded at the end."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_outputs import CausalLMOutput

from prefixtune_cli.adapter import (
    basis_state,
    fold_basis,
    initialize_basis,
    load_basis_state,
    step_weight,
)
from prefixtune_cli.errors import ModelError
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import AdapterSection, PrefixTuningPlus
from prefixtune_cli.train.order import ROW, row_lengths
from prefixtune_cli.train.trial import without_a_trace

STATE = "basis.safetensors"
ROWS = 64
TOKENS = 16_384  # the most tokens; if rows are long, we take fewer rows, but at least one
# The parts of a batch that only the loss takes; the other ones begin with `ref_` or `KL_`.
BESIDE = frozenset({ROW, "completion_mask", "label"})
AT_ONCE = 2048  # tokens of one pass, which keeps no activations


class Basis(TrainerCallback):
    """Computes the basis when training begins, from rows that the seed chooses; or loads it from a checkpoint.

    Every process passes over the same rows, because sharded weights need all processes, and takes the leader's result.

    Args:
        trainer: the one that will train.
        reporter: hears the progress of the pass.
        checkpoint: where training continues from; None at the start.
    """

    def __init__(self, trainer: Any, reporter: Reporter, checkpoint: Path | None = None) -> None:
        self.trainer = trainer
        self.reporter = reporter
        self.checkpoint = checkpoint

    @staticmethod
    def is_for(section: AdapterSection) -> bool:
        """Whether a recipe's adapter is trained in a basis."""
        return isinstance(section, PrefixTuningPlus) and section.basis

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Set the basis of every M.

        Raises:
            ModelError: these rows give no basis.
            StopTraining: a signal has arrived.
        """
        model: PeftModel = self.trainer.model
        if self.checkpoint is not None:
            load_basis_state(model, load_file(self.checkpoint / STATE))
            return
        called = self.trainer.model_wrapped
        takes = inspect.signature(model.get_base_model().forward).parameters
        # All logits would take more memory than everything else.
        without = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}

        def forward(_: Any, batch: Any) -> Any:
            if "labels" not in batch:  # preferences
                return called(**batch, **without, use_cache=False)
            return CausalLMOutput(loss=self.trainer.compute_loss(called, dict(batch)))

        try:
            with without_a_trace(self.trainer):
                loss = initialize_basis(model, self._batches(), forward_fn=forward)
        except ValueError as error:
            raise ModelError(f"{error} Type --no-basis to train without it.") from error
        if (weight := step_weight(loss)) < 1:
            self.reporter.notice(
                f"Before the first step, the loss on the rows of the basis is {loss:.2f} nats per token. The model is "
                f"near the data, so a step is {weight:.2g} of the learning rate."
            )
        mine = {key: value.cpu() for key, value in basis_state(model).items()}
        load_basis_state(model, self.trainer.processes.told(mine))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Have the adapter hold M itself; if DeepSpeed shards the weights, saving does that instead."""
        if not any(hasattr(p, "ds_id") for p in self.trainer.model.parameters()):
            fold_basis(self.trainer.model)

    def save(self, folder: Path) -> None:
        """Write the basis into a checkpoint: its adapter has only M, which does not restore the training exactly."""
        save_file(basis_state(self.trainer.model), folder / STATE)

    def _batches(self) -> Iterator[dict[str, torch.Tensor]]:
        """Batches that depend neither on the training's batch size nor on the number of processes."""
        trainer = self.trainer
        lengths = row_lengths(trainer.train_dataset)[: trainer.real_rows]
        rows = sorted(self._rows(lengths), key=lengths.__getitem__)  # little padding
        done = 0
        self.reporter.progress("basis", done, len(rows), {})
        while done < len(rows):
            trainer.stop_if_asked()
            end = done + 1
            while end < len(rows) and (end + 1 - done) * lengths[rows[end]] <= AT_ONCE:
                end += 1
            batch = trainer.data_collator([trainer.train_dataset[i] for i in rows[done:end]])
            yield {
                key: value.to(trainer.args.device) if isinstance(value, torch.Tensor) else value
                for key, value in batch.items()
                if key not in BESIDE and not key.startswith(("ref_", "KL_"))
            }
            done = end
            self.reporter.progress("basis", done, len(rows), {})

    def _rows(self, lengths: Sequence[int]) -> list[int]:
        """The indices of the rows."""
        trainer = self.trainer
        generator = torch.Generator().manual_seed(trainer.args.seed)
        chosen: list[int] = []
        tokens = 0
        for row in torch.randperm(len(lengths), generator=generator)[:ROWS].tolist():
            tokens += lengths[row]
            if chosen and tokens > TOKENS:
                break
            chosen.append(row)
        return chosen

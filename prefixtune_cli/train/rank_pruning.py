"""AdaLoRA's pruning of ranks while it trains (Zhang et al. 2023), driven by peft's own allocator.

Ranks are pruned by setting singular values to zero; peft drops them from the saved adapter by the pattern that it keeps
in the configuration. While training that pattern is kept here instead, as a checkpoint whose tensors have shrunk would
fit neither the model nor the optimizer's state of a run that is resumed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AdaLoraConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from prefixtune_cli.errors import RecipeError

STATE = "rank_pruning.safetensors"
_AVERAGES = (
    "ipt",
    "exp_avg_ipt",
    "exp_avg_unc",
)  # of each weight's importance, in peft's allocator


class RankPruning(TrainerCallback):
    """Tells peft's allocator of every step, and keeps its state in checkpoints.

    Args:
        model: with an AdaLoRA adapter.
        given: the recipe's `adapter.config`. Where it has no `tinit` and `tfinal`, ranks are pruned from a tenth of
            the steps on, and not any more in the last fifth.
        checkpoint: the training goes on from there; None is the start.
    """

    def __init__(
        self, model: PeftModel, given: Mapping[str, Any], checkpoint: Path | None = None
    ) -> None:
        self._tuner: Any = model.base_model
        self._config: Any = model.active_peft_config
        self._given = given
        self._checkpoint = checkpoint
        self._pattern: dict[str, list[bool]] | None = None

    @staticmethod
    def is_for(model: object) -> bool:
        """Whether this is a model whose ranks are to be pruned."""
        return isinstance(model, PeftModel) and isinstance(model.active_peft_config, AdaLoraConfig)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Fit the phases to the number of steps.

        Raises:
            RecipeError: they leave no step to prune in.
        """
        steps, config = state.max_steps, self._config
        config.tfinal = self._given.get("tfinal", steps // 5)
        # Not before the second step: before the first every singular value is zero, and as important as any other.
        second = max(0, min(2, steps - 1 - config.tfinal))
        config.tinit = self._given.get("tinit", max(steps // 10, second))
        if config.tinit + config.tfinal >= steps:
            raise RecipeError(
                f"adapter.config.tinit {config.tinit} and tfinal {config.tfinal} leave no step to prune ranks in: the "
                f"run has {steps}. Make them smaller, or leave them out."
            )
        self._tuner.rankallocator.set_total_step(steps)
        if self._checkpoint is not None:
            self.load(self._checkpoint)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Prune, while the gradients of the step are there."""
        step = state.global_step + 1
        if step == self._config.total_step - self._config.tfinal:
            self._tuner.rankallocator.update_ipt(
                self._tuner.model
            )  # peft's skips the last of these steps
        self._config.rank_pattern = self._pattern
        self._tuner.update_and_allocate(step)
        self._pattern, self._config.rank_pattern = self._config.rank_pattern, None

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Have the adapter be saved without what was pruned."""
        self._config.rank_pattern = self._pattern

    def save(self, folder: Path) -> None:
        """Write the allocator's state into a checkpoint."""
        allocator = self._tuner.rankallocator
        tensors = {
            f"{average}/{name}": tensor.contiguous()
            for average in _AVERAGES
            for name, tensor in getattr(allocator, average).items()
        }
        save_file(tensors, folder / STATE, metadata={"pattern": json.dumps(self._pattern)})

    def load(self, checkpoint: Path) -> None:
        """Take up the state that `save` wrote."""
        allocator = self._tuner.rankallocator
        allocator.reset_ipt()
        places = {name: p.device for name, p in self._tuner.model.named_parameters()}
        with safe_open(checkpoint / STATE, framework="pt") as file:
            self._pattern = json.loads(file.metadata()["pattern"])
            for key in file.keys():  # noqa: SIM118
                average, _, name = key.partition("/")
                tensor: torch.Tensor = file.get_tensor(key)
                getattr(allocator, average)[name] = tensor.to(places[name])

"""The optimizers, which are those of transformers' trainer."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn
from transformers.training_args import OptimizerNames

from prefixtune_cli.errors import RecipeError


def check_optimizer(name: str) -> None:
    """Raise RecipeError if transformers does not know the optimizer."""
    known = [str(known.value) for known in OptimizerNames]
    if name not in known:
        near = get_close_matches(name, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"They are {', '.join(known)}."
        raise RecipeError(
            f"train.optimizer must be one of transformers' optimizers, got {name!r}. {hint}"
        )


def optimizer_factory(
    name: str, *, on_gpu: bool, use_cpu: bool
) -> Callable[[list[nn.Parameter]], Any]:
    """A function that makes the optimizer that transformers' trainer would make, with a learning rate of 0.

    Args:
        name: one of transformers' names.
        on_gpu: whether the weights are, or are meant to be, on a GPU, where AdamW computes on all of them at once.
        use_cpu: keeps transformers from setting up a GPU.

    Raises:
        RecipeError: no optimizer has this name, or it cannot be used here.
    """
    if name == "adamw_torch":
        return lambda trained: torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0, foreach=on_gpu)
    check_optimizer(name)
    from transformers import Trainer, TrainingArguments

    def refusal(error: Exception) -> RecipeError:
        return RecipeError(f"train.optimizer {name} cannot be used here: {error}")

    arguments = TrainingArguments(optim=name, learning_rate=0.0, use_cpu=use_cpu)
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ValueError, ImportError) as error:
        raise refusal(error) from error

    def make(trained: list[nn.Parameter]) -> Any:
        try:
            return kind(trained, **settings)
        except (ValueError, ImportError, TypeError) as error:
            raise refusal(error) from error

    return make

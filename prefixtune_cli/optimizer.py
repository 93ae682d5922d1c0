"""The optimizers, which are those of transformers' trainer."""

from __future__ import annotations

from difflib import get_close_matches

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

"""The memory plan: bytes by part on each GPU, for each method, before any weights load."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass
from typing import Any, get_args

import torch

from prefixtune_cli.errors import ModelError, PtpError, RecipeError, first_line
from prefixtune_cli.model import check_method
from prefixtune_cli.optimizer import optimizer_factory
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.plan.processes import Weights, on_each
from prefixtune_cli.plan.skeleton import Skeleton
from prefixtune_cli.plan.step import Batch, Peaks, peaks
from prefixtune_cli.recipe.schema import (
    IN_FRONT,
    IN_THE_CACHE,
    NOT_SPREAD,
    Full,
    Lora,
    Method,
    PrefixTuning,
    PrefixTuningPlus,
    Recipe,
)

METHODS: tuple[Method, ...] = get_args(Method)
MOST_ROWS = 4096  # larger batches are of no use
# Memory of a GPU besides tensors: about half a GiB for the CUDA context with the libraries' kernels and workspaces, and
# as much for memory that the allocator reserves but cannot use. This is an estimate that no GPU has confirmed.
FRAMEWORK_RESERVE_BYTES = 2**30


@dataclass(frozen=True)
class Parts:
    """Bytes at the memory peak of a training step, on each GPU. They add up to the total.

    A part is 0 if nothing of it exists at the peak: gradients, for example, if the peak comes before the backward pass.
    `logits` are the tiles in which the head computes. The workspace of an operator counts as activations.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    reserve: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True)
class MethodPlan:
    """The memory that a recipe needs with one of the methods.

    Attributes:
        method: the adapter's method.
        bits: precision of the base. `full` keeps it in float32, whatever this says.
        parts: with checkpointing or without, as in the recipe.
        plain: without checkpointing.
        checkpointed: with checkpointing; None if the method does not go with it.
    """

    method: str
    bits: int
    parts: Parts
    plain: Parts
    checkpointed: Parts | None

    @property
    def total(self) -> int:
        return self.parts.total


def plan(recipe: Recipe, *, methods: Sequence[str] | None = None) -> list[MethodPlan]:
    """The memory that a recipe needs, for several methods side by side.

    Args:
        recipe: `model.device` chooses the device to plan for; `auto` is a GPU if this machine has one.
        methods: None takes those of `methods_beside`, each but the recipe's own with its defaults.

    Raises:
        ModelError: the base is unknown, or one of the methods cannot run it.
        RecipeError: the optimizer is unknown.
    """
    return [
        Planner(with_method(recipe, method)).plan() for method in methods or methods_beside(recipe)
    ]


def methods_beside(recipe: Recipe) -> tuple[str, ...]:
    """The methods to plan side by side: `METHODS`, after the recipe's own if it is not one of them.

    Preferences go without full.
    """
    own = recipe.adapter.method
    methods = tuple(m for m in METHODS if not (recipe.on_preferences and m == "full"))
    return methods if own in methods else (own, *methods)


def largest_batch(recipe: Recipe, available_bytes: int) -> int:
    """The most rows, or pairs of answers, of a forward pass that fit, up to `MOST_ROWS`; 0 if not even one fits.

    Raises:
        PtpError: as `plan`.
    """
    return Planner(recipe).largest_batch(available_bytes)


def with_method(recipe: Recipe, method: str) -> Recipe:
    """The recipe with another method, without the settings that do not go with that method.

    Raises:
        RecipeError: the method does not go with the recipe's `train.parallel`.
    """
    if method == recipe.adapter.method:
        return recipe
    if why := NOT_SPREAD.get((recipe.train.parallel, method)):
        raise RecipeError(f"--parallel {recipe.train.parallel} does not go with it, {why}.")
    sections: dict[str, Any] = {
        "prefix-tuning-plus": PrefixTuningPlus,
        "lora": Lora,
        "prefix-tuning": PrefixTuning,
        "full": Full,
    }
    changes: dict[str, Any] = {"adapter": sections[method]()}
    if method == "prefix-tuning":
        off = {"gradient_checkpointing": False, "packing": False}
        changes["train"] = recipe.train.model_copy(update=off)
    if method == "full" and recipe.model.bits in (4, 8):
        changes["model"] = recipe.model.model_copy(update={"bits": 16})
    return recipe.model_copy(update=changes)


class Planner:
    """Plans one recipe, and keeps its results.

    Args:
        recipe: as for `plan`.

    Raises:
        PtpError: as `plan`.
    """

    def __init__(self, recipe: Recipe) -> None:
        # Our own error says what fails; PyTorch's log of it would be noise.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        self.recipe = recipe
        self.on_gpu = is_for_gpu(recipe)
        self._optimizer = optimizer_factory(
            recipe.train.optimizer, on_gpu=self.on_gpu, use_cpu=True
        )
        try:
            config = base_config(recipe.model)
            check_method(recipe.model, recipe.adapter, config)
            self._skeleton = Skeleton(recipe.model, recipe.adapter, config, on_gpu=self.on_gpu)
        except PtpError:
            raise
        except Exception as error:  # a model's own code may fail in any way on tensors without data
            raise _cannot_be_planned(recipe, error) from error
        self._weights = Weights.of(self._skeleton)
        self._known: dict[Batch, Peaks] = {}

    def of(self, recipe: Recipe) -> Planner:
        """A planner for a changed recipe. It shares with this one what the change does not affect."""
        same = (recipe.model, recipe.adapter, recipe.train.optimizer) == (
            self.recipe.model,
            self.recipe.adapter,
            self.recipe.train.optimizer,
        )
        if not same:
            return Planner(recipe)
        planner = copy(self)
        planner.recipe, planner._known = recipe, dict(self._known)
        return planner

    def plan(self) -> MethodPlan:
        """The plan with checkpointing and without."""
        recipe = self.recipe
        plain = self.parts(checkpointing=False)
        takes_no_checkpoints = recipe.adapter.method in IN_THE_CACHE
        checkpointed = None if takes_no_checkpoints else self.parts(checkpointing=True)
        chosen = checkpointed if recipe.train.gradient_checkpointing else plain
        return MethodPlan(
            recipe.adapter.method, recipe.model.bits, chosen or plain, plain, checkpointed
        )

    def parts(self, rows: int | None = None, *, checkpointing: bool | None = None) -> Parts:
        """The parts at the memory peak.

        Args:
            rows: rows of a forward pass, or pairs of answers, each of which takes two; None takes the recipe's.
            checkpointing: None takes the recipe's.
        """
        section = self.recipe.train
        rows = section.batch_size if rows is None else rows
        rows = 2 * rows if self.recipe.kind == "pairs" else rows
        batch = Batch(
            rows=rows,
            tokens=self.recipe.data.max_length,
            padded=rows > 1 and not section.packing and not self._padding_free,
            accumulated=section.gradient_accumulation > 1,
            checkpointing=section.gradient_checkpointing
            if checkpointing is None
            else checkpointing,
            max_grad_norm=section.max_grad_norm,
            # A packed row has several examples.
            learned=None if section.packing else section.first_tokens,
        )
        if batch not in self._known:
            self._known[batch] = self._peaks(batch)
        return self._highest(self._known[batch])

    def largest_batch(self, available_bytes: int) -> int:
        """See `largest_batch`.

        Memory grows at least linearly with the rows. So the straight line through two batches gives a good next guess.
        """

        def total(rows: int) -> int:
            return self.parts(rows).total

        least = self.recipe.least_batch
        if total(least) > available_bytes:
            return 0
        fits, too_many = least, MOST_ROWS + 1
        guess = self.recipe.train.batch_size  # the plan knows its memory already
        while too_many - fits > 1:
            guess = min(max(guess, fits + 1), too_many - 1)
            slope = (total(guess) - total(fits)) / (guess - fits)
            if total(guess) <= available_bytes:
                fits = guess
            else:
                too_many = guess
            left = available_bytes - total(fits)
            guess = fits + int(left / slope) if slope > 0 else (fits + too_many) // 2
        return fits

    @property
    def _padding_free(self) -> bool:
        recipe = self.recipe
        flash = recipe.model.attention.startswith("flash_attention")
        return (
            flash
            and not recipe.on_preferences
            and recipe.adapter.method not in IN_THE_CACHE | IN_FRONT
        )

    def _peaks(self, batch: Batch) -> Peaks:
        try:
            return peaks(self._skeleton, batch, self._optimizer)
        except Exception as error:  # see above
            raise _cannot_be_planned(self.recipe, error) from error

    def _highest(self, found: Peaks) -> Parts:
        parts = max(
            on_each(found, self.recipe.train, self._weights).values(),
            key=lambda parts: sum(parts.values()),
        )
        names = ("weights", "adapter", "gradients", "optimizer", "activations", "logits")
        return Parts(
            **{name: parts.get(name, 0) for name in names},
            reserve=FRAMEWORK_RESERVE_BYTES if self.on_gpu else 0,
        )


def is_for_gpu(recipe: Recipe) -> bool:
    """Whether the recipe computes on a GPU: it says so, or it says `auto` and this machine has one."""
    wanted = recipe.model.device
    return wanted == "cuda" or (wanted == "auto" and torch.cuda.is_available())


def _cannot_be_planned(recipe: Recipe, error: Exception) -> ModelError:
    reason = first_line(error)
    return ModelError(
        f"{recipe.model.name} with method {recipe.adapter.method} cannot be planned: without weights it does not run "
        f"({reason}). Measure it by a short run: ptp train --steps 2, which prints the peak memory."
    )

"""One training step on a model without weights, and the memory peak of each of its phases.

The step is the one that `train` takes through TRL: a forward pass under autocast with the fused head, a backward pass,
gradient clipping and the optimizer. The optimizer has its state from the start, as it has from the second step on.

A deep decoder does not run whole. Each layer of a run of equal layers adds the same memory at each moment of the step.
So the step runs with two layers of the run and with three, and the plan adds what the third layer adds for every
further layer. It does so for each phase, because the peak of a deep model may fall into another phase than that of a
shallow one. Memory rises or falls evenly within a run, so only the phases of its first and last layer count.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from prefixtune_cli.plan.accounting import (
    ADAPTER,
    GRADIENTS,
    OPTIMIZER,
    WEIGHTS,
    Accountant,
    Parts,
    Phase,
)
from prefixtune_cli.plan.kernels import FusedHead
from prefixtune_cli.plan.skeleton import Run, Skeleton

Peaks = dict[Phase, Parts]
MOST_RUNS = 3  # a decoder with more runs of equal layers, such as one that alternates, runs whole
MIDDLE = "middle"


@dataclass(frozen=True)
class Batch:
    """The input and the settings of a step.

    Args:
        rows: examples in a forward pass.
        tokens: length of each row, including padding.
        padded: rows differ in length, so attention gets a mask.
        accumulated: the gradients of an earlier forward pass exist already.
        checkpointing: the backward pass recomputes activations.
        max_grad_norm: the norm to clip gradients to; 0 does not clip.
        learned: the most trained tokens of a row; None means all but the first.
    """

    rows: int
    tokens: int
    padded: bool
    accumulated: bool
    checkpointing: bool
    max_grad_norm: float
    learned: int | None = None


def peaks(
    skeleton: Skeleton, batch: Batch, optimizer: Callable[[list[nn.Parameter]], Any]
) -> Peaks:
    """The parts at the memory peak of each phase, in bytes, for the whole decoder."""
    long = [run for run in skeleton.runs if run.count > 3]
    if not long or len(skeleton.runs) > MOST_RUNS:
        return step(skeleton, batch, optimizer, None)
    kept = {run: _kept(run, 2 if run in long else run.count) for run in skeleton.runs}
    base = step(skeleton, batch, optimizer, kept)
    found = {phase: dict(parts) for phase, parts in base.items()}
    for run in long:
        deeper = step(skeleton, batch, optimizer, kept | {run: _kept(run, 3)})
        for phase, parts in found.items():
            for part in parts.keys() | deeper[phase].keys():
                added = deeper[phase].get(part, 0) - base[phase].get(part, 0)
                parts[part] = parts.get(part, 0) + (run.count - 2) * added
    return found


def _kept(run: Run, count: int) -> list[int]:
    """The first `count` - 1 layers of a run and its last."""
    return [*range(run.start, run.start + count - 1), run.start + run.count - 1]


def step(
    skeleton: Skeleton,
    batch: Batch,
    optimizer: Callable[[list[nn.Parameter]], Any],
    kept: dict[Run, list[int]] | None,
) -> Peaks:
    """As `peaks`, for a decoder that has only the layers in `kept`; None keeps all."""
    accountant = Accountant(truth=not batch.padded)
    # transformers drops a mask without padding, but it cannot read a fake one. So this mask is a real tensor.
    real_mask = None if batch.padded else torch.ones(batch.rows, batch.tokens, dtype=torch.bool)
    numbers = None if kept is None else [n for run in skeleton.runs for n in kept[run]]
    names = _layer_names(kept)
    with (
        skeleton.only(numbers) as layers,
        skeleton.checkpointed(batch.checkpointing),
        skeleton.mode,
        accountant,
    ):
        watch = _Watch(accountant)
        for layer, name in zip(layers, names or [MIDDLE] * len(layers), strict=True):
            watch.layer(layer, name)
        try:
            _step(skeleton, batch, real_mask, optimizer, accountant, watch)
        finally:
            watch.release()
            skeleton.model.zero_grad(set_to_none=True)
    return {p: parts for p, parts in accountant.peaks.items() if numbers is None or MIDDLE not in p}


def _layer_names(kept: dict[Run, list[int]] | None) -> list[Hashable]:
    """The number of each kept layer, or `MIDDLE` for a layer that only stands for others."""
    if kept is None:
        return []
    names: list[Hashable] = []
    for run, numbers in kept.items():
        ends = {run.start, run.start + run.count - 1}
        names += [n if n in ends or len(numbers) == run.count else MIDDLE for n in numbers]
    return names


def _step(
    skeleton: Skeleton,
    batch: Batch,
    real_mask: Tensor | None,
    make_optimizer: Callable[[list[nn.Parameter]], Any],
    accountant: Accountant,
    watch: _Watch,
) -> None:
    model = skeleton.model
    trained = [p for p in model.parameters() if p.requires_grad]
    accountant.phase = ("start",)
    bases = [value for name, value in model.named_buffers() if name.endswith(".basis")]
    accountant.add(bases, ADAPTER)
    accountant.add((b for b in model.buffers() if all(b is not one for one in bases)), WEIGHTS)
    accountant.add((p for p in model.parameters() if not p.requires_grad), WEIGHTS)
    accountant.add(trained, ADAPTER if skeleton.has_adapter else WEIGHTS)
    optimizer = make_optimizer(trained)
    _first_step(optimizer, trained, accountant)
    accountant.start_over()
    if batch.accumulated:
        with accountant.counting_as(GRADIENTS):
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
    for parameter in trained:
        watch.gradient(parameter)

    accountant.phase = ("forward",)
    loss = _forward(skeleton, batch, real_mask, accountant)
    watch.backward = True
    accountant.phase = ("backward",)
    loss.backward()  # type: ignore[no-untyped-call]
    accountant.phase = ("optimizer",)
    with accountant.counting_as(OPTIMIZER):
        if batch.max_grad_norm:
            torch.nn.utils.clip_grad_norm_(trained, batch.max_grad_norm)
        optimizer.step()


def _first_step(optimizer: Any, trained: list[nn.Parameter], accountant: Accountant) -> None:
    """Make the optimizer allocate its state."""
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    state = (value for value in tree_iter(list(optimizer.state.values())))
    accountant.add((value for value in state if isinstance(value, Tensor)), OPTIMIZER)
    for parameter in trained:
        parameter.grad = None


def _forward(
    skeleton: Skeleton, batch: Batch, real_mask: Tensor | None, accountant: Accountant
) -> Tensor:
    """The loss as TRL computes it: without full logits, and with the load-balancing loss of a mixture of experts."""
    base = skeleton.base
    original = base.forward
    base.forward = MethodType(_with_fused_head(skeleton, batch, accountant), base)
    shape = (batch.rows, batch.tokens)
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    mask = torch.ones(shape, dtype=torch.long) if real_mask is None else real_mask
    try:
        with (
            skeleton.attention(),
            torch.autocast("cpu", torch.bfloat16, enabled=not skeleton.in_float32),
        ):
            loss: Tensor = skeleton.model(
                input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
            )
    finally:
        base.forward = original
    return loss


def _with_fused_head(
    skeleton: Skeleton, batch: Batch, accountant: Accountant
) -> Callable[..., Tensor]:
    config = skeleton.base.config.get_text_config()
    weight_of_balance = getattr(config, "router_aux_loss_coef", 0.0)
    balanced = hasattr(config, "output_router_logits") and weight_of_balance != 0.0

    def forward(self: Any, *args: Any, labels: Tensor, **kwargs: Any) -> Tensor:
        if balanced:
            kwargs["output_router_logits"] = True
        outputs = self.base_model(*args, **kwargs | {"use_cache": False})
        accountant.phase = ("head",)
        hidden = outputs.last_hidden_state[:, :-1]
        flat = hidden.reshape(-1, hidden.shape[-1])
        # TRL projects only the tokens with a loss.
        learned = len(flat) if batch.learned is None else min(len(flat), batch.rows * batch.learned)
        flat = flat.index_select(0, torch.arange(learned))
        head = self.get_output_embeddings()
        log_p = FusedHead.apply(flat, head.weight, accountant, skeleton.on_gpu)  # type: ignore[no-untyped-call]
        loss: Tensor = -log_p.sum()
        if balanced:
            loss = loss + weight_of_balance * load_balancing_loss_func(
                outputs.router_logits,
                config.num_experts,
                config.num_experts_per_tok,
                kwargs.get("attention_mask"),
            )
        return loss

    return forward


class _Watch:
    """The hooks that tell the accountant which phase a step is in."""

    def __init__(self, accountant: Accountant) -> None:
        self.backward = False
        self._accountant = accountant
        self._handles: list[Any] = []

    def layer(self, layer: nn.Module, name: Hashable) -> None:
        """Name the forward and the backward pass of a layer as phases."""
        accountant = self._accountant

        def enter(*_: Any) -> None:
            if not self.backward:  # otherwise this pass recomputes activations
                accountant.phase = ("forward", name)

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output if isinstance(output, Tensor) else output[0]
            if not self.backward and hidden.requires_grad:
                hidden.register_hook(lambda _: setattr(accountant, "phase", ("backward", name)))

        self._handles += [
            layer.register_forward_pre_hook(enter),
            layer.register_forward_hook(leave),
        ]

    def gradient(self, parameter: nn.Parameter) -> None:
        """Count the parameter's gradient under gradients."""
        self._handles.append(
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: self._accountant.add([p.grad], GRADIENTS)
            )
        )

    def release(self) -> None:
        for handle in self._handles:
            handle.remove()

"""Costs are measured in rounds: each contestant, and the base alone, has a turn on one copy of the base.

If something else slows the machine for a while, it slows all of a round alike, and ratios within the round stay right.
So ratios are taken round by round, and their median and range are given. The order of the turns rotates from round to
round, so that no contestant always follows the same one.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.compare.metrics import COSTS, ON_DISK, PARAMETERS, Cost, Measured, Metric
from prefixtune_cli.compare.speed.turn import Figures, Shape, take_turn
from prefixtune_cli.errors import Interrupted, PtpError, ResourceError, UsageError, first_line
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import AdapterSection, ModelSection

BASE = "base"


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        base: the base's costs. Its training step is a forward pass through the frozen base, and a backward pass down
            to the output of the embeddings; nothing is trained. A method can be faster than that: if it trains the top
            layers alone, or PT+, which needs no gradient of the first layer's queries, keys and values.
        contestants: label → the costs, or why there are none; in the order given.
        rounds: label → metric (of COSTS, PARAMETERS, ON_DISK) → one value for each round, or no values where a round
            has none. BASE is among the labels; contestants that failed are not.
        order: the labels of each round in the order of their turns.
        parameters: label → trained parameters; for BASE, all of its parameters.
        adapter_bytes: label → bytes of the adapter as saved.
    """

    base: Cost
    contestants: Mapping[str, Cost | str]
    rounds: Mapping[str, Mapping[Metric, list[float]]]
    order: Sequence[Sequence[str]]
    parameters: Mapping[str, int]
    adapter_bytes: Mapping[str, int]


def measure(
    model: ModelSection,
    contestants: Sequence[tuple[str, AdapterSection]],
    shape: Shape,
    *,
    base: PreTrainedModel,
    reporter: Reporter,
) -> Speeds:
    """Measure the costs of the contestants and of the base beside them.

    The first round is not counted: in it memory is taken, kernels are chosen and files are read. If a contestant fails,
    it is left out of the later rounds, and the others go on.

    Args:
        model: the recipe's model; with 32 bits there is no autocast.
        contestants: label and adapter of each; labels differ, and none is BASE.
        shape: how much is computed.
        base: a model without adapters; afterwards it is as it was.
        reporter: hears of every turn.

    Raises:
        UsageError: a sequence is longer than the base's positions.
        ResourceError: the memory does not suffice for the base alone.
    """
    assert len({BASE, *dict(contestants)}) == len(contestants) + 1
    turns: list[tuple[str, AdapterSection | None]] = [(BASE, None), *contestants]
    _check_positions(base, contestants, shape)
    figures: dict[str, list[Figures]] = {label: [] for label, _ in turns}
    failures: dict[str, str] = {}
    order: list[list[str]] = []
    done, total = 0, len(turns) * (shape.rounds + 1)
    with _as_it_was(base):
        for number in range(shape.rounds + 1):
            rotated = [turns[(i + number) % len(turns)] for i in range(len(turns))]
            order.append([])
            for label, adapter in rotated:
                reporter.progress("measuring", done, total, {})
                done += 1
                if label in failures:
                    continue
                order[-1].append(label)
                try:
                    figures[label].append(
                        take_turn(base, adapter, shape, autocast=model.bits != 32)
                    )
                except Interrupted:
                    raise
                except Exception as error:  # whatever one method runs into, the others go on
                    failures[label] = _why_not(error, shape)
                    if label == BASE and should_reduce_batch_size(error):
                        raise ResourceError(
                            f"Not even the base by itself can be measured. {failures[BASE]}"
                        ) from error
                    if label == BASE:
                        raise
                if label in failures:
                    gc.collect()  # the error's traceback no longer holds tensors
                    clear_device_cache()
                    reporter.warning(f"{label} cannot be measured. {failures[label]}")
    reporter.progress("measuring", total, total, {})
    counted = {label: them[1:] for label, them in figures.items() if label not in failures}
    rounds = {label: _rounds(them) for label, them in counted.items()}
    lora = next((label for label, adapter in contestants if adapter.method == "lora"), None)
    costs = {label: _cost(label, lora, rounds, shape) for label in rounds}
    return Speeds(
        costs[BASE],
        {label: costs.get(label) or failures[label] for label, _ in contestants},
        rounds,
        order[1:],
        {label: int(ours[PARAMETERS][0]) for label, ours in rounds.items()}
        | {BASE: base.num_parameters()},
        {label: int(ours[ON_DISK][0]) for label, ours in rounds.items() if label != BASE},
    )


@contextlib.contextmanager
def _as_it_was(base: PreTrainedModel) -> Iterator[None]:
    """Restore the base's mode, its trainable parameters and the state of the random numbers after the block.

    Within the block the garbage collector skips what existed before it: to look through that takes a second each time,
    and may happen in the middle of a measurement.
    """
    training = base.training
    trainable = [(parameter, parameter.requires_grad) for parameter in base.parameters()]
    try:
        with torch.random.fork_rng([base.device] if base.device.type == "cuda" else []):
            torch.manual_seed(0)
            base.eval()
            gc.collect()
            gc.freeze()
            yield
    finally:
        gc.unfreeze()
        base.train(training)
        for parameter, before in trainable:
            parameter.requires_grad_(before)


def _check_positions(
    base: PreTrainedModel, contestants: Sequence[tuple[str, AdapterSection]], shape: Shape
) -> None:
    most = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
    virtual = most_virtual_tokens(adapter for _, adapter in contestants)
    longest = max(shape.length, shape.prompt_tokens + shape.new_tokens) + virtual
    if isinstance(most, int) and longest > most:
        raise UsageError(
            f"The base has {most} positions, and {longest} tokens are asked for (training rows of {shape.length}, a "
            f"prompt of {shape.prompt_tokens} with {shape.new_tokens} new tokens, {virtual} virtual ones before "
            f"either). Ask for {longest - most} fewer."
        )


def most_virtual_tokens(adapters: Iterable[AdapterSection]) -> int:
    """The most tokens that one of the adapters puts before a row."""
    configs = [models.peft_config(adapter) for adapter in adapters]
    return max((getattr(one, "num_virtual_tokens", None) or 0 for one in configs), default=0)


def _why_not(error: Exception, shape: Shape) -> str:
    if isinstance(error, PtpError):
        return str(error)
    said = first_line(error)
    if should_reduce_batch_size(error):
        return (
            f"The memory does not suffice for training on {shape.batch_size} rows of {shape.length} tokens, or for a "
            f"prompt of {shape.prompt_tokens}: {said}"
        )
    return f"{type(error).__name__}: {said}"


def _rounds(turns: Sequence[Figures]) -> dict[Metric, list[float]]:
    """Metric → the values of all turns, or no values where a turn has none."""
    found = {metric: [turn[metric] for turn in turns] for metric in turns[0]}
    return {
        m: [v for v in values if v is not None] if None not in values else []
        for m, values in found.items()
    }


def _cost(
    label: str, lora: str | None, rounds: Mapping[str, Mapping[Metric, list[float]]], shape: Shape
) -> Cost:
    """The costs, with their ratios to the base's and to those of the first LoRA."""
    ours = rounds[label]
    figures: dict[str, Any] = {m.key: _over_rounds(m, ours[m]) for m in COSTS}
    for metric in (m for m in COSTS if m.ratio):
        if label != BASE:
            figures[metric.over_base] = _ratio(metric, ours, rounds[BASE])
        if lora is not None:
            figures[metric.over_lora] = _ratio(metric, ours, rounds.get(lora, {}))
    return Cost(
        **figures,
        prompt_tokens=shape.prompt_tokens,
        prompts=shape.prompts,
        adapters=1 if label == BASE else shape.adapters,
        interleaved=True,
    )


def _over_rounds(metric: Metric, values: Sequence[float]) -> Measured | float | None:
    """The median, with the range if the metric has ratios; where the value never varies, the value as it is."""
    if not values:
        return None
    found = Measured.of(values)
    if metric.ratio:
        return found
    return found.median if found.low < found.high else values[0]


def _ratio(
    metric: Metric, ours: Mapping[Metric, list[float]], theirs: Mapping[Metric, list[float]]
) -> Measured | None:
    """How many times as fast one is as the other, by the rounds; None where one of them failed."""
    mine, others = ours.get(metric), theirs.get(metric)
    if not mine or not others:
        return None
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    return Measured.of(ratios if metric.up else [1 / ratio for ratio in ratios])

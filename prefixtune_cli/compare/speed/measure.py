"""Rounds in which every contestant, and the base by itself, takes its turn in one process on one copy of the base.

What disturbs a machine for a while then disturbs all of them alike, and a ratio within a round is free of it. The order
is rotated from round to round, so that nobody always comes after the same one. Ratios are taken round by round; what is
given is their median and range.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from transformers import PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.compare.metrics import COSTS, ON_DISK, PARAMETERS, Cost, Measured, Metric
from prefixtune_cli.compare.speed.random_base import random_base
from prefixtune_cli.compare.speed.turn import Figures, Shape, take_turn
from prefixtune_cli.errors import Interrupted, PtpError, ResourceError, UsageError
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import AdapterSection, ModelSection

BASE = "base"


@dataclass(frozen=True)
class Speeds:
    """What was measured.

    Attributes:
        base: the base's costs. Its training speed is a yardstick: forward and backward through the frozen base, down
            to the embeddings' output, without anything that is trained. A method can be faster: one that trains the
            top layers alone, or PT+, which needs no gradient of the first layer's queries, keys and values.
        contestants: by label, in the order given: the costs, or why there are none.
        rounds: by label, BASE among them, and by metric (COSTS, PARAMETERS, ON_DISK): one value a round, in the same
            rounds for all; none where some round has none. Who failed is not among them.
        order: of each round, the labels as they took their turns.
        parameters: trained ones by label; for BASE, all that it has.
        adapter_bytes: of the adapter as saved, by label.
    """

    base: Cost
    contestants: Mapping[str, Cost | str]
    rounds: Mapping[str, Mapping[Metric, list[float]]]
    order: Sequence[Sequence[str]]
    parameters: Mapping[str, int]
    adapter_bytes: Mapping[str, int]

    def ratio(self, label: str, other: str, metric: Metric) -> Measured | None:
        """How many times as fast `label` is as `other`, round by round; None where one of them failed.

        Args:
            label, other: contestants, or BASE.
            metric: one with a `ratio`.
        """
        return _ratio(metric, self.rounds.get(label, {}), self.rounds.get(other, {}))


def measure(
    model: ModelSection,
    contestants: Sequence[tuple[str, AdapterSection]],
    shape: Shape,
    *,
    base: PreTrainedModel | None,
    reporter: Reporter,
) -> Speeds:
    """Measure the costs of the contestants and of the base beside them.

    One round goes before those that count: memory is taken, kernels are chosen and files are read in it. A contestant
    that fails is left out from then on, and says why; the others go on.

    Args:
        model: the recipe's; `bits` decides about autocast, and what a random base is built in.
        contestants: label and adapter of each; labels differ, and none is BASE.
        shape: how much is computed.
        base: a model without adapters, which is as it was afterwards; None builds one with random weights.
        reporter: is told of every turn.

    Raises:
        UsageError: a sequence is longer than the base's positions.
        ModelError: there is no such base.
        ResourceError: the base by itself does not fit the memory.
    """
    assert len({BASE, *dict(contestants)}) == len(contestants) + 1
    turns: list[tuple[str, AdapterSection | None]] = [(BASE, None), *contestants]
    base = random_base(model) if base is None else base
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
                    found = take_turn(base, adapter, shape, autocast=model.bits != 32)
                    figures[label].append(found)
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
                    gc.collect()  # its traceback holds nothing any longer
                    clear_device_cache()
                    reporter.warning(f"{label} cannot be measured. {failures[label]}")
    reporter.progress("measuring", total, total, {})
    counted = {label: them[1:] for label, them in figures.items() if label not in failures}
    rounds = {label: _rounds(them) for label, them in counted.items()}
    costs = {label: _cost(label, rounds, shape) for label in rounds}
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
    """The base's mode, what of it is trainable, and the random numbers of others.

    The garbage collector passes over all that is there already: looking through it would take a second each time, now
    and then in the middle of a measurement.
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
    virtual = max((_virtual_tokens(adapter) for _, adapter in contestants), default=0)
    longest = max(shape.length, shape.prompt_tokens + shape.new_tokens) + virtual
    if isinstance(most, int) and longest > most:
        raise UsageError(
            f"The base has {most} positions, and {longest} tokens are asked for (training rows of {shape.length}, a "
            f"prompt of {shape.prompt_tokens} with {shape.new_tokens} new tokens, {virtual} virtual ones before "
            f"either). Ask for {longest - most} fewer."
        )


def _virtual_tokens(adapter: AdapterSection) -> int:
    with contextlib.suppress(PtpError):  # which its turn will tell
        return int(getattr(models.peft_config(adapter), "num_virtual_tokens", None) or 0)
    return 0


def _why_not(error: Exception, shape: Shape) -> str:
    if isinstance(error, PtpError):
        return str(error)
    said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    if should_reduce_batch_size(error):
        return (
            f"The memory does not suffice for training on {shape.batch_size} rows of {shape.length} tokens, or for a "
            f"prompt of {shape.prompt_tokens}: {said}"
        )
    return f"{type(error).__name__}: {said}"


def _rounds(turns: Sequence[Figures]) -> dict[Metric, list[float]]:
    """The values of each metric; none where some turn has none."""
    found = {metric: [turn[metric] for turn in turns] for metric in turns[0]}
    return {
        m: [v for v in values if v is not None] if None not in values else []
        for m, values in found.items()
    }


def _cost(label: str, rounds: Mapping[str, Mapping[Metric, list[float]]], shape: Shape) -> Cost:
    ours, base = rounds[label], rounds[BASE]
    figures: dict[str, Any] = {m.key: _over_rounds(m, ours[m]) for m in COSTS}
    if label != BASE:
        figures |= {m.over_base: _ratio(m, ours, base) for m in COSTS if m.ratio}
    return Cost(
        **figures,
        prompt_tokens=shape.prompt_tokens,
        prompts=shape.prompts,
        adapters=1 if label == BASE else shape.adapters,
        interleaved=True,
    )


def _over_rounds(metric: Metric, values: Sequence[float]) -> Measured | float | None:
    """The median; with its range where ratios are taken of it, and as it is where it never varies."""
    if not values:
        return None
    found = Measured.of(values)
    if metric.ratio:
        return found
    return found.median if found.low < found.high else values[0]


def _ratio(
    metric: Metric, ours: Mapping[Metric, list[float]], theirs: Mapping[Metric, list[float]]
) -> Measured | None:
    mine, others = ours.get(metric), theirs.get(metric)
    if not mine or not others:
        return None
    ratios = [a / b for a, b in zip(mine, others, strict=True)]
    return Measured.of(ratios if metric.up else [1 / ratio for ratio in ratios])

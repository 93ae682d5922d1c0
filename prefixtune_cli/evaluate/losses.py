"""Compares the losses of several models, for own data and for forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefixtune_cli.errors import ModelError
from prefixtune_cli.evaluate.outcome import BASE, Line
from prefixtune_cli.evaluate.paired import (
    Floats,
    Interval,
    PairedDifference,
    Transform,
    ratio_difference,
    ratio_interval,
)

Losses = Sequence[tuple[float, int]]  # a row's nats and predicted tokens


@dataclass(frozen=True)
class Judged:
    """What one model did: nats and predicted tokens of each row, and its answers to the questions, if any."""

    losses: Losses
    answers: list[str]


def check_numbers(scores: Sequence[float], task: str) -> None:
    """Raise ModelError if a score is not a number, because no figure computed from it would mean anything."""
    if wrong := sum(math.isnan(score) for score in scores):
        raise ModelError(
            f"{task}: {wrong} of {len(scores)} scores are not numbers. The weights are broken, or values overflow at "
            "this precision; try --bits 32."
        )


def loss_items(origins: Sequence[str], losses: Mapping[str, Losses]) -> list[dict[str, Any]]:
    """Each row's origin, its predicted tokens, and every model's nats on them."""
    tokens = [count for _, count in next(iter(losses.values()))]
    return [
        {"origin": origin, "tokens": count, "nats": {m: found[i][0] for m, found in losses.items()}}
        for i, (origin, count) in enumerate(zip(origins, tokens, strict=True))
    ]


def loss_lines(name: str, losses: Mapping[str, Losses]) -> list[Line]:
    """The lines of the loss, in nats a token, and of the perplexity."""
    nats, tokens = zip(*(np.array(found, dtype=float).T for found in losses.values()), strict=True)
    assert all(np.array_equal(tokens[0], other) for other in tokens)
    sums = dict(zip(losses, nats, strict=True))
    return [
        ratio_line(name, "loss", sums, tokens[0]),
        ratio_line(name, "perplexity", sums, tokens[0], transform=_perplexity),
    ]


def ratio_line(
    name: str,
    metric: str,
    sums: Mapping[str, Floats],
    counts: Floats,
    *,
    transform: Transform | None = None,
) -> Line:
    """The line of Σsums / Σcounts of every model; less is better."""
    ratios = {model: np.array([found.sum() / counts.sum()]) for model, found in sums.items()}
    return compared_line(
        name,
        metric,
        len(counts),
        {m: float((transform(r) if transform else r)[0]) for m, r in ratios.items()},
        lambda a, b: ratio_difference(sums[b], counts, sums[a], counts, transform=transform),
        lambda a: ratio_interval(sums[a], counts, transform=transform),
        higher_is_better=False,
    )


def _perplexity(loss: Floats) -> Floats:
    return np.exp(np.minimum(loss, 700))


def compared_line(
    name: str,
    metric: str,
    items: int,
    values: Mapping[str, float],
    difference: Callable[[str, str], PairedDifference],
    interval: Callable[[str], Interval],
    **how: Any,
) -> Line:
    """A line with each model's difference from the base, `difference(model, BASE)`; without a base, with intervals."""
    if BASE in values:
        how["differences"] = {m: difference(m, BASE) for m in values if m != BASE}
    else:
        how["intervals"] = {m: interval(m) for m in values}
    return Line(name, metric, items, values, **how)

"""What can stand on an axis of a picture: quality, trainable parameters, training speed; and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixtune_cli.compare.comparison import OOD, TEST, Comparison
from prefixtune_cli.compare.standing import standings_on


@dataclass(frozen=True)
class Quantity:
    """A figure of each contestant.

    Attributes:
        values: by contestant, one a seed; contestants without any are absent.
        base: the base's value.
        up: whether more is better.
        unit, places: of the figures in words, and their digits after the point.
    """

    name: str
    values: Mapping[str, Sequence[float]]
    base: float | None
    up: bool
    unit: str
    places: int = 0
    log: bool = False

    def said(self, label: str) -> str:
        """The mean, and the standard deviation where there are several."""
        values = self.values[label]
        deviation = spread(values)
        around = "" if deviation is None else f" ± {self._figure(deviation)}"
        return f"{self._figure(statistics.mean(values))}{around}{self.unit}"

    @property
    def said_of_base(self) -> list[str]:
        return [] if self.base is None else [f"base {self._figure(self.base)}{self.unit}"]

    def _figure(self, value: float) -> str:
        return f"{value:,.{self.places}f}"


def quality(comparison: Comparison, data: str = TEST) -> Quantity:
    """Right answers in per cent where every result has answers, else the loss."""
    found = standings_on(comparison, data)
    results = {c.label: c.results(data) for c in comparison.contestants}
    where = {TEST: "test", OOD: "out-of-distribution"}[data]
    if found.metric == "exact match":
        shares = {k: [100 * (r.exact_match or 0) for r in each] for k, each in results.items()}
        base = None if found.base is None else 100 * found.base
        return Quantity(
            f"{where} data: right answers (%)", _some(shares), base, True, " %", places=1
        )
    losses = {k: [r.loss for r in each] for k, each in results.items()}
    name = f"{where} data: loss (nats a token, less is better)"
    return Quantity(name, _some(losses), found.base, False, " nats", places=3)


def parameters(comparison: Comparison) -> Quantity:
    counts = {c.label: [float(c.trainable_parameters or 0)] for c in comparison.contestants}
    positive = {label: values for label, values in counts.items() if values[0] > 0}
    return Quantity("trainable parameters (log scale)", positive, None, False, "", log=True)


def training_speed(comparison: Comparison) -> Quantity:
    costs = [(c.label, c.cost.training_tokens_per_second) for c in comparison.contestants if c.cost]
    speeds = {label: [speed.median] for label, speed in costs if speed is not None}
    return Quantity("training speed (tokens/s)", speeds, None, True, " tokens/s")


def _some(values: Mapping[str, Sequence[float]]) -> dict[str, Sequence[float]]:
    """Without what is not finite, and without contestants that have nothing else."""
    finite = {label: [v for v in each if math.isfinite(v)] for label, each in values.items()}
    return {label: each for label, each in finite.items() if each}


def front(points: Mapping[str, tuple[float, float]], *, right: bool, up: bool) -> list[str]:
    """The Pareto front: those that no other one beats in one thing without being beaten by it in the other.

    Args:
        points: (x, y) by label.
        right, up: whether more of x and of y is better.

    Returns:
        their labels, by x from left to right.
    """
    gains = {
        label: (x if right else -x, y if up else -y) for label, (x, y) in sorted(points.items())
    }
    beaten = {
        a
        for a, (ax, ay) in gains.items()
        for bx, by in gains.values()
        if bx >= ax and by >= ay and (bx, by) != (ax, ay)
    }
    return sorted(gains.keys() - beaten, key=lambda label: points[label])


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None

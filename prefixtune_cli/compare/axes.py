"""The axes of the pictures, each with a metric of every contestant, and the Pareto front."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixtune_cli.compare.comparison import TEST, Comparison
from prefixtune_cli.compare.metrics import Metric
from prefixtune_cli.compare.standing import standings_on
from prefixtune_cli.compare.wording import data_name


@dataclass(frozen=True)
class Axis:
    """A metric of each contestant, in its unit.

    Attributes:
        name: the metric's, with the unit.
        values: contestant → one value for each seed; contestants without any are absent.
        base: the base's value; None where it has none.
    """

    metric: Metric
    name: str
    values: Mapping[str, Sequence[float]]
    base: float | None = None

    def said(self, label: str) -> str:
        """A contestant's mean, with the standard deviation where there are several values."""
        values = self.values[label]
        return self._said(statistics.mean(values), spread(values))

    @property
    def said_of_base(self) -> list[str]:
        return [] if self.base is None else [f"base {self._said(self.base)}"]

    def _said(self, value: float, deviation: float | None = None) -> str:
        return f"{self.metric.written(value, deviation)} {self.metric.unit}".rstrip()


def quality(comparison: Comparison, data: str = TEST) -> Axis:
    """The contestants' figures by the data set's first metric."""
    found = standings_on(comparison, data)
    metric = found.metric
    values = {
        c.label: [v for r in c.results(data) if math.isfinite(v := metric.in_unit(metric.value(r)))]
        for c in comparison.contestants
    }
    where = data_name(data).removeprefix("the ")
    known = {label: each for label, each in values.items() if each}
    base = None if found.base is None else metric.in_unit(found.base)
    return Axis(metric, f"{where}: {metric.axis}", known, base)


def cost(comparison: Comparison, metric: Metric) -> Axis:
    """A cost, or its median where it was measured several times."""
    values = {c.label: metric.median(c) for c in comparison.contestants}
    known = {label: [metric.in_unit(value)] for label, value in values.items() if value}
    return Axis(metric, metric.axis, known)


def front(points: Mapping[str, tuple[float, float]], *, right: bool, up: bool) -> list[str]:
    """The Pareto front: the points for which no other point is better in x or y without being worse in the other.

    Args:
        points: label → (x, y).
        right, up: whether more of x and of y is better.

    Returns:
        the labels on the front, from left to right.
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
    return sorted(
        (label for label in gains if label not in beaten), key=lambda label: points[label]
    )


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None

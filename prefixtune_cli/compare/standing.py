"""Who is better, and whether by more than noise, over seeds and rows; evaluate/paired.py has the intervals of one run.

Every contestant is compared with the first one, row by row. If both were trained with the same S seeds and judged on
the same I rows, then the differences d[s, i] form a crossed design: seeds and rows are both drawn at random (Clark
1973, The Language-as-Fixed-Effect Fallacy; Baayen, Davidson & Bates 2008). Let v_s be the variance of the seeds' means,
v_i that of the rows' means, and v_r that of the residuals. The variance of the mean difference is

    v_s / S + v_i / I - v_r / (S I),

but at least v_s / S and at least v_i / I: it takes such a value where the estimated variance of the other effect would
be negative. The degrees of freedom are Satterthwaite's (1946), and the test is Student's t. With one seed the test is
over rows alone, with one row over seeds alone, and the table says so. The p values of a data set are adjusted for their
number (Holm 1979).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.compare.comparison import (
    FORGETTING,
    OOD,
    TEST,
    Comparison,
    Contestant,
    Result,
)
from prefixtune_cli.compare.metrics import (
    EXACT_MATCH,
    FORGOTTEN,
    LOSS,
    LOSS_ON_TEXT,
    OF_LABELLED,
    OF_PAIRS,
    Metric,
)
from prefixtune_cli.recipe.schema import OWN_SETTINGS

Floats = NDArray[np.float64]

LEVEL = 0.05  # of a test; intervals hold 1 - LEVEL
DIGITS = 3  # after the point: a tenth of a per cent, or a thousandth of a nat, is shown


@dataclass(frozen=True)
class Difference:
    """A contestant's figure less the first one's.

    Attributes:
        value: the mean difference over the seeds that both have.
        low, high: its 95 % interval, without an adjustment; None where nothing could be tested.
        p_value: of no difference, adjusted for the number of contestants (Holm); None where nothing could be tested.
        degrees_of_freedom: of Student's t; None where nothing varied, so that a sign test was made instead.
        seeds, rows: how many of each the test is over; over one there is no test.
    """

    value: float
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    degrees_of_freedom: float | None = None
    seeds: int = 1
    rows: int = 1

    @property
    def larger_than_noise(self) -> bool:
        return self.p_value is not None and self.p_value < LEVEL


@dataclass(frozen=True)
class Standing:
    """One contestant on one data set.

    Attributes:
        contestant: its label.
        mean: over its seeds; None where none finished.
        deviation: the standard deviation over its seeds (divided by n - 1); None with one seed.
        seeds: how many of its seeds have a result.
        failed: how many of its cells failed.
        best: no other mean is better, with the digits that are shown.
        difference: from the first contestant; None for the first one itself, and where they have no seed in common.
    """

    contestant: str
    mean: float | None
    deviation: float | None
    seeds: int
    failed: int
    best: bool = False
    difference: Difference | None = None


@dataclass(frozen=True)
class Standings:
    """All contestants on one data set, in their order.

    Attributes:
        data: TEST, OOD, FORGETTING or another name.
        metric: FORGOTTEN is the loss less the base's, on text that has nothing to do with the task.
        base: the base's figure; None where it was not judged.
        each: one for each contestant.
        untested: why no difference was tested; None where some were.
    """

    data: str
    metric: Metric
    base: float | None
    each: Sequence[Standing]
    untested: str | None = None

    @property
    def base_beside(self) -> float | None:
        """The base's figure where it can stand beside the contestants'; forgetting is counted from it."""
        return None if self.metric is FORGOTTEN else self.base

    @property
    def tested(self) -> list[Difference]:
        """The differences that have a p value."""
        return [
            s.difference for s in self.each if s.difference and s.difference.p_value is not None
        ]

    @property
    def seeds_tested(self) -> bool:
        """Whether every test is over several seeds, and so says something of other seeds."""
        return bool(self.tested) and all(d.seeds > 1 for d in self.tested)

    @property
    def rows_tested(self) -> bool:
        """Whether every test is over several rows, and so says something of other rows."""
        return bool(self.tested) and all(d.rows > 1 for d in self.tested)


def is_level(one: float | None, other: float | None) -> bool:
    """Whether there are two figures, and they are equal in the digits that are shown."""
    return one is not None and other is not None and round(abs(one - other), DIGITS) == 0


def standings(comparison: Comparison) -> list[Standings]:
    """Every data set on which some contestant has a result: TEST first, OOD and FORGETTING last.

    A comparison of costs alone has none.
    """
    if comparison.kind == "speed":
        return []
    found = dict.fromkeys(
        name for c in comparison.contestants for cell in c.cells for name in cell.results
    )
    others = [name for name in found if name not in (TEST, OOD, FORGETTING)]
    order = [name for name in (TEST, *others, OOD, FORGETTING) if name in found]
    return [standings for name in order for standings in _of_data(comparison, name)]


def standings_on(comparison: Comparison, data: str) -> Standings:
    """How the contestants stand on one data set, by its first metric."""
    return _of_data(comparison, data)[0]


def _of_data(comparison: Comparison, data: str) -> list[Standings]:
    """One for each metric of the data set; the p values are adjusted for the number of all differences on it."""
    found = [_standings(comparison, data, metric) for metric in _compared_by(comparison, data)]
    adjusted = iter(_holm_adjusted([s.difference for one in found for s in one.each]))
    return [
        replace(one, each=[replace(s, difference=next(adjusted)) for s in one.each])
        for one in found
    ]


def _standings(comparison: Comparison, data: str, metric: Metric) -> Standings:
    contestants = comparison.contestants
    base = comparison.base.get(data)
    origin = base.loss if base is not None and metric is FORGOTTEN else 0.0
    untested = _why_untested(comparison, data, metric)
    differences = [
        None if i == 0 else _difference(contestants[0], c, data, metric, tested=not untested)
        for i, c in enumerate(contestants)
    ]
    known = [difference for difference in differences if difference is not None]
    if known and untested is None and all(difference.p_value is None for difference in known):
        untested = "there is one figure of each"
    each = [_standing(c, data, metric, origin) for c in contestants]
    better = max if metric.up else min
    best = better((s.mean for s in each if s.mean is not None), default=None)
    each = [
        replace(s, best=is_level(s.mean, best), difference=difference)
        for s, difference in zip(each, differences, strict=True)
    ]
    return Standings(data, metric, metric.median(base), each, untested)


def _compared_by(comparison: Comparison, data: str) -> list[Metric]:
    """What the contestants are compared by: exact match if every result has it, else the loss; more of preferences."""
    if data == FORGETTING:
        return [FORGOTTEN if FORGETTING in comparison.base else LOSS_ON_TEXT]
    found = [result for c in comparison.contestants for result in c.results(data)]
    if found and (kind := found[0].kind) != "answers" and all(r.kind == kind for r in found):
        shared = comparison.protocol
        loss, ahead, of_better = OF_PAIRS if kind == "pairs" else OF_LABELLED
        needed = {"objective", "beta", *OWN_SETTINGS.get(str(shared.get("objective")), ())}
        by = [loss] if needed <= shared.keys() else []
        by += [ahead] if "objective" in shared else []
        known = [m for m in by if all(m.median(result) is not None for result in found)]
        return [*known, of_better]
    return [EXACT_MATCH if all(r.right is not None for r in found) else LOSS]


def _standing(contestant: Contestant, data: str, metric: Metric, origin: float) -> Standing:
    figures = [metric.value(result) - origin for result in contestant.results(data)]
    return Standing(
        contestant.label,
        mean=statistics.fmean(figures) if figures else None,
        deviation=statistics.stdev(figures) if len(figures) > 1 else None,
        seeds=len(figures),
        failed=len(contestant.failures),
    )


def _why_untested(comparison: Comparison, data: str, metric: Metric) -> str | None:
    """Why rows cannot be paired; None where they can."""
    found = [result for c in comparison.contestants for result in c.results(data)]
    of_loss = metric.key == LOSS.key
    shapes = {tuple(r.tokens) if of_loss else len(r.each(metric.key)) for r in found}
    same = comparison.data.get(data, {}).get("same_rows", True) and len(shapes) < 2
    return None if same else "not every run was judged on the same rows"


def _difference(
    first: Contestant, other: Contestant, data: str, metric: Metric, *, tested: bool
) -> Difference | None:
    """The difference over the seeds that both have; None without any. With `tested` it has a test."""
    ours = {cell.seed: cell.results[data] for cell in first.cells if data in cell.results}
    theirs = {cell.seed: cell.results[data] for cell in other.cells if data in cell.results}
    seeds = [seed for seed in ours if seed in theirs]
    if not seeds:
        return None
    if not tested:
        values = [metric.value(theirs[s]) - metric.value(ours[s]) for s in seeds]
        return Difference(statistics.fmean(values), seeds=len(seeds))
    return crossed_difference(
        np.stack([_rows(theirs[s], metric) - _rows(ours[s], metric) for s in seeds])
    )


def _rows(result: Result, metric: Metric) -> Floats:
    return np.array(result.each(metric.key), dtype=float)


def crossed_difference(found: Floats) -> Difference:
    """The mean of paired differences, tested over seeds and rows.

    Args:
        found: [seeds, rows], a contestant's values less the first one's.

    Returns:
        the difference with its p value, not yet adjusted; a single number has none.
    """
    seeds, rows = found.shape
    mean = float(found.mean())
    if found.size == 1:
        return Difference(mean)
    if np.ptp(found) < 1e-12:
        return _constant(mean, seeds, rows)
    error, freedom = _standard_error(found)
    if error < 1e-12:  # the means of the seeds, or of the rows, are all the same
        return _constant(mean, seeds, rows)
    from scipy.special import stdtr, stdtrit

    p_value = 2 * float(stdtr(freedom, -abs(mean) / error))
    reach = float(stdtrit(freedom, 1 - LEVEL / 2)) * error
    return Difference(mean, mean - reach, mean + reach, p_value, freedom, seeds, rows)


def _standard_error(found: Floats) -> tuple[float, float]:
    """The standard error of the mean of [seeds, rows], and its degrees of freedom."""
    seeds, rows = found.shape
    of_seeds, of_rows = found.mean(axis=1), found.mean(axis=0)
    by_seed = float(of_seeds.var(ddof=1)) / seeds if seeds > 1 else 0.0
    by_row = float(of_rows.var(ddof=1)) / rows if rows > 1 else 0.0
    if seeds == 1 or rows == 1:
        return (by_seed + by_row) ** 0.5, max(seeds, rows) - 1.0
    residuals = found - of_seeds[:, None] - of_rows[None, :] + found.mean()
    free = (seeds - 1) * (rows - 1)
    by_residual = float((residuals**2).sum()) / free / found.size
    both = by_seed + by_row - by_residual
    variance = max(both, by_seed, by_row)
    if variance > both:  # one effect is estimated as zero, so that the other one is the whole error
        return variance**0.5, float((seeds if by_seed > by_row else rows) - 1)
    spread = by_seed**2 / (seeds - 1) + by_row**2 / (rows - 1) + by_residual**2 / free
    return variance**0.5, variance**2 / spread if spread else float(free)


def _constant(mean: float, seeds: int, rows: int) -> Difference:
    """The sign test, over rows or, with a single row, over seeds: nothing varies, so there is no standard error."""
    p_value = 0.5 ** ((rows if rows > 1 else seeds) - 1) if abs(mean) > 1e-12 else 1.0
    return Difference(mean, mean, mean, p_value, None, seeds, rows)


def _holm_adjusted(found: Sequence[Difference | None]) -> list[Difference | None]:
    """The differences with adjusted p values.

    From the smallest p value on, each is multiplied by the number of those that are not smaller, and is not below the
    one before.
    """
    adjusted = list(found)
    tested = [(d.p_value, i, d) for i, d in enumerate(found) if d and d.p_value is not None]
    reached = 0.0
    for done, (p_value, i, difference) in enumerate(sorted(tested, key=lambda one: one[:2])):
        reached = max(reached, min(1.0, p_value * (len(tested) - done)))
        adjusted[i] = replace(difference, p_value=reached)
    return adjusted

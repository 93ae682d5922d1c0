"""How sure a difference is: the paired bootstrap, and McNemar's test for items that are right or wrong.

The bootstrap draws items with replacement, each with both of its values, so that an item's difficulty cancels out
(Efron & Tibshirani 1993, An Introduction to the Bootstrap, ch. 13; Koehn 2004, Statistical Significance Tests for
Machine Translation Evaluation; Miller 2024, arXiv 2411.00640). Every interval is a percentile interval; the same seed
gives the same interval. If all items are alike, the interval has no width; that says nothing about other items.
Several seeds are compared by compare/standing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Transform = Callable[[Floats], Floats]

RESAMPLES = 10_000
PERCENTILES = (2.5, 97.5)
FEW_VALUES = 32  # up to so many distinct values, we draw how often each occurs, not item by item
DRAWS_A_CHUNK = 2**21  # bounds the memory for draws to tens of megabytes


@dataclass(frozen=True)
class Interval:
    """A 95 % percentile bootstrap interval."""

    low: float
    high: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class PairedDifference:
    """A figure of the adapter minus that of the base.

    Attributes:
        value: the difference.
        low, high: its 95 % interval, from the paired bootstrap.
        p_value: from the exact McNemar test; None if items are not simply right or wrong.
    """

    value: float
    low: float
    high: float
    p_value: float | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def mean_interval(
    strata: Sequence[Floats], *, weights: Sequence[float] | None = None, seed: int = 0
) -> Interval:
    """The interval of a mean over items; the draws stay within each stratum.

    Args:
        strata: the values [n] of each stratum's items; a stratum may be a subject of a benchmark, and is not empty.
        weights: the weight of each stratum's mean, in any unit; None weighs every item alike.
        seed: of the draws.
    """
    return _interval(_resampled_mean(strata, weights, seed))


def mean_difference(
    base: Sequence[Floats],
    adapter: Sequence[Floats],
    *,
    weights: Sequence[float] | None = None,
    seed: int = 0,
) -> PairedDifference:
    """The difference of two means over the same items; see `mean_interval`.

    `p_value` is McNemar's (1947) over all items, if every value is 0 or 1 and all items weigh the same.
    """
    changes = [np.subtract(a, b) for b, a in _pairs(base, adapter)]
    value = sum(w * c.mean() for w, c in zip(_shares(changes, weights), changes, strict=True))
    return _difference(
        float(value),
        _resampled_mean(changes, weights, seed),
        mcnemar(np.concatenate(base), np.concatenate(adapter)) if weights is None else None,
    )


def ratio_interval(
    sums: Floats, counts: Floats, *, transform: Transform | None = None, seed: int = 0
) -> Interval:
    """The interval of Σsums / Σcounts over drawn rows, such as the loss a token.

    Args:
        sums: [n], such as the nats of each row.
        counts: [n], each above 0, such as the tokens of each row.
        transform: acts on each drawn ratio, elementwise; np.exp turns a loss into a perplexity.
        seed: of the draws.
    """
    return _interval(_resampled_ratios([(sums, counts)], transform, seed)[:, 0])


def ratio_difference(
    base_sums: Floats,
    base_counts: Floats,
    adapter_sums: Floats,
    adapter_counts: Floats,
    *,
    transform: Transform | None = None,
    seed: int = 0,
) -> PairedDifference:
    """The difference of two ratios over the same rows; see `ratio_interval`."""
    pairs = [(base_sums, base_counts), (adapter_sums, adapter_counts)]
    whole = np.array([np.sum(s) / np.sum(c) for s, c in pairs], dtype=np.float64)
    base, adapter = whole if transform is None else transform(whole)
    drawn = _resampled_ratios(pairs, transform, seed)
    return _difference(float(adapter - base), drawn[:, 1] - drawn[:, 0])


def aggregate_interval(
    items: Sequence[Any] | NDArray[Any],
    aggregate: Callable[[Any], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> Interval:
    """The interval of any figure of a set of items, such as F1 or BLEU, over drawn items.

    Args:
        items: of any type.
        aggregate: computes the figure from a list of items, or from an array if `items` is one.
        resamples: the number of draws.
        seed: of the draws.
    """
    draws = _draws(len(items), resamples, seed)
    return _interval(np.array([aggregate(_take(items, draw)) for draw in draws]))


def aggregate_difference(
    base_items: Sequence[Any] | NDArray[Any],
    adapter_items: Sequence[Any] | NDArray[Any],
    aggregate: Callable[[Any], float],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference:
    """The difference of any figure; each draw takes the same items for both sides. See `aggregate_interval`."""
    assert len(base_items) == len(adapter_items)
    drawn = [
        aggregate(_take(adapter_items, draw)) - aggregate(_take(base_items, draw))
        for draw in _draws(len(base_items), resamples, seed)
    ]
    return _difference(aggregate(adapter_items) - aggregate(base_items), np.array(drawn))


def mcnemar(base: Floats, adapter: Floats) -> float | None:
    """The p-value of the exact two-sided McNemar test; None if a value is neither 0 nor 1.

    The null hypothesis is that each changed item was equally likely to become right or wrong.
    """
    from scipy.stats import binomtest

    if not all(np.isin(values, (0, 1)).all() for values in (base, adapter)):
        return None
    gained, lost = int(np.sum(adapter > base)), int(np.sum(adapter < base))
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _interval(drawn: Floats) -> Interval:
    low, high = np.percentile(drawn, PERCENTILES)
    return Interval(float(low), float(high))


def _difference(value: float, drawn: Floats, p_value: float | None = None) -> PairedDifference:
    interval = _interval(drawn)
    return PairedDifference(value, interval.low, interval.high, p_value)


def _pairs(base: Sequence[Floats], adapter: Sequence[Floats]) -> list[tuple[Floats, Floats]]:
    pairs = list(zip(base, adapter, strict=True))
    assert all(np.shape(b) == np.shape(a) for b, a in pairs)
    return pairs


def _shares(strata: Sequence[Floats], weights: Sequence[float] | None) -> Floats:
    """The weight of each stratum's mean; they sum to 1."""
    assert strata and all(len(values) for values in strata)
    found = np.array(
        [len(values) for values in strata] if weights is None else weights, dtype=float
    )
    assert len(found) == len(strata) and found.sum() > 0
    shares: Floats = found / found.sum()
    return shares


def _resampled_mean(strata: Sequence[Floats], weights: Sequence[float] | None, seed: int) -> Floats:
    rng = np.random.default_rng(seed)
    drawn = np.zeros(RESAMPLES)
    for share, values in zip(_shares(strata, weights), strata, strict=True):
        column = np.asarray(values, dtype=np.float64)[:, None]
        drawn += share / len(values) * _resampled_sums(column, rng)[:, 0]
    return drawn


def _resampled_ratios(
    pairs: Sequence[tuple[Floats, Floats]], transform: Transform | None, seed: int
) -> Floats:
    """[RESAMPLES, pairs]: the ratio of each pair of sums and counts; each draw takes the same rows for all pairs."""
    columns = np.column_stack([np.asarray(c, dtype=np.float64) for pair in pairs for c in pair])
    assert len(columns) and (columns[:, 1::2] > 0).all()
    sums = _resampled_sums(columns, np.random.default_rng(seed))
    ratios: Floats = sums[:, 0::2] / sums[:, 1::2]
    return ratios if transform is None else transform(ratios)


def _resampled_sums(columns: Floats, rng: np.random.Generator) -> Floats:
    """The sums of the columns over n rows drawn with replacement: [n, k] to [RESAMPLES, k].

    The counts of the distinct rows in a draw are multinomial. If distinct rows are few, we draw these counts.
    """
    n = len(columns)
    distinct, times = np.unique(columns, axis=0, return_counts=True)
    if len(distinct) <= FEW_VALUES:
        counts = rng.multinomial(n, times / n, size=RESAMPLES)
        return np.asarray(counts @ distinct, dtype=np.float64)
    chunk = max(1, DRAWS_A_CHUNK // n)
    sums = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        draws = rng.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(draws.ravel(), minlength=size * n).reshape(size, n)
        sums.append(counts @ columns)
    return np.concatenate(sums)


def _draws(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.int64]]:
    assert n and resamples
    rng = np.random.default_rng(seed)
    return (rng.integers(n, size=n) for _ in range(resamples))


def _take(items: Sequence[Any] | NDArray[Any], draw: NDArray[np.int64]) -> Any:
    return items[draw] if isinstance(items, np.ndarray) else [items[i] for i in draw]

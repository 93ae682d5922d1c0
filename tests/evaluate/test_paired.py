"""The bootstrap against scipy's, against values computed by hand, and by its coverage."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prefixtune_cli.evaluate.paired import (
    FEW_VALUES,
    Interval,
    PairedDifference,
    aggregate_difference,
    aggregate_interval,
    mcnemar,
    mean_difference,
    mean_interval,
    ratio_difference,
    ratio_interval,
)

# The 2.5 % point of 10,000 draws lies within 0.03 standard deviations of the true one; both sides are random.
MONTE_CARLO = 0.12


def close(found: Interval | PairedDifference, other: Any, tolerance: float = MONTE_CARLO) -> bool:
    """Whether an interval equals that of scipy's result, within Monte Carlo error."""
    low, high = other.confidence_interval
    far = max(abs(found.low - low), abs(found.high - high))
    return bool(far < tolerance * other.standard_error)


def scipy_bootstrap(statistic: Callable[..., Any], *columns: Any, resamples: int = 10_000) -> Any:
    return stats.bootstrap(
        columns,
        statistic,
        paired=True,
        method="percentile",
        n_resamples=resamples,
        rng=np.random.default_rng(5),
    )


def answers(items: int, seed: int) -> tuple[Any, Any]:
    """Two correlated right-or-wrong values: an easy item is easy for both."""
    rng = np.random.default_rng(seed)
    easy = rng.random(items)
    return tuple(np.float64(rng.random(items) < easy + gain) for gain in (0.0, 0.1))


@pytest.mark.parametrize("items", [FEW_VALUES - 2, 3 * FEW_VALUES])
def test_the_interval_of_a_difference_of_means_is_that_of_scipy(items: int) -> None:
    """In both ways: counting few distinct values, and drawing item by item."""
    rng = np.random.default_rng(1)
    base = rng.gamma(2, size=items)
    adapter = base + rng.gamma(1, size=items)
    found = mean_difference([base], [adapter])
    expected = scipy_bootstrap(lambda b, a, axis: (a - b).mean(axis), base, adapter)
    assert found.value == pytest.approx((adapter - base).mean())
    assert close(found, expected)
    assert not close(PairedDifference(0, found.low * 1.1, found.high), expected)
    one_sided = scipy_bootstrap(lambda x, axis: x.mean(axis), adapter)
    assert close(mean_interval([adapter]), one_sided)


def test_the_interval_of_a_difference_of_accuracies_is_that_of_scipy() -> None:
    base, adapter = answers(150, seed=2)
    expected = scipy_bootstrap(lambda b, a, axis: (a - b).mean(axis), base, adapter)
    assert close(mean_difference([base], [adapter]), expected, tolerance=0.2)  # steps of 1/150


@pytest.mark.parametrize("rows", [20, 90])
def test_the_interval_of_a_loss_a_token_is_that_of_scipy(rows: int) -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 40, rows)
    base = tokens * rng.gamma(3, size=rows)
    adapter = base * rng.uniform(0.6, 1.0, rows)

    def loss(nats: Any, counts: Any, axis: int) -> Any:
        return nats.sum(axis) / counts.sum(axis)

    def change(b: Any, a: Any, counts: Any, axis: int) -> Any:
        return loss(a, counts, axis) - loss(b, counts, axis)

    found = ratio_difference(base, tokens, adapter, tokens)
    assert found.value == pytest.approx((adapter.sum() - base.sum()) / tokens.sum())
    assert found.p_value is None
    assert close(found, scipy_bootstrap(change, base, adapter, tokens))
    assert close(ratio_interval(base, tokens), scipy_bootstrap(loss, base, tokens))


def test_a_perplexity_is_transformed_on_every_draw() -> None:
    rng = np.random.default_rng(4)
    tokens = rng.integers(1, 9, 80)
    base, adapter = tokens * rng.gamma(2, size=80), tokens * rng.gamma(1, size=80)
    loss, perplexity = (ratio_interval(base, tokens, transform=how) for how in (None, np.exp))
    assert np.log([perplexity.low, perplexity.high]) == pytest.approx([loss.low, loss.high], 1e-3)
    found = ratio_difference(base, tokens, adapter, tokens, transform=np.exp)
    ratios = np.exp([adapter.sum() / tokens.sum(), base.sum() / tokens.sum()])
    assert found.value == pytest.approx(ratios[0] - ratios[1])
    assert found.low < found.value < found.high


def test_any_aggregate_is_drawn_on_both_sides_alike() -> None:
    rng = np.random.default_rng(6)
    base = rng.gamma(2, size=60)
    adapter = base + rng.gamma(1, size=60)

    def middle(values: Any) -> float:
        return float(np.median(values))

    expected = scipy_bootstrap(
        lambda b, a, axis: np.median(a, axis) - np.median(b, axis), base, adapter
    )
    found = aggregate_difference(list(base), list(adapter), middle, resamples=4000)
    assert close(found, expected, tolerance=0.3)
    assert found == aggregate_difference(base, adapter, middle, resamples=4000)
    shifted = aggregate_difference(list(base), list(base + 7), middle)
    assert [shifted.value, shifted.low, shifted.high] == pytest.approx([7, 7, 7])
    alone = scipy_bootstrap(lambda x, axis: np.median(x, axis), base)
    assert close(aggregate_interval(list(base), middle, resamples=4000), alone, tolerance=0.3)


def test_items_of_an_aggregate_may_be_anything() -> None:
    items = [{"text": "a b"}, {"text": "c"}, {"text": "d e f"}]
    found = aggregate_interval(items, lambda some: sum(len(i["text"]) for i in some) / len(some))
    assert 1 <= found.low <= 3 <= found.high <= 5


def test_nineteen_of_twenty_intervals_hold_the_true_difference_of_accuracies() -> None:
    # An item's chance of being right is its ease, from 0 to 1; after training it is 0.1 higher, but at most 1.
    truth = 0.1 - 0.1**2 / 2
    hits = 0
    for seed in range(200):
        base, adapter = answers(150, seed)
        found = mean_difference([base], [adapter])
        hits += found.low <= truth <= found.high
    assert 180 <= hits <= 198


def test_nineteen_of_twenty_intervals_hold_the_true_difference_of_losses() -> None:
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        tokens = rng.integers(1, 20, 80)
        base = tokens * rng.gamma(4, 0.5, 80)
        adapter = base - 0.3 * tokens + rng.normal(0, 0.4, 80) * tokens
        found = ratio_difference(base, tokens, adapter, tokens)
        hits += found.low <= -0.3 <= found.high
    assert 180 <= hits <= 198


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        (8, 2, 2 * (1 + 10 + 45) / 2**10),
        (2, 8, 2 * (1 + 10 + 45) / 2**10),
        (5, 0, 2 / 2**5),
        (3, 3, 1.0),
        (1, 0, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_is_the_binomial_tail_of_the_items_that_changed(
    gained: int, lost: int, p_value: float
) -> None:
    base = np.array([0.0] * gained + [1.0] * lost + [1.0, 0.0] * 4)
    adapter = np.array([1.0] * gained + [0.0] * lost + [1.0, 0.0] * 4)
    assert mcnemar(base, adapter) == pytest.approx(p_value)
    halves = ([base[:3], base[3:]], [adapter[:3], adapter[3:]])
    assert mean_difference(*halves).p_value == pytest.approx(p_value)
    assert (
        mean_difference(*halves, weights=[5, 1]).p_value is None
    )  # its items do not weigh the same


def test_there_is_no_mcnemar_for_what_is_not_right_or_wrong() -> None:
    assert mean_difference([np.array([0.0, 1.0])], [np.array([0.5, 1.0])]).p_value is None


def test_pairing_narrows_the_interval_of_correlated_answers() -> None:
    rng = np.random.default_rng(8)
    base = np.float64(rng.random(300) < 0.6)
    changed = rng.random(300) < 0.05
    adapter = np.where(changed, 1 - base, base)
    paired = mean_difference([base], [adapter])
    shuffled = mean_difference([base], [rng.permutation(adapter)])
    assert shuffled.value == pytest.approx(paired.value)
    assert paired.high - paired.low < 0.5 * (shuffled.high - shuffled.low)


def test_without_weights_every_item_counts_alike() -> None:
    rng = np.random.default_rng(9)
    base = [rng.random(n) for n in (3, 50, 7)]
    adapter = [rng.random(n) for n in (3, 50, 7)]
    found = mean_difference(base, adapter)
    assert found.value == pytest.approx((np.concatenate(adapter) - np.concatenate(base)).mean())


def test_weights_are_those_of_the_strata_means() -> None:
    base = [np.zeros(2), np.zeros(6)]
    adapter = [np.array([1.0, 0.0]), np.array([0.0] * 5 + [1.0])]
    found = mean_difference(base, adapter, weights=[3, 1])
    assert found.value == pytest.approx(0.75 * 1 / 2 + 0.25 * 1 / 6)
    assert found.low < found.value < found.high
    assert mean_difference(base, adapter, weights=[6, 2]) == found


def test_items_are_drawn_within_their_strata() -> None:
    """So the spread between subjects, which are the same in every draw, does not widen the interval."""
    alike = [np.full(10, 0.0), np.full(30, 1.0)]
    found = mean_interval(alike)
    assert [found.low, found.high] == pytest.approx([0.75, 0.75])
    together = mean_interval([np.concatenate(alike)])
    assert together.high - together.low > 0.2


def test_a_benchmark_of_many_subjects_agrees_with_the_normal_approximation() -> None:
    rng = np.random.default_rng(10)
    strata = [np.float64(rng.random(n) < 0.5) for n in rng.integers(100, 400, 57)]
    found = mean_interval(strata, weights=[1] * 57)
    error = np.sqrt(sum(s.var() / len(s) for s in strata)) / 57
    centre = np.mean([s.mean() for s in strata])
    expected = [centre - 1.96 * error, centre + 1.96 * error]
    assert [found.low, found.high] == pytest.approx(expected, abs=0.1 * error)


@pytest.mark.parametrize("values", [[1.0], [0.3], [0.0] * 5, [1.0] * 400])
def test_items_that_are_all_alike_give_an_interval_without_width(values: list[float]) -> None:
    some = np.array(values)
    one = Interval(*[pytest.approx(values[0])] * 2)
    assert mean_interval([some]) == one
    assert ratio_interval(some, np.ones(len(some))) == one
    assert aggregate_interval(values, lambda drawn: float(np.mean(drawn))) == one
    found = mean_difference([some], [some])
    assert (found.value, found.low, found.high) == (0, 0, 0)
    assert (found.p_value == 1.0) is (values[0] in (0, 1))
    ones = np.ones(len(some))
    assert ratio_difference(some, ones, some, ones) == PairedDifference(0, 0, 0)


def test_the_same_seed_gives_the_same_interval() -> None:
    base, adapter = np.random.default_rng(11).random((2, 100))
    first = mean_difference([base], [adapter], seed=1)
    assert mean_difference([base], [adapter], seed=1) == first
    assert mean_difference([base], [adapter], seed=2) != first


def test_sides_of_different_items_are_refused() -> None:
    with pytest.raises(AssertionError):
        mean_difference([np.zeros(3)], [np.zeros(1)])
    with pytest.raises(ValueError, match="zip"):
        mean_difference([np.zeros(3)], [np.zeros(3), np.zeros(3)])
    with pytest.raises(AssertionError):
        aggregate_difference([1, 2], [1], lambda some: 0.0)

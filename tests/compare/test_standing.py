"""The statistics: against a case computed by hand, against scipy on one seed, and on simulated data."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from prefixtune_cli.compare.comparison import (
    FORGETTING,
    OOD,
    TEST,
    Cell,
    Comparison,
    Contestant,
    Result,
)
from prefixtune_cli.compare.metrics import EXACT_MATCH, FORGOTTEN, LOSS
from prefixtune_cli.compare.standing import (
    Difference,
    crossed_difference,
    standings,
    standings_on,
)
from tests.compare.made import SEEDS, comparison


def of(label: str, results: dict[int, Result], **changes: Any) -> Contestant:
    """A contestant with one result a seed."""
    cells = [Cell(seed, f"{label}-{seed}", results={TEST: r}) for seed, r in results.items()]
    made = Contestant(label, label, {}, 1e-3, 100, 400, cells)
    return replace(made, **changes)


def answers(*right: int) -> Result:
    return Result([1.0] * len(right), [1] * len(right), [bool(r) for r in right])


def among(*contestants: Contestant) -> Comparison:
    return comparison(contestants=contestants, base={})


def test_two_seeds_by_three_rows_are_as_worked_out_by_hand() -> None:
    """Seed means 2 and 5, row means 2, 3 and 5.5, squared residuals 3 with 2 degrees of freedom."""
    found = crossed_difference(np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 8.0]]))
    variance = 4.5 / 2 + 3.25 / 3 - 1.5 / 6
    assert found.value == 3.5
    assert found.degrees_of_freedom == pytest.approx(
        variance**2 / (2.25**2 / 1 + (3.25 / 3) ** 2 / 2 + 0.25**2 / 2)
    )
    student = stats.t(1.6735939)
    assert found.p_value == pytest.approx(2 * student.sf(3.5 / variance**0.5), rel=1e-6)
    reach = student.ppf(0.975) * variance**0.5
    assert (found.low, found.high) == pytest.approx((3.5 - reach, 3.5 + reach), rel=1e-6)
    assert (found.seeds, found.rows) == (2, 3)


def test_an_effect_that_is_estimated_as_none_does_not_shrink_the_error() -> None:
    """Seeds with the same mean: only the error of the rows' means remains."""
    found = crossed_difference(np.array([[1.0, 2.0, 6.0], [2.0, 3.0, 4.0]]))
    rows = np.array([1.5, 2.5, 5.0])
    expected = stats.ttest_1samp(rows, 0)
    assert found.p_value == pytest.approx(expected.pvalue)
    assert found.degrees_of_freedom == 2


@pytest.mark.parametrize("shape", [(1, 12), (12, 1)])
def test_one_seed_or_one_row_is_the_paired_t_test(shape: tuple[int, int]) -> None:
    values = np.random.default_rng(0).normal(0.4, 1, 12)
    found = crossed_difference(values.reshape(shape))
    expected = stats.ttest_1samp(values, 0)
    interval = expected.confidence_interval()
    assert found.p_value == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(("of_seeds", "of_rows"), [(0.0, 1.0), (0.2, 1.0), (0.5, 0.3)])
def test_where_nothing_differs_one_test_in_twenty_says_so(
    seeds: int, of_seeds: float, of_rows: float
) -> None:
    drawn = np.random.default_rng(seeds)
    times = 1000
    found = sum(
        crossed_difference(simulated(drawn, seeds, of_seeds, of_rows, 0.0)).larger_than_noise
        for _ in range(times)
    )
    assert 0.02 <= found / times <= 0.08


def test_rows_alone_would_take_the_noise_of_seeds_for_a_difference() -> None:
    """Why the test is crossed: one seed, tested over rows, against five seeds."""
    drawn = np.random.default_rng(0)
    made = [simulated(drawn, 5, 0.5, 0.3, 0.0) for _ in range(500)]
    of_one_seed = sum(crossed_difference(d[:1]).larger_than_noise for d in made)
    of_all = sum(crossed_difference(d).larger_than_noise for d in made)
    assert of_one_seed / 500 > 0.4
    assert of_all / 500 < 0.08


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_real_difference_is_found(seeds: int) -> None:
    drawn = np.random.default_rng(1)
    made = [simulated(drawn, seeds, 0.1, 1.0, 0.8) for _ in range(300)]
    assert sum(crossed_difference(d).larger_than_noise for d in made) / 300 > 0.9


def simulated(
    drawn: np.random.Generator, seeds: int, of_seeds: float, of_rows: float, true: float
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Differences on 60 rows with both random effects, and residuals of variance 1."""
    effects = drawn.normal(0, of_seeds, (seeds, 1)) + drawn.normal(0, of_rows, (1, 60))
    return true + effects + drawn.normal(0, 1, (seeds, 60))


def test_all_right_against_all_wrong_on_two_rows_is_no_proof() -> None:
    """If nothing varies, there is no standard error, and the sign test over rows decides."""
    assert crossed_difference(np.ones((3, 2))).p_value == 0.5
    assert not crossed_difference(np.ones((3, 2))).larger_than_noise
    assert crossed_difference(np.ones((3, 20))).larger_than_noise
    assert crossed_difference(np.zeros((3, 20))).p_value == 1.0


def test_a_single_figure_of_each_is_a_difference_without_a_test() -> None:
    assert crossed_difference(np.array([[0.25]])) == Difference(0.25)
    found = standings_on(
        among(of("a", {0: Result([2.0], [1])}), of("b", {0: Result([1.5], [1])})), TEST
    )
    assert found.each[1].difference == Difference(-0.5)
    assert found.untested == "there is one figure of each"
    assert not found.seeds_tested
    assert not found.rows_tested


def test_means_deviations_and_the_best() -> None:
    found = standings_on(
        among(
            of("a", {0: answers(1, 0, 0, 0), 1: answers(1, 1, 0, 0)}),
            of("b", {0: answers(1, 1, 1, 0), 1: answers(1, 1, 1, 0)}),
        ),
        TEST,
    )
    assert found.metric is EXACT_MATCH
    assert found.metric.up
    assert [s.mean for s in found.each] == [0.375, 0.75]
    assert found.each[0].deviation == pytest.approx(0.125 * 2**0.5)
    assert found.each[1].deviation == 0
    assert [s.best for s in found.each] == [False, True]
    assert found.each[0].difference is None
    assert found.each[1].difference is not None
    assert found.each[1].difference.value == pytest.approx(0.375)


def test_one_seed_has_no_deviation_and_is_tested_over_rows_alone() -> None:
    found = standings_on(
        among(of("a", {0: answers(1, 0, 0, 1)}), of("b", {0: answers(1, 1, 1, 0)})), TEST
    )
    assert [s.deviation for s in found.each] == [None, None]
    assert not found.seeds_tested
    assert found.rows_tested


def test_by_loss_less_is_better_and_a_row_counts_by_its_tokens() -> None:
    """Losses of 12/6 and 9/6 nats a token; the mean of the rows' differences equals the difference of the losses."""
    found = standings_on(
        among(of("a", {0: Result([8.0, 4.0], [4, 2])}), of("b", {0: Result([6.0, 3.0], [4, 2])})),
        TEST,
    )
    assert found.metric is LOSS
    assert not found.metric.up
    assert [s.mean for s in found.each] == [2.0, 1.5]
    assert [s.best for s in found.each] == [False, True]
    assert found.each[1].difference is not None
    assert found.each[1].difference.value == pytest.approx(-0.5)


def test_losses_without_their_rows_are_tested_over_seeds_alone() -> None:
    losses = {0: 2.0, 1: 2.1, 2: 2.3}
    found = standings_on(
        among(
            of("a", {seed: Result([loss], [1]) for seed, loss in losses.items()}),
            of("b", {seed: Result([loss - 0.1 * seed], [1]) for seed, loss in losses.items()}),
        ),
        TEST,
    )
    assert found.seeds_tested
    assert not found.rows_tested
    assert found.each[1].difference is not None
    expected = stats.ttest_1samp([0.0, -0.1, -0.2], 0).pvalue
    assert found.each[1].difference.p_value == pytest.approx(expected)


def test_answers_that_some_lack_leave_the_loss() -> None:
    found = standings_on(
        among(of("a", {0: answers(1, 1)}), of("b", {0: Result([1.0, 2.0], [1, 1])})), TEST
    )
    assert found.metric is LOSS


def test_a_failed_cell_leaves_its_seed_out_of_the_pairs() -> None:
    found = standings_on(comparison(failed=True), TEST)
    loser = found.each[2]
    assert (loser.contestant, loser.seeds, loser.failed) == ("prefix-tuning", 2, 1)
    assert loser.difference is not None
    assert loser.difference.seeds == 2
    assert [s.difference.seeds for s in found.each if s.difference] == [3, 2, 3]


def test_so_does_a_failed_cell_of_the_first_contestant() -> None:
    first, second, *_ = comparison().contestants
    cells = [replace(first.cells[0], results={}, failure="out of memory"), *first.cells[1:]]
    difference = standings_on(among(replace(first, cells=cells), second), TEST).each[1].difference
    assert difference is not None
    assert difference.seeds == 2


def test_where_every_cell_failed_there_is_no_figure() -> None:
    failed = [Cell(seed, "x", failure="out of memory") for seed in SEEDS]
    first, second, *_ = comparison().contestants
    found = standings_on(among(first, replace(second, cells=failed)), TEST)
    assert found.each[1].mean is None
    assert found.each[1].difference is None
    assert not found.each[1].best


def test_the_p_values_are_adjusted_by_holm() -> None:
    rng = np.random.default_rng(3)

    def drawn(label: str, share: float) -> Contestant:
        return of(label, {s: answers(*(rng.random(30) < share).astype(int)) for s in SEEDS})

    first, *others = [drawn("a", 0.4), drawn("b", 0.5), drawn("c", 0.62), drawn("d", 0.7)]
    alone: dict[str, float] = {}
    for other in others:
        difference = standings_on(among(first, other), TEST).each[1].difference
        assert difference is not None
        assert difference.p_value is not None
        alone[other.label] = difference.p_value
    expected, reached = {}, 0.0
    for left, label in zip((3, 2, 1), sorted(alone, key=alone.__getitem__), strict=True):
        reached = max(reached, min(1.0, left * alone[label]))
        expected[label] = reached
    together = standings_on(among(first, *others), TEST)
    assert {s.contestant: s.difference.p_value for s in together.each if s.difference} == expected
    assert len({*expected.values()} - {1.0}) > 1


def test_rows_that_are_not_the_same_are_not_tested() -> None:
    a, b = of("a", {0: answers(1, 0, 1)}), of("b", {0: answers(1, 1)})
    found = standings_on(among(a, b), TEST)
    assert found.untested == "not every run was judged on the same rows"
    assert found.each[1].difference == Difference(1 - 2 / 3)
    declared = comparison(data={TEST: {"source": "x", "rows": 40, "same_rows": False}})
    assert standings_on(declared, TEST).untested is not None
    assert standings_on(comparison(), TEST).untested is None


def test_forgetting_is_the_increase_over_the_base() -> None:
    made = comparison()
    found = standings_on(made, FORGETTING)
    base = made.base[FORGETTING].loss
    losses = [result.loss for result in made.contestants[1].results(FORGETTING)]
    assert found.metric is FORGOTTEN
    assert found.base == base
    assert found.each[1].mean == pytest.approx(sum(losses) / 3 - base)
    assert [s.contestant for s in found.each if s.best] == ["prefix-tuning"]


def test_forgetting_without_a_base_is_the_loss_itself() -> None:
    made = comparison(base={})
    losses = [result.loss for result in made.contestants[1].results(FORGETTING)]
    found = standings_on(made, FORGETTING)
    assert found.base is None
    assert found.each[1].mean == pytest.approx(sum(losses) / 3)


def test_the_test_data_stands_first_and_forgetting_last() -> None:
    assert [found.data for found in standings(comparison())] == [TEST, OOD, FORGETTING]
    assert standings(comparison(contestants=[])) == []

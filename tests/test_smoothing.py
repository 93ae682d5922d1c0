"""Curves without their noise."""

from prefixtune_cli.smoothing import smoothed


def test_a_value_becomes_the_mean_of_the_neighbours_that_there_are() -> None:
    assert smoothed([0.0, 3.0, 6.0, 9.0], 1) == [1.5, 3.0, 6.0, 7.5]
    assert smoothed([0.0, 3.0, 6.0, 12.0], 2) == [3.0, 5.25, 5.25, 7.0]


def test_without_reach_values_stay_as_they_are() -> None:
    assert smoothed([2.0, 1.0], 0) == [2.0, 1.0]
    assert smoothed([], 3) == []

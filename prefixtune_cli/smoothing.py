"""Curves of losses for pictures: less noise, so that their course is seen."""

from collections.abc import Sequence


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """Each value as the mean of itself and its neighbours, up to `reach` of them on each side."""
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]

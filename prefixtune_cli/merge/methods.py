"""The ways to merge several adapters, and the check of their settings. This file needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prefixtune_cli.errors import UsageError

# Method → the names by which `add_weighted_adapter` of Prefix-Tuning+ and that of LoRA know it.
METHODS = {
    "linear": ("linear", "cat"),
    "task-arithmetic": ("linear", "cat"),
    "ties": ("ties", "ties_svd"),
    "dare": ("dare_linear", "dare_linear_svd"),
}
PRUNING = ("ties", "dare")
DENSITY = 0.2  # what TIES keeps by default (Yadav et al. 2023)


def checked_weights(
    adapters: int, method: str, weights: Sequence[float] | None, density: float | None
) -> list[float]:
    """The weights of the adapters, whose number is `adapters`.

    Raises:
        UsageError: the settings contradict each other, or do not fit the number of adapters.
    """
    if method not in METHODS:
        raise UsageError(f"--method must be one of {', '.join(METHODS)}, got {method!r}.")
    if adapters < 2:
        raise UsageError(
            f"A merge needs two adapters or more, got {adapters}. To fold one into its base: "
            "ptp merge ADAPTER --into-base --out FOLDER"
        )
    if density is not None and method not in PRUNING:
        raise UsageError(f"--density belongs to --method ties and dare; {method} keeps everything.")
    if density is not None and not 0 < density <= 1:
        raise UsageError(f"--density must lie above 0 and up to 1, got {density}.")
    if weights is None:
        each = 1 / adapters if method in ("linear", "dare") else 1.0
        return [each] * adapters
    if len(weights) != adapters:
        raise UsageError(
            f"--weights must name one number for each of the {adapters} adapters, got {len(weights)}."
        )
    if not all(map(math.isfinite, weights)):
        raise UsageError(f"--weights must be finite numbers, got {', '.join(map(str, weights))}.")
    return list(weights)

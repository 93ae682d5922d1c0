"""The costs of methods, measured beside each other: the benchmark of `ptp compare --speed`.

Speed depends on shapes and not on values, so the base may have random weights, and no data is read.
"""

from prefixtune_cli.compare.speed.measure import BASE, Speeds, measure, most_virtual_tokens
from prefixtune_cli.compare.speed.random_base import config_of, random_base
from prefixtune_cli.compare.speed.turn import Shape

__all__ = [
    "BASE",
    "Shape",
    "Speeds",
    "config_of",
    "measure",
    "most_virtual_tokens",
    "random_base",
]

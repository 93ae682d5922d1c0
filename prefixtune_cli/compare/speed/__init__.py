"""The costs of methods, measured beside each other: the benchmark of `ptp compare --speed`.

Speed depends on shapes and not on values, so a base with random weights will do, and no data is read.
"""

from prefixtune_cli.compare.speed.measure import BASE, Speeds, measure
from prefixtune_cli.compare.speed.random_base import config_of, random_base
from prefixtune_cli.compare.speed.turn import Shape

__all__ = ["BASE", "Shape", "Speeds", "config_of", "measure", "random_base"]

"""Training: a recipe goes in, a run directory comes out."""

from prefixtune_cli.train.run import train
from prefixtune_cli.train.summary import Summary

__all__ = ["Summary", "train"]

"""Training: a recipe goes in, a run directory comes out."""

from prefixtune_cli.train.run import Summary, train

__all__ = ["Summary", "train"]

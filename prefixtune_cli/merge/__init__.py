"""Merging: one adapter from several, and an adapter folded into its base."""

from prefixtune_cli.merge.adapters import METHODS, merge
from prefixtune_cli.merge.folder import Merged
from prefixtune_cli.merge.into_base import merge_into_base

__all__ = ["METHODS", "Merged", "merge", "merge_into_base"]

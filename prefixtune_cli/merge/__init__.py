"""Merging: one adapter from several, or one adapter folded into its base."""

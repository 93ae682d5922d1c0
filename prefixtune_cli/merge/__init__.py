"""Merging: one adapter from several, and an adapter folded into its base. Imports nothing by itself."""

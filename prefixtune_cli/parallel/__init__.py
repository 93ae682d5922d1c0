"""Runs of several processes: the device of each, how they start, and how they agree."""

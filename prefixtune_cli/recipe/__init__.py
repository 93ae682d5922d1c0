"""A recipe: every setting of a run, checked before anything is loaded."""

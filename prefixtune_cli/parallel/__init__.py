"""Several processes: which device each has, how they are started, and how they agree."""

"""How good a base and its adapters are: held-out rows, own data, and the benchmarks of lm-eval.

Every figure of an adapter is compared with the base's on the same items. Modules are imported by name: a
training run needs `held_out` alone, and lm-eval is imported where a benchmark is asked for.
"""

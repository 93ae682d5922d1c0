"""How good a base and its adapters are: on held-out rows, on your own data, and on lm-eval's benchmarks.

Each figure of an adapter is compared with the base's figure on the same items. Import the modules by name: a
training run needs only `held_out`, and only a benchmark imports lm-eval.
"""

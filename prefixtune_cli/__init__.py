"""Fine-tune large language models by Prefix-Tuning+ (arXiv 2506.13674): the package behind `ptp`."""

import os

__version__ = "0.1.0"

# TRL and huggingface_hub count their users; a run of ours makes no network call that nobody asked for.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

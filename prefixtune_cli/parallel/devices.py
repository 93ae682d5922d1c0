"""Where this process computes, and how many processes a run has."""

from __future__ import annotations

import os

import torch

from prefixtune_cli.errors import ResourceError


def device(wanted: str = "auto") -> torch.device:
    """This process's own: the GPU of its local rank, or the CPU.

    Args:
        wanted: `auto` takes a GPU where there is one; `cpu`; `cuda`.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def check_device(wanted: str) -> None:
    """Raise ResourceError where a GPU is wanted and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "model.device is cuda, but torch finds no CUDA GPU here (`nvidia-smi` lists them; a CPU build of torch "
            "sees none). Type --device cpu, or leave --device out."
        )

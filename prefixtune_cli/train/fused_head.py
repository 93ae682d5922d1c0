"""Fits TRL's fused head to a CPU: it computes the loss of trained tokens only, in small tiles.

With Triton, TRL projects only the tokens that have a loss onto the vocabulary. Without it, TRL projects all tokens,
because some accelerators compile a kernel for each shape. A CPU does not, and if a question has a short answer, nine
tokens in ten have no loss. Also, without Triton several operations fold a tile, each with a copy in float32. At the
tile width for GPUs, a few tiles are then as large as the logits that they should avoid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils

from prefixtune_cli.plan import CPU_TILE_WORDS


@contextmanager
def fitted_to(place: torch.device) -> Iterator[None]:
    """Within the block, TRL's fused head is fitted to a CPU, if `place` is one."""
    if place.type != "cpu":
        yield
        return
    asked, words = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    # TRL asks `_use_triton` only to choose the tokens that it projects.
    utils._use_triton = lambda device: device.type == "cpu" or asked(device)
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE_WORDS
    try:
        yield
    finally:
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = asked, words

"""TRL's fused head as a CPU wants it: the loss of the trained tokens alone, by tiles that stay small.

TRL projects only the tokens with a loss on the vocabulary where there is Triton, and all of them elsewhere, for the
sake of accelerators that compile a kernel for each shape. A CPU does not, and of a question with a short answer nine
tokens in ten have no loss. Without Triton a tile is folded by several operations, each with a copy in float32, so that
the width which suits a GPU makes a few tiles as large as the logits that they are to avoid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.trainer import utils

from prefixtune_cli.plan import CPU_TILE_WORDS


@contextmanager
def fitted_to(place: torch.device) -> Iterator[None]:
    """Within it TRL's fused head is fitted to a CPU, where the model computes on one."""
    if place.type != "cpu":
        yield
        return
    asked, words = utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    utils._use_triton = lambda device: device.type == "cpu" or asked(device)  # asked for this alone
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE_WORDS
    try:
        yield
    finally:
        utils._use_triton, utils._CHUNKED_LOGPROB_CHUNK_SIZE = asked, words

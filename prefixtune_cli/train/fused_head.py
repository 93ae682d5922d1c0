"""The loss of the trained tokens alone, on a CPU as on a GPU.

TRL's fused head projects only the tokens with a loss on the vocabulary where there is Triton, and all of them
elsewhere, for the sake of accelerators that compile a kernel for each shape. A CPU does not, and of a question with a
short answer nine tokens in ten have no loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trl.trainer import utils


@contextmanager
def trained_tokens_alone() -> Iterator[None]:
    """Within it, TRL's fused head leaves out the tokens without a loss on a CPU, too."""
    original = utils._use_triton  # asked for this alone; the kernel asks a name of its own
    utils._use_triton = lambda device: device.type == "cpu" or original(device)
    try:
        yield
    finally:
        utils._use_triton = original

"""Where a memory stands beside a feed-forward network (FFN): which module that is, and its blocks.

The paper reads M as a memory beside the FFN's own. Here the same equation is read at the FFN: its input x, hidden
wide, is cut into blocks x_b, which take the place of the heads' queries, and M is a block a matrix:

    FFN(x) + concat_b φ(x_b)ᵀ M_b

The FFN is found by what transformers' decoder layers call it; of a mixture of experts it is the whole block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prefixtune_cli.adapter.attention import AttentionShape, UnsupportedModelError
from prefixtune_cli.adapter.memory import Memory

# Side by side in one layer they are parts of one FFN, as are the experts and the shared MLP of some mixtures.
_FEED_FORWARD = re.compile(r"(.+_)?(mlps?|ffn|feed_?forward\d?|moe|experts|mlp_block)")


@dataclass(frozen=True)
class FeedForwardShape:
    """The width of one FFN's input, and that of a query head in the attention of its layer."""

    layer: int
    width: int
    d_query: int

    def block_size(self, asked: int | None) -> int:
        """The width of a block: `asked`, or that of a query head, or the largest divisor of the width below it.

        Raises:
            ValueError: the blocks asked for do not fill the width.
        """
        divisors = [n for n in range(1, self.width + 1) if self.width % n == 0]
        if asked is None:
            return max(n for n in divisors if n <= self.d_query)
        if asked not in divisors:
            below = [str(n) for n in divisors if n < asked][-2:]
            above = [str(n) for n in divisors if n > asked][:2]
            raise ValueError(
                f"block_size must divide the width of the FFN's input, {self.width}, got {asked}. "
                f"Near it are {', '.join(below + above)}."
            )
        return asked


def feed_forward_modules(
    model: nn.Module, attention: Mapping[str, AttentionShape]
) -> dict[str, FeedForwardShape]:
    """The FFN of each decoder layer that has attention, by name, in the order of the model.

    Args:
        model: the base, adapted or not.
        attention: its attention modules by name, as `attention_modules` gives them.

    Raises:
        UnsupportedModelError: a layer has no module that is its FFN, or several; the message names its class.
    """
    return {
        _feed_forward_of(model, name): FeedForwardShape(
            shape.layer, _hidden_size(model, name), shape.d_query
        )
        for name, shape in attention.items()
    }


def _feed_forward_of(model: nn.Module, attention: str) -> str:
    """The name of the FFN beside an attention module, or beside what holds it within its decoder layer."""
    path, layer = attention, model
    while path:
        path = path.rpartition(".")[0]
        parent = model.get_submodule(path)
        if isinstance(parent, nn.ModuleList):
            break
        layer = parent
        found = [name for name, _ in layer.named_children() if _FEED_FORWARD.fullmatch(name)]
        if len(found) == 1:
            return f"{path}.{found[0]}".removeprefix(".")
        if found:
            break
    raise UnsupportedModelError(
        f"{type(layer).__name__} of {type(model).__name__} has no single module that is its feed-forward network, "
        "beside which a memory could stand. Use sites attention, which adapts the attention of this model."
    )


def _hidden_size(model: nn.Module, attention: str) -> int:
    owner: Any = model.get_submodule(attention)
    config: Any = getattr(owner, "config", None) or getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not say the width of its hidden states (config.hidden_size), so its "
            "feed-forward networks cannot be adapted. Use sites attention."
        )
    return width


def add_read_of_blocks(
    output: Any, hidden: Tensor, memory: Memory, others: Sequence[Memory] = ()
) -> Any:
    """Add to an FFN's output what its input's blocks read from a memory.

    Args:
        output: [..., hidden], or of a mixture of experts a tuple with this first.
        hidden: the input, with as many values; each may be [tokens, hidden] or [batch, positions, hidden].
        memory: one M a block.
        others: memories that read alike.

    Returns:
        The output in its own shape and dtype, and whatever comes beside it.
    """
    if isinstance(output, tuple):
        return (add_read_of_blocks(output[0], hidden, memory, others), *output[1:])
    positions = hidden.shape[-2]
    blocks = hidden.reshape(-1, positions, memory.heads, memory.d_query).transpose(1, 2)
    by_block = output.reshape(-1, positions, memory.heads, memory.d_value)
    return memory(blocks, by_block, others).reshape(output.shape)

"""A memory beside a feed-forward network (FFN): which module the FFN is, and the blocks of its input.

The paper sees M as a memory beside the FFN's own. Here the same equation is used at the FFN. Its input x, [hidden], is
cut into blocks x_b, which take the place of the heads' queries, and each block has a matrix M_b:

    FFN(x) + concat_b φ(x_b)ᵀ M_b

The FFN is found by the names that transformers' decoder layers give it. In a mixture of experts it is the whole block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prefixtune_cli.adapter.attention import AttentionShape, UnsupportedModelError
from prefixtune_cli.adapter.memory import Memory

# If a layer has several, they are parts of one FFN, such as the experts and the shared MLP of some mixtures.
_FEED_FORWARD = re.compile(r"(.+_)?(mlps?|ffn|feed_?forward\d?|moe|experts|mlp_block)")


@dataclass(frozen=True)
class FeedForwardShape:
    """The width of one FFN's input, and the width of a query head in the attention of its layer."""

    layer: int
    width: int
    d_query: int

    def block_size(self, asked: int | None) -> int:
        """The width of a block: `asked`, or the largest divisor of the FFN's width up to the width of a query head.

        Raises:
            ValueError: `asked` does not divide the FFN's width.
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
        UnsupportedModelError: a layer has no single module that is its FFN; the message names the layer's class.
    """
    return {
        _feed_forward_of(model, name): FeedForwardShape(
            shape.layer, _hidden_size(model, name), shape.d_query
        )
        for name, shape in attention.items()
    }


def _feed_forward_of(model: nn.Module, attention: str) -> str:
    """The name of the FFN beside an attention module, or beside a module around it within the decoder layer."""
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
        f"{type(layer).__name__} of {type(model).__name__} has no single module that is its feed-forward network, so "
        "there is no place for a memory. Use sites attention, which adapts the attention of this model."
    )


def _hidden_size(model: nn.Module, attention: str) -> int:
    owner: Any = model.get_submodule(attention)
    config: Any = getattr(owner, "config", None) or getattr(model, "config", None)
    width = getattr(config, "hidden_size", None)
    if not isinstance(width, int):
        raise UnsupportedModelError(
            f"{type(model).__name__} does not give the width of its hidden states (config.hidden_size), so its "
            "feed-forward networks cannot be adapted. Use sites attention."
        )
    return width


def add_read_of_blocks(
    output: Any, hidden: Tensor, memory: Memory, others: Sequence[Memory] = ()
) -> Any:
    """Add to an FFN's output what the blocks of its input read from a memory.

    Args:
        output: [..., hidden]; a mixture of experts may return a tuple that begins with it.
        hidden: the input, with as many values. Both may be [tokens, hidden] or [batch, positions, hidden].
        memory: the memory, with one M per block.
        others: memories that one read serves as well, see `Memory.reads_like`.

    Returns:
        The output in its own shape and dtype, with the rest of the tuple if there is one.
    """
    if isinstance(output, tuple):
        return (add_read_of_blocks(output[0], hidden, memory, others), *output[1:])
    positions = hidden.shape[-2]
    blocks = hidden.reshape(-1, positions, memory.heads, memory.d_query).transpose(1, 2)
    by_block = output.reshape(-1, positions, memory.heads, memory.d_value)
    return memory(blocks, by_block, others).reshape(output.shape)

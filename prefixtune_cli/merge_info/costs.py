"""What an adapter costs while it is not folded into the base: for each token, beside the base's own cost.

Legend: H query heads (blocks at the FFN), d_q width of a query, d_φ features, d_v width of a head's output, r rank.
FLOPs count a multiplication and an addition as two, as is usual; attention over the context is left out on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from prefixtune_cli.merge_info.base import Base
from prefixtune_cli.merge_info.saved import LORA, PREFIX_TUNING_PLUS, SavedAdapter
from prefixtune_cli.merge_info.trained import dense_memory, memory_parts, trained


@dataclass(frozen=True)
class Costs:
    """What one token costs in a forward pass; None where it cannot be told for the method, or without the base.

    Attributes:
        flops: that the adapter adds.
        bytes_read: of the adapter's weights, or of its part of the KV cache.
        kv_cache_bytes: that it adds to each sequence.
        kv_cache_tokens: as many tokens of a sequence take these bytes.
        base_flops: 2 × the base's parameters that a token is multiplied with.
        base_bytes_read: these parameters in the precision of the base.
    """

    flops: int | None
    bytes_read: int | None
    kv_cache_bytes: int | None
    kv_cache_tokens: int = 0
    base_flops: int | None = None
    base_bytes_read: int | None = None

    @property
    def flops_percent(self) -> float | None:
        return _percent(self.flops, self.base_flops)

    @property
    def bytes_read_percent(self) -> float | None:
        return _percent(self.bytes_read, self.base_bytes_read)


def costs(adapter: SavedAdapter, base: Base | None) -> Costs:
    """Count what the adapter costs; `base` is None where it is unknown."""
    of_base = (None, None) if base is None else (base.flops_per_token, round(base.bytes_per_token))
    stored = sum(_bytes(tensor) for tensor in adapter.tensors.values())
    if adapter.method == PREFIX_TUNING_PLUS:
        parts = memory_parts(adapter.tensors)
        flops = [
            _memory_flops(memory, _query_heads(place, adapter, base))
            for place, memory in parts.items()
        ]
        total = None if None in flops else sum(count for count in flops if count is not None)
        return Costs(total, stored, 0, 0, *of_base)
    if adapter.config.is_prompt_learning:
        return _virtual_tokens(adapter, base, of_base)
    if adapter.method == LORA:
        products = [matrix for matrix in trained(adapter).values() if matrix.right is not None]
        flops_of = sum(2 * m.left.shape[2] * (m.shape[1] + m.shape[2]) for m in products)
        return Costs(flops_of, stored, 0, 0, *of_base)
    return Costs(None, stored, 0, 0, *of_base)


def _memory_flops(memory: dict[str, Tensor], heads: int | None) -> int | None:
    """H·(2·d_φ·d_v + the map's): 2·d_φ·d_q of a trained map, and one operation a feature of any."""
    found = dense_memory(memory)
    if found is None or heads is None:
        return None
    left, right = found
    d_phi = left.shape[1]
    read = left[0].numel() + (0 if right is None else right[0].numel())
    trained_map = memory["W_phi"][0].numel() if "W_phi" in memory else 0
    return heads * (2 * read + 2 * trained_map + d_phi)


def _query_heads(place: str, adapter: SavedAdapter, base: Base | None) -> int | None:
    """The heads that read M: those of M itself, or where they share it, the base's."""
    found = dense_memory(memory_parts(adapter.tensors)[place])
    if found is None:
        return None
    if base is not None and place in base.attention:
        return base.attention[place].heads
    shared = (
        getattr(adapter.config, "share_heads", "query") == "kv"
        and "att" in place.rpartition(".")[2].lower()
    )
    return None if shared else found[0].shape[0]


def _virtual_tokens(
    adapter: SavedAdapter, base: Base | None, of_base: tuple[int | None, int | None]
) -> Costs:
    """Every token attends to the virtual ones: 2·H·(d_q + d_v) FLOPs for each and layer, and their cache is read."""
    tokens: int = adapter.config.num_virtual_tokens
    if base is None or not base.attention:
        return Costs(None, None, None, tokens, *of_base)
    shapes = base.attention.values()
    flops = sum(2 * tokens * shape.heads * (shape.d_query + shape.d_value) for shape in shapes)
    kv_cache = tokens * base.kv_cache_bytes_per_token
    return Costs(flops, kv_cache, kv_cache, tokens, *of_base)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _percent(part: int | None, whole: int | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None

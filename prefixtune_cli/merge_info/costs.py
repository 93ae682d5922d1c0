"""What an adapter costs for each token, compared with its base, and whether it can be folded into the base instead.

Legend: H query heads (FFN: blocks), d_q width of a query, d_φ features, d_v width of a head's output, r rank.
A multiplication and an addition are two FLOPs, as usual. Attention over the context is left out on both sides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer

from prefixtune_cli.adapter.layer import WHY_NOT_MERGED
from prefixtune_cli.merge_info.base import Base
from prefixtune_cli.merge_info.matrices import ATTENTION, TrainedMatrix, memory_parts, site
from prefixtune_cli.merge_info.saved_adapter import LORA, PREFIX_TUNING_PLUS, SavedAdapter


@dataclass(frozen=True)
class Costs:
    """What one token costs in a forward pass; None where the method or a missing base leaves it unknown.

    Attributes:
        flops: what the adapter adds.
        bytes_read: bytes of the adapter's weights, or of its part of the KV cache.
        kv_cache_bytes: what the adapter adds to the cache of each sequence.
        kv_cache_tokens: how many tokens of a sequence take as many bytes.
        base_flops: `Base.flops_per_token`.
        base_bytes_read: `Base.bytes_per_token`.
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


def costs(adapter: SavedAdapter, matrices: Mapping[str, TrainedMatrix], base: Base | None) -> Costs:
    """Count what the adapter costs.

    Args:
        adapter: an adapter of any method.
        matrices: see `trained_matrices`.
        base: None where it is unknown.
    """
    of_base = (None, None) if base is None else (base.flops_per_token, round(base.bytes_per_token))
    if adapter.config.is_prompt_learning:
        return _virtual_tokens(adapter, base, of_base)
    flops: int | None = None
    if adapter.method == PREFIX_TUNING_PLUS:
        flops = _memory_flops(adapter, matrices, base)
    elif adapter.method == LORA:
        products = [matrix for matrix in matrices.values() if matrix.right is not None]
        flops = sum(2 * m.left.shape[2] * (m.shape[1] + m.shape[2]) for m in products)
    stored = sum(tensor.numel() * tensor.element_size() for tensor in adapter.tensors.values())
    return Costs(flops, stored, 0, 0, *of_base)


def _memory_flops(
    adapter: SavedAdapter, matrices: Mapping[str, TrainedMatrix], base: Base | None
) -> int | None:
    """The sum over modules of H·(2·d_φ·d_v + d_φ), and of another H·2·d_φ·d_q where the map is trained."""
    total = 0
    for place, parts in memory_parts(adapter.tensors).items():
        matrix = matrices.get(place)
        heads = None if matrix is None else _query_heads(place, matrix, adapter, base)
        if matrix is None or heads is None:
            return None
        read = sum(part[0].numel() for part in (matrix.left, matrix.right) if part is not None)
        trained_map = parts["W_phi"][0].numel() if "W_phi" in parts else 0
        total += heads * (2 * read + 2 * trained_map + matrix.shape[1])
    return total


def _query_heads(
    place: str, matrix: TrainedMatrix, adapter: SavedAdapter, base: Base | None
) -> int | None:
    """The number of heads that read M: as many as M has, or the base's where several share one M."""
    if base is not None and place in base.attention:
        return base.attention[place].heads
    shared = getattr(adapter.config, "share_heads", "query") == "kv"
    return None if shared and site(place) == ATTENTION else matrix.shape[0]


def _virtual_tokens(
    adapter: SavedAdapter, base: Base | None, of_base: tuple[int | None, int | None]
) -> Costs:
    """Each token attends to each virtual one, 2·H·(d_q + d_v) FLOPs in every layer, and reads their KV cache."""
    tokens: int = adapter.config.num_virtual_tokens
    if base is None or not base.attention:
        return Costs(None, None, None, tokens, *of_base)
    shapes = base.attention.values()
    flops = sum(2 * tokens * shape.heads * (shape.d_query + shape.d_value) for shape in shapes)
    kv_cache = tokens * base.kv_cache_bytes_per_token
    return Costs(flops, kv_cache, kv_cache, tokens, *of_base)


def _percent(part: int | None, whole: int | None) -> float | None:
    return 100 * part / whole if part is not None and whole else None


@dataclass(frozen=True)
class Folding:
    """Whether the adapter can be folded into the base's weights.

    Attributes:
        possible: None where only the base could tell, and it is unknown.
        reason: one or two lines of text.
        modules: the names of the modules that the adapter is folded into → how many have that name.
        kinds: the classes of these modules → their number; empty where the base is unknown.
    """

    possible: bool | None
    reason: tuple[str, ...]
    modules: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)


def folding(
    adapter: SavedAdapter, matrices: Mapping[str, TrainedMatrix], base: Base | None
) -> Folding:
    """Tell whether the adapter can be folded into its base; the arguments are those of `costs`."""
    if adapter.method == PREFIX_TUNING_PLUS:
        why, _, _ = WHY_NOT_MERGED.partition(". ")
        return Folding(
            False,
            (f"{why}.", "It stays beside the base; adapters of equal φ can be merged into one."),
        )
    if adapter.config.is_prompt_learning:
        return Folding(
            False,
            (
                "Its vectors are tokens of every sequence and lie in the KV cache: no weight of the base gives them.",
            ),
        )
    if base is not None and base.expected is not None:
        return _by_layers(base, adapter.method)
    if adapter.method == LORA:
        names = Counter(place.rpartition(".")[2] for place in matrices)
        return Folding(True, ("W + B·A·scale is a matrix of W's shape.",), dict(names))
    return Folding(
        None, (f"Without its base, it cannot be told whether peft folds {adapter.method}.",)
    )


def _by_layers(base: Base, method: str) -> Folding:
    if not base.layers:
        return Folding(False, (f"peft has no merge for {method}.",))
    fixed = {
        kind.__name__ for kind, _ in base.layers.values() if kind.merge is BaseTunerLayer.merge
    }
    if fixed:
        return Folding(False, (f"peft has no merge for its layers ({', '.join(sorted(fixed))}).",))
    return Folding(
        True,
        ("peft writes it into the modules' own weights.",),
        dict(Counter(name.rpartition(".")[2] for name in base.layers)),
        dict(Counter(kind for _, kind in base.layers.values())),
    )

"""The bias that an adapter adds to the output of attention, or of an FFN, on real queries.

For Prefix-Tuning+ the bias is φ(q)ᵀM. For Prefix-Tuning it is the output of attention with the prefix, less the output
without it, from the same queries, keys and values. Both outputs come from one call, so changes in lower layers do not
count. Biases are computed in float32 from the model's own queries. Only sums are kept: for each layer, the mean and the
covariance of each head's biases in float64, and their squared norms.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from prefixtune_cli.adapter import FeedForwardMemoryLayer, MemoryLayer, attention_modules
from prefixtune_cli.merge_info.matrices import effective_rank

FIRST = (1, 5, 10)  # so many of the largest eigenvalues are reported as a share of all
FIRST_BUCKET = 16  # positions; every next bucket ends four times as far


def bucket(position: int) -> int:
    """The number of the bucket that a position falls into: 0 to 15, 16 to 63, 64 to 255, …"""
    return ((position // FIRST_BUCKET).bit_length() + 1) // 2


def bucket_range(number: int) -> tuple[int, int]:
    """The first and the last position of a bucket."""
    return (0 if number == 0 else FIRST_BUCKET * 4 ** (number - 1)), FIRST_BUCKET * 4**number - 1


@dataclass
class Sums:
    """The biases of one layer at one site, summed up sequence by sequence.

    Attributes:
        site: `attention` or `ffn`.
        count: positions so far.
        total: the sum of the biases, [heads, d].
        outer: the sum of their outer products, [heads, d, d].
        squares: bucket → the squared norms of the biases, and of the outputs that they are added to.
    """

    layer: int
    site: str
    count: int = 0
    total: Tensor | None = None
    outer: Tensor | None = None
    squares: dict[int, list[float]] = field(default_factory=dict)

    def add(self, bias: Tensor, output: Tensor) -> None:
        """Add one sequence.

        Args:
            bias: [positions, heads, d]
            output: what the bias is added to, in the same shape.
        """
        bias, output = bias.double(), output.double()
        total, outer = bias.sum(0), torch.einsum("shd,she->hde", bias, bias)
        self.total = total if self.total is None else self.total + total
        self.outer = outer if self.outer is None else self.outer + outer
        self.count += len(bias)
        lengths = torch.stack([bias.square().sum((1, 2)), output.square().sum((1, 2))])
        last = bucket(len(bias) - 1)
        for number in range(last + 1):
            start, end = bucket_range(number)
            found = self.squares.setdefault(number, [0.0, 0.0])
            for i, value in enumerate(lengths[:, start : end + 1].sum(1).tolist()):
                found[i] += value

    def covariance(self) -> Tensor:
        """The covariance of each head's biases, [heads, d, d] in float64."""
        assert self.total is not None
        assert self.outer is not None
        mean = self.total / self.count
        return self.outer / self.count - mean[:, :, None] * mean[:, None, :]

    def eigenvalues(self) -> list[float]:
        """The eigenvalues of the covariance, the largest first, as shares of their sum, averaged over heads.

        Heads whose bias does not vary are left out; the result is empty where none varies.
        """
        found = torch.linalg.eigvalsh(self.covariance().cpu()).flip(-1).clamp(min=0)
        sums = found.sum(-1, keepdim=True)
        assert self.outer is not None
        # Subtracting the mean leaves rounding errors, which are no variance.
        size = self.outer.diagonal(dim1=-2, dim2=-1).sum(-1).cpu() / self.count
        varies = sums[:, 0] > 1e-12 * size
        if not bool(varies.any()):
            return []
        shares: list[float] = (found[varies] / sums[varies]).mean(0).tolist()
        return shares

    def ratio(self, number: int | None = None) -> float:
        """The root mean square norm of the biases, divided by that of the outputs, in one bucket or in all."""
        chosen = self.squares.values() if number is None else [self.squares[number]]
        bias, output = (sum(pair[i] for pair in chosen) for i in (0, 1))
        return math.sqrt(bias / output) if output else math.nan

    def to_json(self) -> dict[str, Any]:
        shares = self.eigenvalues()
        return {
            "layer": self.layer,
            "site": self.site,
            "eigenvalues": shares,
            "effective_rank": effective_rank(shares),
            "share_of_first": {str(count): sum(shares[:count]) for count in FIRST},
            "ratio": self.ratio(),
            "by_position": [
                {"from": bucket_range(n)[0], "to": bucket_range(n)[1], "ratio": self.ratio(n)}
                for n in sorted(self.squares)
            ],
        }


@dataclass(frozen=True)
class Biases:
    """The biases of one adapter.

    Attributes:
        layers: one entry for each layer and site, in the order of the layers, attention first.
    """

    name: str
    method: str
    folder: Path
    layers: list[Sums]

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "method": self.method,
            "folder": str(self.folder),
            "layers": [sums.to_json() for sums in self.layers],
        }


def buckets(adapters: Sequence[Biases]) -> list[int]:
    """The numbers of all buckets in which a bias was measured."""
    return sorted({n for biases in adapters for sums in biases.layers for n in sums.squares})


@contextlib.contextmanager
def observed(model: nn.Module, virtual_tokens: int | None = None) -> Iterator[list[Sums]]:
    """Within the block the biases of every forward pass are summed up. A pass must hold one sequence without padding.

    Args:
        model: the adapted model.
        virtual_tokens: their number in a Prefix-Tuning adapter; None for Prefix-Tuning+.

    Yields:
        A list. When the block ends it holds the sums of each adapted layer, as in `Biases.layers`.
    """
    found: dict[tuple[int, str], Sums] = {}
    filled: list[Sums] = []

    def take(layer: int, site: str, bias: Tensor, output: Tensor) -> None:
        sums = found.setdefault((layer, site), Sums(layer, site))
        sums.add(bias.flatten(0, 1), output.flatten(0, 1))

    with contextlib.ExitStack() as stack:
        if virtual_tokens is not None:
            numbers = {
                id(model.get_submodule(name)): shape.layer
                for name, shape in attention_modules(model).items()
            }
            stack.enter_context(_prefixes_observed(numbers, virtual_tokens, take))
        else:
            stack.enter_context(_memories_observed(model, take))
        with torch.no_grad():
            yield filled
        filled.extend(found[key] for key in sorted(found))


# Is called with a layer, a site, its bias and the output it is added to, both [1, positions, heads, d].
Take = Callable[[int, str, Tensor, Tensor], None]


@contextlib.contextmanager
def _memories_observed(model: nn.Module, take: Take) -> Iterator[None]:
    layers = [layer for layer in model.modules() if isinstance(layer, MemoryLayer)]
    attention = {id(layer.base_layer): layer for layer in layers}

    def of_attention(
        call: Callable[..., Any], module: nn.Module, query: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        output, weights = call(module, query, *args, **kwargs)
        layer = attention.get(id(module))
        if layer is not None and (memories := layer.active_memories()):
            reads = [memory(query.float()) for memory in memories]
            bias = torch.stack(reads).sum(0)
            whole = output[..., : bias.shape[-1]].float()
            take(layer.shape.layer, "attention", bias, whole - bias)
        return output, weights

    def of_ffn(layer: FeedForwardMemoryLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            hidden = args[0] if args else next(iter(kwargs.values()))
            whole = output[0] if isinstance(output, tuple) else output
            for memory in layer.active_memories():
                blocks = hidden.reshape(1, -1, memory.heads, memory.d_query)
                bias = memory(blocks.transpose(1, 2).float())
                take(layer.shape.layer, "ffn", bias, whole.reshape(bias.shape).float())

        return hook

    handles = [
        layer.base_layer.register_forward_hook(of_ffn(layer), with_kwargs=True)
        for layer in layers
        if isinstance(layer, FeedForwardMemoryLayer)
    ]
    try:
        with _attention_replaced(of_attention):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _prefixes_observed(layers: dict[int, int], virtual_tokens: int, take: Take) -> Iterator[None]:
    """`layers` maps the ids of the attention modules to the numbers of their layers."""

    def of_attention(
        call: Callable[..., Any],
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if id(module) in layers and key.shape[2] == query.shape[2] + virtual_tokens:
            # The bias is a small difference of large numbers. In bfloat16 rounding would hide its small eigenvalues.
            q, k, v = query.float(), key.float(), value.float()
            seen = mask.float() if mask is not None and mask.is_floating_point() else mask
            whole, _ = call(module, q, k, v, seen, *args, **kwargs)
            k, v = k[:, :, virtual_tokens:], v[:, :, virtual_tokens:]
            seen = None if seen is None else seen[..., virtual_tokens:]
            plain, _ = call(module, q, k, v, seen, *args, **kwargs)
            take(layers[id(module)], "attention", whole - plain, plain)
        return call(module, query, key, value, mask, *args, **kwargs)

    with _attention_replaced(of_attention):
        yield


@contextlib.contextmanager
def _attention_replaced(replacement: Callable[..., Any]) -> Iterator[None]:
    """Within the block every attention module calls `replacement(its attention function, module, query, …)`."""
    original = AttentionInterface.get_interface

    def get_interface(self: AttentionInterface, implementation: str, default: Any) -> Any:
        call = original(self, implementation, default)
        return lambda *args, **kwargs: replacement(call, *args, **kwargs)

    AttentionInterface.get_interface = get_interface
    try:
        yield
    finally:
        AttentionInterface.get_interface = original

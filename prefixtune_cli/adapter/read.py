"""o + φ(q)ᵀM as one operation, with its own backward pass (eq. 7 of arXiv 2506.13674).

Autograd would keep φ(q), a cast M and the normalisation's results for each layer. This operation keeps only the query
and the parameters, which autograd holds anyway, because attention keeps its query. The backward pass computes φ(q)
again, which is cheap beside the products. All tokens of all rows form one matrix per head, so M is never repeated for
each row, and the query is read in place.

Legend: b batch, h heads of M, g query heads that share one of them, s positions, n = b·s tokens, d d_query, f d_φ,
v d_value.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from prefixtune_cli.adapter import triton_read
from prefixtune_cli.adapter.feature_map import FeatureMap, features, pulled_back


class Weights(NamedTuple):
    """The weights of a memory: M is [h, f, v]; the trained map has W, [h, f, d], and b, [h, f]."""

    M: Tensor
    W: Tensor | None = None
    b: Tensor | None = None


def add_read(output: Tensor, query: Tensor, weights: Weights, phi: FeatureMap) -> Tensor:
    """o + φ(q)ᵀM.

    φ and the product are computed in the query's precision, or in autocast's if it is on. On a CPU, the read of a
    single position, as in decoding, is computed in M's precision.

    Args:
        output: o, [b, s, h·g, v], the output of attention.
        query: [b, h·g, s, d], as attention itself uses it, in any layout.
        weights: the memory's weights.
        phi: the feature map.

    Returns:
        [b, s, h·g, v] in the output's dtype.
    """
    if torch.is_grad_enabled():
        sum_: Tensor = _AddRead.apply(output, query, *weights, phi)  # type: ignore[no-untyped-call]
        return sum_
    if query.shape[2] == 1 and query.device.type == "cpu":
        return _of_one_position(output, query, weights, phi)
    return _forward(output, query, weights, phi, _precision(query))


def _of_one_position(output: Tensor, query: Tensor, weights: Weights, phi: FeatureMap) -> Tensor:
    """The read in decoding, in M's precision: casting M would take longer than the product.

    The time goes into calls, not into arithmetic, so there are as few calls as possible.
    """
    M, W, b = weights
    dtype = torch.promote_types(query.dtype, M.dtype)
    x = query.squeeze(2).transpose(0, 1).to(dtype)  # [h·g, b, d]
    if len(M) != len(x) or W is not None or M.dtype != dtype:
        x, M, W, b = _matrices(query, weights, dtype)
    read = torch.bmm(features(phi, x, W, b), M)
    return output + read.transpose(0, 1).unsqueeze(1).to(output.dtype)


class _AddRead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        output: Tensor,
        query: Tensor,
        M: Tensor,
        W: Tensor | None,
        b: Tensor | None,
        phi: FeatureMap,
    ) -> Tensor:
        ctx.save_for_backward(query, M, W, b)
        ctx.phi, ctx.dtype = phi, _precision(query)
        return _forward(output, query, Weights(M, W, b), phi, ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, M, W, b = ctx.saved_tensors
        of_output, *trained = ctx.needs_input_grad[:-1]
        found = _backward(grad, query, Weights(M, W, b), ctx.phi, ctx.dtype, trained)
        return (grad if of_output else None, *found, None)


def _precision(query: Tensor) -> torch.dtype:
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _forward(
    output: Tensor, query: Tensor, weights: Weights, phi: FeatureMap, dtype: torch.dtype
) -> Tensor:
    if triton_read.takes(output, query, weights.M, phi):
        return triton_read.forward(output, query, weights.M, phi, dtype)
    x, M, W, b = _matrices(query, weights, dtype)
    value = features(phi, x, W, b)
    if output.dtype == dtype:
        by_head = output.permute(2, 0, 1, 3).flatten(1, 2)
        return _by_token(torch.baddbmm(by_head, value, M), output)
    return output + _by_token(torch.bmm(value, M), output).to(output.dtype)


def _by_token(heads: Tensor, output: Tensor) -> Tensor:
    """[h·g, n, v] as [b, s, h·g, v]."""
    batch, positions, h, v = output.shape
    return heads.view(h, batch, positions, v).permute(1, 2, 0, 3)


def _backward(
    grad: Tensor,
    query: Tensor,
    weights: Weights,
    phi: FeatureMap,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor | None]:
    """The gradients of the query, M, W and b, each None if it is not wanted."""
    if triton_read.takes(grad, query, weights.M, phi):
        found = triton_read.backward(grad, query, weights.M, phi, dtype, *wanted[:2])
        return [*found, None, None]
    x, M, W, b = _matrices(query, weights, dtype)
    g = grad.permute(2, 0, 1, 3).to(dtype).flatten(1, 2)  # [h·g, n, v]
    value = features(phi, x, W, b)
    dM = torch.bmm(value.mT, g) if wanted[1] else None
    dx = dW = db = None
    if wanted[0] or wanted[2]:
        gradient = torch.bmm(g, M.mT)
        dx, dW, db = pulled_back(gradient, value, phi, x, W, of_query=wanted[0])
    if dx is not None:
        batch, heads, positions, d = query.shape
        dx = dx.to(query.dtype).view(heads, batch, positions, d).transpose(0, 1)
    summed = (
        None if d is None else _summed(d, like)
        for like, d in zip(weights, (dM, dW, db), strict=True)
    )
    return [dx, *summed]


def _matrices(
    query: Tensor, weights: Weights, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The query as [h·g, n, d], and the weights for each query head, all in `dtype`."""
    x = query.transpose(0, 1).flatten(1, 2).to(dtype)
    M, W, b = weights
    M = _each_head(M, len(x), dtype)
    if W is None or b is None:
        return x, M, None, None
    return x, M, _each_head(W, len(x), dtype), _each_head(b, len(x), dtype)


def _each_head(weight: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    group = heads // len(weight)
    return weight.to(dtype) if group == 1 else weight.to(dtype).repeat_interleave(group, 0)


def _summed(gradient: Tensor, like: Tensor | None) -> Tensor:
    """The gradient of a weight that g query heads share."""
    assert like is not None
    group = len(gradient) // len(like)
    gradient = gradient.to(like.dtype)
    return gradient if group == 1 else gradient.view(len(like), group, *like.shape[1:]).sum(1)

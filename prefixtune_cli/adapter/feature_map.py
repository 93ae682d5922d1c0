"""The feature maps φ of eq. 7 (arXiv 2506.13674), one class each. A new map needs only a new class.

The adapter's config names a class in MAPS. The recipe's schema lists the names again, and a test compares the two. A
map with `has_kernel` has a branch in triton_kernels.py. The plain operations compute the others, on a GPU too.

Legend: h heads, n tokens, d d_query, f d_φ.
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # added to the mean square of a query
Gradients = tuple[Tensor, Tensor | None, Tensor | None]  # of x, W and b


class Elu:
    """φ(x) = x where x > 0, else eˣ − 1: the paper's default."""

    name: ClassVar[str] = "elu"
    is_trained: ClassVar[bool] = False
    has_kernel: ClassVar[bool] = True

    @staticmethod
    def value(x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        return F.elu(x)

    @staticmethod
    def gradients(gradient: Tensor, value: Tensor, x: Tensor, W: Tensor | None) -> Gradients:
        return torch.ops.aten.elu_backward(gradient, 1, 1, 1, False, x), None, None


class Gelu:
    """φ(x) = x·Φ(x), where Φ is the normal distribution function."""

    name: ClassVar[str] = "gelu"
    is_trained: ClassVar[bool] = False
    has_kernel: ClassVar[bool] = True

    @staticmethod
    def value(x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        return F.gelu(x)

    @staticmethod
    def gradients(gradient: Tensor, value: Tensor, x: Tensor, W: Tensor | None) -> Gradients:
        return torch.ops.aten.gelu_backward(gradient, x), None, None


class Mlp:
    """φ(x) = ReLU(Wx + b) with trained W, [h, f, d], and b, [h, f]."""

    name: ClassVar[str] = "mlp"
    is_trained: ClassVar[bool] = True
    has_kernel: ClassVar[bool] = False

    @staticmethod
    def value(x: Tensor, W: Tensor | None, b: Tensor | None) -> Tensor:
        assert W is not None and b is not None
        return F.relu(torch.baddbmm(b[:, None], x, W.mT))

    @staticmethod
    def gradients(gradient: Tensor, value: Tensor, x: Tensor, W: Tensor | None) -> Gradients:
        assert W is not None
        before_relu = torch.ops.aten.threshold_backward(gradient, value, 0)
        return torch.bmm(before_relu, W), torch.bmm(before_relu.mT, x), before_relu.sum(1)


MAPS: dict[str, type[Elu | Gelu | Mlp]] = {phi.name: phi for phi in (Elu, Gelu, Mlp)}


class FeatureMap(NamedTuple):
    """Which φ, and whether it sees the query divided by its root mean square."""

    name: str
    normalize_query: bool = False


def features(
    phi: FeatureMap, x: Tensor, W: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """φ(x), for each head.

    Args:
        phi: the map.
        x: the queries, [h, n, d], in any layout.
        W: [h, f, d], only for the trained map.
        b: [h, f], only for the trained map.

    Returns:
        [h, n, f] in the queries' dtype.
    """
    if phi.normalize_query:
        x = _normalized(x)[0].to(x.dtype)
    return MAPS[phi.name].value(x, W, b)


def pulled_back(
    gradient: Tensor,
    value: Tensor,
    phi: FeatureMap,
    x: Tensor,
    W: Tensor | None = None,
    *,
    of_query: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the queries, of W and of b, from the gradient of the features.

    Args:
        gradient: the gradient of φ(x), [h, n, f].
        value: φ(x), as `features` returns it.
        phi, x, W: as in `features`.
        of_query: whether the gradient of the queries is wanted.
    """
    seen, inverse = _normalized(x) if phi.normalize_query else (x, None)
    gradient, dW, db = MAPS[phi.name].gradients(gradient, value, seen.to(x.dtype), W)
    if not of_query:
        return None, dW, db
    if inverse is not None:
        wide = gradient.to(seen.dtype)
        gradient = inverse * (wide - seen * (wide * seen).mean(-1, keepdim=True))
    return gradient.to(x.dtype), dW, db


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The queries divided by their root mean square over the last dimension, and its inverse; at least float32."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return wide * inverse, inverse

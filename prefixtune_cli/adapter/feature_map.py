"""The feature maps φ of eq. 7 (arXiv 2506.13674), elementwise ones and the trained one, and how a gradient passes them.

Legend: h heads, n tokens, d d_query, f d_φ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

EPSILON = 1e-6  # beside the mean square of a query


class FeatureMap(NamedTuple):
    """Which φ, `elu`, `gelu` or `mlp`, and whether it sees the query divided by its root mean square."""

    name: str
    normalize_query: bool = False


ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "gelu": F.gelu}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "elu": lambda gradient, x: torch.ops.aten.elu_backward(gradient, 1, 1, 1, False, x),
    "gelu": torch.ops.aten.gelu_backward,
}


def features(
    phi: FeatureMap, x: Tensor, W: Tensor | None = None, b: Tensor | None = None
) -> Tensor:
    """φ(x), a head at a time; the trained map is ReLU(Wx + b).

    Args:
        phi: the map.
        x: the queries, [h, n, d], in any layout.
        W: [h, f, d], of the trained map alone.
        b: [h, f], of the trained map alone.

    Returns:
        [h, n, f] in the queries' dtype.
    """
    if phi.normalize_query:
        x = _normalized(x)[0].to(x.dtype)
    if W is None or b is None:
        return ELEMENTWISE[phi.name](x)
    return F.relu(torch.baddbmm(b[:, None], x, W.mT))


def pulled_back(
    gradient: Tensor,
    value: Tensor,
    phi: FeatureMap,
    x: Tensor,
    W: Tensor | None = None,
    *,
    of_query: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of the queries, of W and of b, from that of the features.

    Args:
        gradient: of φ(x), [h, n, f].
        value: φ(x), as `features` gives it.
        phi, x, W: as there.
        of_query: whether the first of the three is wanted.
    """
    seen, inverse, dW, db = x, None, None, None
    if phi.normalize_query:
        seen, inverse = _normalized(x)
    if W is None:
        gradient = _BACKWARD[phi.name](gradient, seen.to(x.dtype))
    else:
        before_relu = torch.ops.aten.threshold_backward(gradient, value, 0)
        dW, db = torch.bmm(before_relu.mT, seen.to(x.dtype)), before_relu.sum(1)
        gradient = torch.bmm(before_relu, W)
    if not of_query:
        return None, dW, db
    if inverse is not None:
        wide = gradient.to(seen.dtype)
        gradient = inverse * (wide - seen * (wide * seen).mean(-1, keepdim=True))
    return gradient.to(x.dtype), dW, db


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    """The queries divided by their root mean square over the last dimension, and its inverse; float32 at least."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPSILON)
    return wide * inverse, inverse

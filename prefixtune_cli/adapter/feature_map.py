"""The feature maps φ of eq. 7 (arXiv 2506.13674): elementwise ones, and the trained one."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ELEMENTWISE: dict[str, Callable[[Tensor], Tensor]] = {"elu": F.elu, "gelu": F.gelu}


def mlp(query: Tensor, W: Tensor, b: Tensor) -> Tensor:
    """φ_W(q) = ReLU(Wq + b), a head at a time.

    Args:
        query: [batch, heads, group, positions, d_query]
        W: [heads, d_φ, d_query]
        b: [heads, d_φ]

    Returns:
        [batch, heads, group, positions, d_φ]
    """
    return F.relu(torch.einsum("bhgsd,hfd->bhgsf", query, W) + b[:, None, None])


def root_mean_square_normalized(query: Tensor, eps: float = 1e-6) -> Tensor:
    """The query divided by its root mean square over the head's width (the last dimension), in its own dtype."""
    wide = query.float() if query.dtype in (torch.float16, torch.bfloat16) else query
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(query.dtype)

"""The memory M of one module, and how a query reads it. It knows nothing of the model around it.

While M is trained in a basis (basis.py), its parameter holds coordinates, and each forward pass computes
M = basis·coordinates, a small product beside those of a layer. A state dict always holds M itself.

Legend: h heads of M, g query heads that share one of them, s positions, d d_query, f d_φ, v d_value, r rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune_cli.adapter.feature_map import MAPS, FeatureMap, features
from prefixtune_cli.adapter.read import Weights, add_read


class Memory(nn.Module):
    """φ and M of eq. 7 (arXiv 2506.13674).

    M is [heads, d_φ, d_value] and starts at zero, in float32; it is cast to the query's dtype when it is read.
    The trained map has W_phi, [heads, d_φ, d_query], and b_phi, [heads, d_φ], both initialised like a linear layer.
    With a rank, M is the product of M_down, [heads, d_φ, rank], initialised like a linear layer, and M_up,
    [heads, rank, d_value], which starts at zero; then there is no parameter M.

    `basis`, [heads, d_φ, d_φ], is None unless M is trained in a basis; then M (M_down) holds its coordinates.

    Args:
        heads: the number of matrices M: one per query head, or per key/value head if query heads share it; at an FFN,
            one per block of its input, which is the query there.
        d_query: width of a query head.
        d_value: width of a head's output.
        feature_map: `elu`, `gelu` or `mlp`.
        feature_dim: d_φ of `mlp`; None is d_query.
        normalize_query: divide the query by its root mean square first.
        rank: rank of each M; None is a whole M.
        init_weights: False draws M (M_up) at random, so that the memory changes something from the start.
    """

    parameter_names = ("M", "M_down", "M_up", "W_phi", "b_phi")

    def __init__(
        self,
        heads: int,
        d_query: int,
        d_value: int,
        *,
        feature_map: str = "elu",
        feature_dim: int | None = None,
        normalize_query: bool = False,
        rank: int | None = None,
        init_weights: bool = True,
    ) -> None:
        super().__init__()
        self.heads = heads
        self.d_query = d_query
        self.d_value = d_value
        self.feature_map = feature_map
        self.normalize_query = normalize_query
        self.phi = FeatureMap(feature_map, normalize_query)
        self.rank = rank
        d_phi = feature_dim or d_query
        rows = d_phi if rank is None else rank
        starts_at_zero = nn.Parameter(torch.zeros(heads, rows, d_value, dtype=torch.float32))
        if rank is None:
            self.M = starts_at_zero
        else:
            self.M_down = nn.Parameter(torch.empty(heads, d_phi, rank, dtype=torch.float32))
            nn.init.uniform_(self.M_down, -1 / math.sqrt(d_phi), 1 / math.sqrt(d_phi))
            self.M_up = starts_at_zero
        self.basis: Tensor | None
        self.register_buffer("basis", None, persistent=False)
        self.register_state_dict_post_hook(_fold_into_state_dict)  # type: ignore[no-untyped-call]
        self.register_load_state_dict_pre_hook(_take_from_state_dict)  # type: ignore[no-untyped-call]
        if MAPS[feature_map].is_trained:
            self.W_phi = nn.Parameter(torch.empty(heads, d_phi, d_query, dtype=torch.float32))
            self.b_phi = nn.Parameter(torch.empty(heads, d_phi, dtype=torch.float32))
            bound = 1 / math.sqrt(d_query)
            nn.init.uniform_(self.W_phi, -bound, bound)
            nn.init.uniform_(self.b_phi, -bound, bound)
        if not init_weights:
            nn.init.normal_(starts_at_zero, std=0.1)

    def forward(
        self, query: Tensor, output: Tensor | None = None, others: Sequence[Memory] = ()
    ) -> Tensor:
        """o + φ(q)ᵀM for every query head.

        Args:
            query: [batch, query heads, positions, d_query], as attention itself uses it.
            output: o, [batch, positions, query heads, d_value]; None stands for zeros in the query's dtype.
            others: memories for which `reads_like` holds. One read serves all: φ(q)ᵀM + φ(q)ᵀN = φ(q)ᵀ(M + N).

        Returns:
            [batch, positions, query heads, d_value] in the output's dtype: the layout of attention's output.

        Raises:
            ValueError: the query has another width, or its heads are no multiple of M's.
        """
        batch, query_heads, positions, d_query = query.shape
        if d_query != self.d_query or query_heads % self.heads:
            raise ValueError(
                f"a memory of {self.heads} heads of width {self.d_query} cannot be read by a query of "
                f"{query_heads} heads of width {d_query}"
            )
        if output is None:
            output = query.new_zeros(batch, positions, query_heads, self.d_value)
        weights = self.weights()
        for other in others:
            weights = weights._replace(M=weights.M + other.weights().M)
        return add_read(output, query, weights, self.phi)

    def reads_like(self, other: Memory) -> bool:
        """Whether both have the same number of heads and the same φ, without trained weights."""
        is_trained = MAPS[self.feature_map].is_trained
        return not is_trained and (self.phi, self.heads) == (other.phi, other.heads)

    def features(self, query: Tensor) -> Tensor:
        """φ(q): [heads, tokens, d_query] to [heads, tokens, d_φ]."""
        _, W, b = self.weights()
        return features(self.phi, query, W, b)

    @property
    def factor_name(self) -> str:
        """The name of the parameter that multiplies φ(q), and so may have a basis: M, or M_down if M is a product."""
        return "M" if self.rank is None else "M_down"

    def factor(self) -> Tensor:
        """M (M_down) itself, [heads, d_φ, d_value or rank], whether it is trained in a basis or not."""
        trained: Tensor = getattr(self, self.factor_name)
        if self.basis is None:
            return trained
        with torch.autocast(trained.device.type, enabled=False):
            return torch.bmm(self.basis, trained)

    @torch.no_grad()
    def set_basis(self, basis: Tensor) -> None:
        """Train M in this basis from now on. A query still reads the same.

        Args:
            basis: [heads, d_φ, d_φ], of full rank.
        """
        self.fold()
        parameter = getattr(self, self.factor_name)
        self.basis = basis.to(parameter)
        if parameter.any():  # a fresh M is zero in any basis
            parameter.copy_(_coordinates(self.basis, parameter))

    @torch.no_grad()
    def fold(self) -> None:
        """Let the parameter hold M (M_down) itself again, without a basis."""
        if self.basis is not None:
            getattr(self, self.factor_name).copy_(self.factor())
            self.basis = None

    def weights(self) -> Weights:
        """M, computed if it is a product or has a basis, and the trained map."""
        M = self.factor() if self.rank is None else self.factor() @ self.M_up
        if not MAPS[self.feature_map].is_trained:
            return Weights(M)
        return Weights(M, self.W_phi, self.b_phi)

    def matrix(self) -> Tensor:
        """M, [heads, d_φ, d_value] in float32, whether it is trained whole or as a product."""
        factor = self.factor().float()
        return factor if self.rank is None else factor @ self.M_up.float()

    def extra_repr(self) -> str:
        shapes = [f"{name}={tuple(value.shape)}" for name, value in self.named_parameters()]
        return ", ".join([*shapes, f"feature_map={self.feature_map}"])


def _coordinates(basis: Tensor, factor: Tensor) -> Tensor:
    """The solution A of basis·A = factor, in float64, because a basis has short and long directions."""
    solved: Tensor = torch.linalg.solve(basis.double(), factor.double())
    return solved


def _fold_into_state_dict(
    memory: Memory, state_dict: dict[str, Any], prefix: str, metadata: Any
) -> None:
    if memory.basis is not None:
        state_dict[prefix + memory.factor_name] = memory.factor().detach()


def _take_from_state_dict(memory: Memory, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    key = prefix + memory.factor_name
    if memory.basis is not None and key in state_dict:
        given = state_dict[key].to(memory.basis.device)
        state_dict[key] = _coordinates(memory.basis, given).to(given.dtype)

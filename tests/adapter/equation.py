"""Eq. 7 of arXiv 2506.13674 as loops over plain floats: what the code is compared with.

o_i = softmax-attention(q_i, K, V) + φ(q_i)ᵀ M_h
"""

from __future__ import annotations

import math

import torch

from prefixtune_cli.adapter import Memory


def features(memory: Memory, head: int, query: list[float]) -> list[float]:
    """φ(q) of one head at one position."""
    if memory.normalize_query:
        root_mean_square = math.sqrt(sum(x * x for x in query) / len(query) + 1e-6)
        query = [x / root_mean_square for x in query]
    if memory.feature_map == "elu":
        return [x if x > 0 else math.expm1(x) for x in query]
    if memory.feature_map == "gelu":
        return [x * (1 + math.erf(x / math.sqrt(2))) / 2 for x in query]
    W, b = memory.W_phi[head].tolist(), memory.b_phi[head].tolist()
    return [
        max(0.0, bias + sum(w * x for w, x in zip(row, query, strict=True)))
        for row, bias in zip(W, b, strict=True)
    ]


def read(memory: Memory, query: torch.Tensor) -> torch.Tensor:
    """Σ_f φ(q)_f M[h, f, :]: [batch, query heads, positions, d_query] to [batch, positions, query heads, d_value]."""
    batch, query_heads, positions, _ = query.shape
    group = query_heads // memory.M.shape[0]
    M, q = memory.M.tolist(), query.tolist()
    d_value = memory.M.shape[2]
    out = torch.zeros(batch, positions, query_heads, d_value, dtype=torch.float64)
    for n in range(batch):
        for i in range(positions):
            for h in range(query_heads):
                phi = features(memory, h // group, q[n][h][i])
                for v in range(d_value):
                    out[n, i, h, v] = sum(p * M[h // group][f][v] for f, p in enumerate(phi))
    return out

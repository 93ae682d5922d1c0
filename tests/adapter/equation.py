"""Eq. 7 of arXiv 2506.13674 as loops over plain floats, to compare the code with.

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


def matrix(memory: Memory) -> list[list[list[float]]]:
    """M, or the product of two matrices that replaces it."""
    if memory.rank is None:
        return memory.M.tolist()
    factors = zip(memory.M_down.tolist(), memory.M_up.tolist(), strict=True)
    return [
        [
            [sum(a * row[v] for a, row in zip(down, ups, strict=True)) for v in range(len(ups[0]))]
            for down in downs
        ]
        for downs, ups in factors
    ]


def read_of_blocks(memory: Memory, hidden: torch.Tensor) -> torch.Tensor:
    """concat_b φ(x_b)ᵀ M_b, block after block: [..., hidden] to [..., hidden]."""
    rows = []
    for x in hidden.reshape(-1, hidden.shape[-1]).tolist():
        out = []
        for block, M in enumerate(matrix(memory)):
            width = len(x) // len(matrix(memory))
            phi = features(memory, block, x[block * width : (block + 1) * width])
            out += [sum(p * M[f][v] for f, p in enumerate(phi)) for v in range(len(M[0]))]
        rows.append(out)
    return torch.tensor(rows, dtype=torch.float64).reshape(hidden.shape)


def read(memory: Memory, query: torch.Tensor) -> torch.Tensor:
    """Σ_f φ(q)_f M[h, f, :]: [batch, query heads, positions, d_query] to [batch, positions, query heads, d_value]."""
    batch, query_heads, positions, _ = query.shape
    M, q = matrix(memory), query.tolist()
    group, d_value = query_heads // len(M), len(M[0][0])
    out = torch.zeros(batch, positions, query_heads, d_value, dtype=torch.float64)
    for n in range(batch):
        for i in range(positions):
            for h in range(query_heads):
                phi = features(memory, h // group, q[n][h][i])
                for v in range(d_value):
                    out[n, i, h, v] = sum(p * M[h // group][f][v] for f, p in enumerate(phi))
    return out

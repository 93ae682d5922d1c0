"""The kernels of triton_read.py, which imports this module, and with it Triton, only if there is a GPU.

The products take φ(q), M and the gradient in the compute dtype, and add up in float32. φ, its slope and the
normalisation are computed in float32. Padded rows, features and columns hold zeros, and φ(0) = 0.

Sources: eq. 7 of arXiv 2506.13674; https://triton-lang.org/main/python-api/triton.html for the language.

Legend: b batch, s positions, n = b·s tokens, H heads of M, group query heads that share one of them, d d_query and
d_φ, v d_value; D is d padded to a power of two. A stride of x along y is x_y.
"""

from __future__ import annotations

import os
from typing import Any

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]

# The interpreter does not tune, as the tuner needs a driver. Its block is small, so that a test has several tiles.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
_TOKEN_BLOCKS = [
    triton.Config({"BLOCK_N": block}, num_warps=warps, num_stages=1)
    for block in ((32,) if INTERPRETED else (16, 32, 64, 128))
    for warps in ((4,) if INTERPRETED else (4, 8))
]
# The block size decides the order of a sum over tokens, so it is not tuned here.
_REDUCTIONS = [
    triton.Config({}, num_warps=warps, num_stages=stages)
    for warps in ((4,) if INTERPRETED else (4, 8))
    for stages in ((1,) if INTERPRETED else (1, 2, 3))
]
_KEY = ["d", "v", "bucket", "PRECISION", "PHI", "NORMALIZE"]
# Lengths vary, and Triton would compile again for a length that 16 divides.
_UNSPECIALIZED = ["n", "positions", "bucket"]


def _worth_tuning(configs: list[Any], given: dict[str, Any], **named: Any) -> list[Any]:
    """Drop configurations whose blocks would be mostly empty, or whose tiles would overflow the registers.

    float32 does not use tensor cores, so its products are unrolled and need more registers.
    """
    call = {**given, **named}
    bucket: int = call["bucket"]
    width: int = call["D"]
    elements: int = (16 if call["PRECISION"] == "float32" else 64) * 32  # of a tile, in each warp
    smallest: int = min(config.kwargs["BLOCK_N"] for config in configs)

    def fits(block: int, warps: int) -> bool:
        return block <= bucket and block * width <= elements * warps

    return [
        config
        for config in configs
        if config.kwargs["BLOCK_N"] == smallest or fits(config.kwargs["BLOCK_N"], config.num_warps)
    ]


@triton.jit
def probe(x: tl.tensor) -> None:
    """Do nothing. A launch shows that kernels can be compiled, loaded and launched."""


@triton.jit
def _rounded(x: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    if PRECISION == "bfloat16":
        # NumPy has no bfloat16: the interpreter would multiply the bits as integers.
        if INTERPRETED:
            return x.to(tl.bfloat16).to(tl.float32)
        else:
            return x.to(tl.bfloat16)
    elif PRECISION == "float16":
        return x.to(tl.float16)
    else:
        return x.to(tl.float32)


@triton.jit
def _phi(x: tl.tensor, PHI: tl.constexpr) -> tl.tensor:
    if PHI == "elu":
        return tl.where(x > 0, x, tl.exp(x) - 1)
    else:
        tl.static_assert(PHI == "gelu", "this feature map has no kernel")
        return 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _slope(x: tl.tensor, PHI: tl.constexpr) -> tl.tensor:
    """φ'(x)."""
    if PHI == "elu":
        return tl.where(x > 0, 1.0, tl.exp(x))
    else:
        tl.static_assert(PHI == "gelu", "this feature map has no kernel")
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * density


@triton.jit
def _row(
    token: tl.tensor, positions: tl.tensor, stride_b: tl.tensor, stride_s: tl.tensor
) -> tl.tensor:
    """The offset of each token, [N, 1]. A tile may cross from one row of the batch to the next."""
    batch, position = (token // positions).to(tl.int64), (token % positions).to(tl.int64)
    return (batch * stride_b + position * stride_s)[:, None]


@triton.jit
def _seen(
    x: tl.tensor, d: tl.constexpr, NORMALIZE: tl.constexpr, EPSILON: tl.constexpr
) -> tl.tuple:
    """The input of φ for queries x, [N, D], and the inverse of their root mean square, [N, 1], both in float32."""
    x = x.to(tl.float32)
    if NORMALIZE:
        inverse = tl.rsqrt(tl.sum(x * x, 1, keep_dims=True) / d + EPSILON)
        return x * inverse, inverse
    else:
        return x, tl.full([1, 1], 1.0, tl.float32)


@triton.autotune(_TOKEN_BLOCKS, _KEY, prune_configs_by={"early_config_prune": _worth_tuning})
@triton.jit(do_not_specialize=_UNSPECIALIZED)
def read(
    output: tl.tensor,
    query: tl.tensor,
    M: tl.tensor,
    result: tl.tensor,
    n: tl.tensor,
    positions: tl.tensor,
    bucket: tl.tensor,
    group: tl.tensor,
    output_b: tl.tensor,
    output_s: tl.tensor,
    output_h: tl.tensor,
    output_v: tl.tensor,
    query_b: tl.tensor,
    query_s: tl.tensor,
    query_h: tl.tensor,
    result_n: tl.tensor,
    d: tl.constexpr,
    v: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PHI: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """o + φ(q)ᵀM. There is one program per tile of tokens, query head and block of v."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, D)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_tokens, in_features, in_columns = token < n, feature < d, column < v

    at = _row(token, positions, query_b, query_s) + feature[None, :]
    x = tl.load(query + head * query_h + at, in_tokens[:, None] & in_features[None, :], 0.0)
    value = _rounded(_phi(_seen(x, d, NORMALIZE, EPSILON)[0], PHI), PRECISION)
    of_M = feature[:, None] * v + column[None, :]
    tile = tl.load(
        M + head // group * d * v + of_M, in_features[:, None] & in_columns[None, :], 0.0
    )
    product = tl.dot(value, _rounded(tile, PRECISION), input_precision="ieee")

    inside = in_tokens[:, None] & in_columns[None, :]
    at = _row(token, positions, output_b, output_s) + column[None, :] * output_v
    total = tl.load(output + head * output_h + at, inside, 0.0).to(tl.float32) + product
    at = token.to(tl.int64)[:, None] * result_n + column[None, :]
    tl.store(result + head * v + at, total.to(result.dtype.element_ty), inside)


@triton.autotune(_TOKEN_BLOCKS, _KEY, prune_configs_by={"early_config_prune": _worth_tuning})
@triton.jit(do_not_specialize=_UNSPECIALIZED)
def of_query(
    grad: tl.tensor,
    query: tl.tensor,
    M: tl.tensor,
    dq: tl.tensor,
    n: tl.tensor,
    positions: tl.tensor,
    bucket: tl.tensor,
    group: tl.tensor,
    grad_b: tl.tensor,
    grad_s: tl.tensor,
    grad_h: tl.tensor,
    query_b: tl.tensor,
    query_s: tl.tensor,
    query_h: tl.tensor,
    dq_b: tl.tensor,
    dq_s: tl.tensor,
    dq_h: tl.tensor,
    dq_d: tl.tensor,
    d: tl.constexpr,
    v: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PHI: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """The queries' gradient. There is one program per tile of tokens and query head; it loops over the blocks of v."""
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    feature = tl.arange(0, D)
    in_tokens, in_features = token < n, feature < d

    grad += head * grad_h + _row(token, positions, grad_b, grad_s)
    M += head // group * d * v + feature[:, None] * v
    gradient = tl.full([BLOCK_N, D], 0.0, tl.float32)
    for start in range(0, v, BLOCK_V):
        column = start + tl.arange(0, BLOCK_V)
        in_columns = (column < v)[None, :]
        g = tl.load(grad + column[None, :], in_tokens[:, None] & in_columns, 0.0)
        tile = tl.load(M + column[None, :], in_features[:, None] & in_columns, 0.0)
        gradient = tl.dot(
            _rounded(g, PRECISION),
            tl.trans(_rounded(tile, PRECISION)),
            gradient,
            input_precision="ieee",
        )

    inside = in_tokens[:, None] & in_features[None, :]
    at = head * query_h + _row(token, positions, query_b, query_s) + feature[None, :]
    x, inverse = _seen(tl.load(query + at, inside, 0.0), d, NORMALIZE, EPSILON)
    gradient *= _slope(x, PHI)
    if NORMALIZE:
        mean = tl.sum(gradient * x, 1, keep_dims=True) / d
        gradient = inverse * (gradient - x * mean)
    at = head * dq_h + _row(token, positions, dq_b, dq_s) + feature[None, :] * dq_d
    tl.store(dq + at, gradient.to(dq.dtype.element_ty), inside)


@triton.autotune(_REDUCTIONS, _KEY)
@triton.jit(do_not_specialize=[*_UNSPECIALIZED, "share"])
def of_memory(
    grad: tl.tensor,
    query: tl.tensor,
    partial: tl.tensor,
    n: tl.tensor,
    positions: tl.tensor,
    bucket: tl.tensor,
    share: tl.tensor,
    group: tl.tensor,
    grad_b: tl.tensor,
    grad_s: tl.tensor,
    grad_h: tl.tensor,
    query_b: tl.tensor,
    query_s: tl.tensor,
    query_h: tl.tensor,
    d: tl.constexpr,
    v: tl.constexpr,
    D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PHI: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EPSILON: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """A part of M's gradient, [splits, H, d, v]. There is one program per head of M, share of tokens and block of v."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    feature = tl.arange(0, D)
    column = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_features, in_columns = feature < d, column < v
    first = split * share
    end = tl.minimum(first + share, n)

    total = tl.full([D, BLOCK_V], 0.0, tl.float32)
    for member in range(group):
        query_head = head * group + member
        for start in range(first, end, BLOCK_N):
            token = start + tl.arange(0, BLOCK_N)
            in_share = (token < end)[:, None]
            at = _row(token, positions, query_b, query_s) + feature[None, :]
            x = tl.load(query + query_head * query_h + at, in_share & in_features[None, :], 0.0)
            value = _rounded(_phi(_seen(x, d, NORMALIZE, EPSILON)[0], PHI), PRECISION)
            at = _row(token, positions, grad_b, grad_s) + column[None, :]
            g = tl.load(grad + query_head * grad_h + at, in_share & in_columns[None, :], 0.0)
            total = tl.dot(tl.trans(value), _rounded(g, PRECISION), total, input_precision="ieee")

    heads = tl.num_programs(0)
    at = (split * heads + head) * d * v + feature[:, None] * v + column[None, :]
    tl.store(partial + at, total, in_features[:, None] & in_columns[None, :])

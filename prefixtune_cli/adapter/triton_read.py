"""o + φ(q)ᵀM on a GPU, for the elementwise feature maps: one kernel forward, one for each gradient.

The plain operations of read.py write φ(q), its gradient and the product to memory between kernels, and cast M each
time; a decoding step waits for every launch. The kernels here read the queries, M and the output once, and write the
result once. torch.compile fuses the plain operations by itself, so compiled models use those.

The first call with a width, a precision and a range of token counts compiles and tunes the kernel. This synchronises
the GPU, and Triton takes 256 MiB meanwhile. It must happen before a CUDA graph is captured; PyTorch asks for a warm-up
anyway. Later calls only launch. Timing decides which block of tokens wins, so the choice may differ between processes;
with TRITON_CACHE_AUTOTUNING=1 Triton keeps it on disk. M's gradient does not depend on the choice, because its sums
always have the same order.

Legend: b batch, h query heads, H heads of M (h // H query heads share one), s positions, n = b·s tokens, d d_query,
v d_value.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune_cli.adapter.feature_map import EPSILON, MAPS, FeatureMap

_WIDEST = 256
_PRECISIONS = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}
_BUCKETS = (16, 128, 1024, 8192)  # token counts up to these are tuned separately
_TILE_BYTES = 32 * 1024  # of M, in the compute dtype
_REDUCED_BYTES = 16 * 1024  # of the queries that the reduction takes at a time
_REDUCTION_PROGRAMS = 256  # of 64 KiB at most: about two per multiprocessor of a large GPU
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # on a CPU, in tests
_OPTIONS = {"enable_fp_fusion": True}  # of the compiler; Triton will drop the default
_TUNING = threading.Lock()  # Triton's tuner keeps a call's arguments on itself


def takes(output: Tensor, query: Tensor, M: Tensor, phi: FeatureMap) -> bool:
    """Whether the kernels can compute this. If not, read.py's plain operations do.

    Args:
        output: [b, s, h, v].
        query: [b, h, s, d].
        M: [H, d, v].
        phi: the feature map.
    """
    if not (query.is_cuda or _INTERPRETED) or torch.compiler.is_compiling():
        return False
    for t in (output, query, M):
        if type(t) not in (Tensor, nn.Parameter):  # fake tensors hold no data
            return False
        if t.dtype not in _PRECISIONS or t.device != query.device:
            return False
    (batch, heads, positions, d), v = query.shape, M.shape[-1]
    return (
        MAPS[phi.name].has_kernel
        and max(d, v) <= _WIDEST
        # If shapes do not fit, a kernel would read past the end; the plain operations raise an error.
        and M.shape[-2] == d
        and output.shape == (batch, positions, heads, v)
        and _runs_on(query.device)
    )


def forward(
    output: Tensor, query: Tensor, M: Tensor, phi: FeatureMap, dtype: torch.dtype
) -> Tensor:
    """o + φ(q)ᵀM in one launch.

    Args:
        output: [b, s, h, v], any strides.
        query: [b, h, s, d], any strides; it is copied if the last stride is not 1.
        M: [H, d, v].
        phi: the feature map.
        dtype: the dtype of the products' factors. Products add up in float32, and the sum is rounded once.

    Returns:
        [b, s, h, v] in the output's dtype, contiguous.
    """
    batch, heads, positions, _ = query.shape
    x, M = _unit_stride(query), M.contiguous()
    result = torch.empty(output.shape, dtype=output.dtype, device=output.device)
    settings = _settings(x, M, phi, dtype)
    n, columns = batch * positions, settings["v"]
    if settings["bucket"] <= _BUCKETS[1]:  # more programs for a decoding step
        settings["BLOCK_V"] = min(settings["BLOCK_V"], 32)
    blocks = _ceil_div(columns, settings["BLOCK_V"])
    with _launching(query) as kernels:
        kernels.read[lambda chosen: (_ceil_div(n, chosen["BLOCK_N"]), heads, blocks)](
            output,
            x,
            M,
            result,
            **settings,
            **_strides("output", output.stride(), "bshv"),
            **_strides("query", x.stride(), "bhs"),
            result_n=heads * columns,
        )
    return result


def backward(
    grad: Tensor,
    query: Tensor,
    M: Tensor,
    phi: FeatureMap,
    dtype: torch.dtype,
    of_query: bool,
    of_M: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the query and of M, each None if it is not wanted.

    Args:
        grad: the gradient of the result, [b, s, h, v], any strides; it is copied if the last stride is not 1.
        query, M, phi, dtype: as `forward` got them.
        of_query: whether the query's gradient is wanted.
        of_M: whether M's gradient is wanted.

    Returns:
        The query's gradient, [b, h, s, d], in the query's dtype, and in its strides if it has no gaps; and M's
        gradient in M's dtype.
    """
    x, g, M = _unit_stride(query), _unit_stride(grad), M.contiguous()
    given = {
        **_settings(x, M, phi, dtype),
        **_strides("grad", g.stride(), "bsh"),
        **_strides("query", x.stride(), "bhs"),
    }
    with _launching(query) as kernels:
        dq = _of_query(kernels, g, x, M, torch.empty_like(query), given) if of_query else None
        size = max(query.element_size(), dtype.itemsize)
        dM = _of_memory(kernels, g, x, M, size, given) if of_M else None
    return dq, dM


def _of_query(
    kernels: ModuleType, grad: Tensor, query: Tensor, M: Tensor, dq: Tensor, given: dict[str, Any]
) -> Tensor:
    """Fill dq and return it."""
    n, heads = given["n"], query.shape[1]
    kernels.of_query[lambda chosen: (_ceil_div(n, chosen["BLOCK_N"]), heads)](
        grad, query, M, dq, **given, **_strides("dq", dq.stride(), "bhsd")
    )
    return dq


def _of_memory(
    kernels: ModuleType,
    grad: Tensor,
    query: Tensor,
    M: Tensor,
    size: int,
    given: dict[str, Any],
) -> Tensor:
    """M's gradient: the sum over all tokens. Each program adds up a share. `size`: bytes of a query's element."""
    n, heads, blocks = given["n"], len(M), _ceil_div(given["v"], given["BLOCK_V"])
    block = max(16, min(64, _REDUCED_BYTES // (given["D"] * size)))
    shares = max(1, min(_REDUCTION_PROGRAMS // (heads * blocks), _ceil_div(n, 128)))
    share = _ceil_div(_ceil_div(n, shares), block) * block
    partial = torch.empty((shares, *M.shape), dtype=torch.float32, device=M.device)
    kernels.of_memory[(heads, shares, blocks)](
        grad, query, partial, **given, share=share, BLOCK_N=block
    )
    return (partial[0] if shares == 1 else partial.sum(0)).to(M.dtype)


def _settings(query: Tensor, M: Tensor, phi: FeatureMap, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments that all kernels take."""
    batch, heads, positions, d = query.shape
    n, v, D = batch * positions, M.shape[-1], _padded(d)
    return {
        "n": n,
        "positions": positions,
        "bucket": next((bucket for bucket in _BUCKETS if n <= bucket), _BUCKETS[-1]),
        "group": heads // len(M),
        "d": d,
        "v": v,
        "D": D,
        "BLOCK_V": max(16, min(_padded(v), 128, _TILE_BYTES // (D * dtype.itemsize))),
        "PHI": phi.name,
        "NORMALIZE": phi.normalize_query,
        "EPSILON": EPSILON,
        "PRECISION": _PRECISIONS[dtype],
        **_OPTIONS,
    }


def _strides(name: str, strides: tuple[int, ...], axes: str) -> dict[str, int]:
    """The strides of the first axes, by the kernels' names for them."""
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, strides, strict=False)}


def _unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _padded(width: int) -> int:
    """The next power of two, but at least 16, the shortest side of a tile."""
    return max(16, 1 << (width - 1).bit_length())


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether the kernels can be launched there. bfloat16 products need compute capability 8.0.

    Triton needs more than PyTorch: a C compiler, Python's headers, and a driver that knows its machine code.
    """
    enough = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
    if not enough or _kernels() is None:
        return False
    nothing = torch.empty(0, device=device)
    try:
        with _launching(nothing) as kernels:
            kernels.probe[(1,)](nothing, **_OPTIONS)
    except Exception as error:  # of Triton, the compiler or the driver, each with its own class
        warnings.warn(
            f"Triton cannot run a kernel on {device} ({error}). PyTorch's operations compute Prefix-Tuning+ there "
            "instead, which is slower.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from prefixtune_cli.adapter import triton_kernels
    except ImportError:
        return None
    return triton_kernels


@contextmanager
def _launching(tensor: Tensor) -> Iterator[ModuleType]:
    """The kernels, while the tensor's device is the current one: Triton launches there."""
    kernels = _kernels()
    assert kernels is not None
    with _TUNING, torch.cuda.device(tensor.get_device()):
        yield kernels

"""What the fused kernels of a training step allocate and keep, without computing anything.

Three parts of a step cannot be run on fake tensors as they are: TRL's fused head and bitsandbytes' linear layers are
written for real data, and a GPU's attention kernels are chosen by the GPU. Here they are by what they allocate, read
from TRL 1.16, bitsandbytes 0.50 and PyTorch 2.13; `tests/plan/test_measured.py` holds them against the real ones.

Legend: n tokens with a loss, v vocabulary, w width of the hidden states, b batch, h heads, s positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from prefixtune_cli.plan.accounting import LOGITS, Accountant

# The tiles in which TRL projects on the vocabulary: this many tokens by this many words; on a CPU by fewer words.
TILE_TOKENS, TILE_WORDS, CPU_TILE_WORDS = 4096, 32768, 4096
# Without Triton the tile is folded by PyTorch's operators, in float32: how many copies of it live at once.
CPU_TILES_FORWARD, CPU_TILES_BACKWARD = 3, 7
NF4_BLOCK, NF4_OUTER_BLOCK = 64, 256


class FusedHead(torch.autograd.Function):
    """log p of each token's label, from hidden states [n, w] and the head's weight [v, w]: [n]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, accountant: Accountant, on_gpu: bool
    ) -> Tensor:
        dtype = (
            torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
        )
        statistics = torch.empty(8, len(hidden), dtype=torch.float32)
        with accountant.counting_as(LOGITS):
            widest = TILE_WORDS if on_gpu else CPU_TILE_WORDS
            rows, words = min(len(hidden), TILE_TOKENS), min(len(weight), widest)
            tile = torch.empty(rows, widest, dtype=dtype)
            hidden_chunk = hidden[:rows].to(dtype)
            weight[:words].to(dtype)
            if not on_gpu:
                _fold(tile[:, :words], CPU_TILES_FORWARD)
        del tile, hidden_chunk
        log_z = torch.empty(len(hidden), dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, log_z)
        ctx.dtype, ctx.accountant, ctx.on_gpu = dtype, accountant, on_gpu
        return statistics[0] - log_z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, _ = ctx.saved_tensors
        wanted, accountant = ctx.needs_input_grad, ctx.accountant
        grad_hidden = torch.zeros(hidden.shape, dtype=torch.float32) if wanted[0] else None
        with accountant.counting_as(LOGITS):
            grad_weight = torch.zeros(weight.shape, dtype=torch.float32) if wanted[1] else None
            widest = TILE_WORDS if ctx.on_gpu else CPU_TILE_WORDS
            rows, words = min(len(hidden), TILE_TOKENS), min(len(weight), widest)
            tile = torch.empty(rows, widest, dtype=ctx.dtype)[:, :words]
            hidden_chunk, weight_chunk = hidden[:rows].to(ctx.dtype), weight[:words].to(ctx.dtype)
            if not ctx.on_gpu:
                _fold(tile, CPU_TILES_BACKWARD)
                # A GPU's matmul gives float32 from bfloat16; elsewhere both factors are cast first.
                if grad_hidden is not None:
                    _both_in_float32(tile, weight_chunk)
                if grad_weight is not None:
                    _both_in_float32(tile, hidden_chunk)
        del tile, hidden_chunk, weight_chunk
        return (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None,
            None,
        )


def _fold(tile: Tensor, copies: int) -> None:
    torch.empty(copies, *tile.shape, dtype=torch.float32), torch.empty(tile.shape, dtype=torch.bool)


def _both_in_float32(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    return a.float(), b.float()


class QuantizedLinear(nn.Linear):
    """A frozen linear layer of bitsandbytes: `weight` is packed, its scales stand beside it.

    Args:
        linear: the layer that it takes the place of, with a weight [out, in].
        bits: 4 for NF4 with double quantization, 8 for int8.
        on_gpu: which of bitsandbytes' kernels is meant.
        scale_bytes: of the scales; None is bitsandbytes' own.
    """

    def __init__(
        self, linear: nn.Linear | Conv1D, bits: int, on_gpu: bool, scale_bytes: int | None = None
    ) -> None:
        nn.Module.__init__(self)
        shape = linear.weight.shape
        outputs, inputs = shape if isinstance(linear, nn.Linear) else (shape[1], shape[0])
        self.in_features, self.out_features = int(inputs), int(outputs)
        self.bits, self.on_gpu = bits, on_gpu
        elements = self.in_features * self.out_features
        if scale_bytes is None:
            scale_bytes = _nf4_scale_bytes(elements) if bits == 4 else 4 * self.out_features
        size = -(-elements * bits // 8)
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scale_bytes, dtype=torch.uint8), requires_grad=False)
        self.register_parameter("bias", linear.bias)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        kernel = _Multiply4Bit if self.bits <= 4 else _Multiply8Bit
        x = input.to(torch.bfloat16) if self.bits <= 4 else input
        out: Tensor = kernel.apply(x, self.out_features, self.on_gpu)  # type: ignore[no-untyped-call]
        return out.to(input.dtype)


def _nf4_scale_bytes(elements: int) -> int:
    blocks = -(-elements // NF4_BLOCK)
    code_and_offset = 4 * (16 + 1)
    return blocks + 4 * -(-blocks // NF4_OUTER_BLOCK) + code_and_offset


class _Multiply4Bit(torch.autograd.Function):
    """Dequantizes the whole weight for one product, forward and backward; keeps no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, on_gpu: bool) -> Tensor:
        ctx.inputs = x.shape[-1]
        _dequantized(outputs, ctx.inputs, x.dtype)
        return x.new_empty((*x.shape[:-1], outputs))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        weight = _dequantized(grad.shape[-1], ctx.inputs, grad.dtype)
        return (grad @ weight if ctx.needs_input_grad[0] else None), None, None


class _Multiply8Bit(torch.autograd.Function):
    """Keeps its input, in a way that checkpointing does not reach: as an attribute, not among the saved tensors.

    A GPU multiplies in int8; a CPU dequantizes the weight.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, outputs: int, on_gpu: bool) -> Tensor:
        ctx.x = x
        if not on_gpu:
            return x @ x.new_empty(x.shape[-1], outputs)
        whole = (*x.shape[:-1], outputs)
        half, quantized = x.to(torch.float16), x.new_empty(x.shape, dtype=torch.int8)
        outliers = half.abs() >= 0
        del half, outliers
        product = x.new_empty(whole, dtype=torch.int32)
        scaled = product.to(torch.float16)
        del product, quantized
        return scaled.to(x.dtype) if x.dtype != torch.float16 else scaled

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, None, None]:
        x = ctx.x
        weight = x.new_empty(grad.shape[-1], x.shape[-1])
        return (grad.to(x.dtype) @ weight if ctx.needs_input_grad[0] else None), None, None


def _dequantized(outputs: int, inputs: int, dtype: torch.dtype) -> Tensor:
    blocks = torch.empty(2, -(-outputs * inputs // NF4_BLOCK), dtype=torch.float32)
    del blocks
    return torch.empty(outputs, inputs, dtype=dtype)


class GpuAttention(TorchFunctionMode):
    """Within it `scaled_dot_product_attention` allocates and keeps what CUDA's fused kernels do: no score is kept."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        query, key, value, mask = _inputs(*args, **kwargs)
        if torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
            query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if mask is not None and mask.dtype == torch.bool:
            mask = torch.empty(mask.shape, dtype=query.dtype)  # made anew in every layer
        return _FusedAttention.apply(query, key, value, mask)  # type: ignore[no-untyped-call]


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return query, key, value, attn_mask


class _FusedAttention(torch.autograd.Function):
    """Flash attention, or the memory-efficient kernel where there is a mask.

    Query [b, h, s, d], key and value [b, h or fewer, s, d]; gives [b, h, s, d_value], laid out as [b, s, h, d_value].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        b, h, s, _ = query.shape
        out = query.new_empty(b, s, h, value.shape[-1]).transpose(1, 2)
        log_sums = query.new_empty(b, h, s, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, mask, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, _, _, log_sums = ctx.saved_tensors
        results = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        delta = torch.empty_like(log_sums)
        accumulated = torch.empty_like(query, dtype=torch.float32)
        if key.shape[1] != query.shape[1]:  # a gradient for each query head first, summed up then
            whole = (query.shape[0], query.shape[1], *key.shape[2:])
            expanded = key.new_empty(whole), value.new_empty((*whole[:-1], value.shape[-1]))
            del expanded
        del delta, accumulated
        return *results, None

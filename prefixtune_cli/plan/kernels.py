"""What the fused kernels of a training step allocate and keep, without computing anything.

Three parts of a step cannot run on fake tensors as they are. TRL's fused head selects tokens by their values, a GPU
chooses its attention kernel, and a quantized weight needs its state. This module has stand-ins for them. The first two
allocate what TRL 1.16 and PyTorch 2.13 allocate. `tests/plan/test_measured.py` compares all of them to the real ones.

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

# The size of the tiles in which TRL projects on the vocabulary. On a CPU, `train` makes them narrower.
TILE_TOKENS, TILE_WORDS, CPU_TILE_WORDS = 4096, 32768, 4096
# Without Triton, PyTorch's operators fold the tile in float32, and this many copies of it live at once.
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
                # A GPU's product of bfloat16 gives float32. On a CPU, TRL casts both factors first.
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
    """A frozen linear layer of bitsandbytes: a packed weight and its scales, both without values.

    bitsandbytes' own product runs on them. It is the one for a CPU on every device, which keeps and dequantizes the
    same tensors as the one for a GPU.

    Args:
        linear: the layer that it replaces, with a weight [out, in].
        bits: 4 for NF4 with double quantization, 8 for int8.
        scale_bytes: bytes of the scales; None takes those of bitsandbytes.
    """

    def __init__(
        self, linear: nn.Linear | Conv1D, bits: int, scale_bytes: int | None = None
    ) -> None:
        nn.Module.__init__(self)
        shape = linear.weight.shape
        outputs, inputs = shape if isinstance(linear, nn.Linear) else (shape[1], shape[0])
        self.in_features, self.out_features, self.bits = int(inputs), int(outputs), bits
        elements = self.in_features * self.out_features
        self.blocks = -(-elements // NF4_BLOCK)
        if scale_bytes is None:
            of_blocks = self.blocks + 4 * -(-self.blocks // NF4_OUTER_BLOCK)
            code_and_offset = 4 * (16 + 1)
            scale_bytes = of_blocks + code_and_offset if bits == 4 else 4 * self.out_features
        size = -(-elements * bits // 8)
        self.weight = nn.Parameter(torch.empty(size, 1, dtype=torch.uint8), requires_grad=False)
        self.scales = nn.Parameter(torch.empty(scale_bytes, dtype=torch.uint8), requires_grad=False)
        self.register_parameter("bias", linear.bias)
        if linear.bias is not None:
            linear.bias.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        import bitsandbytes
        from bitsandbytes.functional import QuantState

        shape = self.out_features, self.in_features
        # One byte and one number stand for all packed weights and scales, whose memory is counted already.
        byte, number = self.weight[0], torch.empty(1)
        if self.bits > 4:
            state = bitsandbytes.MatmulLtState(
                CB=byte.view(torch.int8).expand(shape), SCB=number.expand(shape[0])
            )
            state.has_fp16_weights = False
            out: Tensor = bitsandbytes.matmul(input, self.weight, state=state)
            return out
        outer = QuantState(number, code=number.expand(256), blocksize=256, dtype=torch.float32)
        state = QuantState(
            byte.expand(self.blocks),
            shape=shape,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=torch.bfloat16,
            offset=number[0],
            state2=outer,
        )
        out = bitsandbytes.matmul_4bit(input.to(torch.bfloat16), self.weight, state)
        return out.to(input.dtype)


class GpuAttention(TorchFunctionMode):
    """Within it `scaled_dot_product_attention` allocates and keeps what CUDA's fused kernels do: no scores."""

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
            mask = torch.empty(mask.shape, dtype=query.dtype)  # every layer makes its own
        return _FusedAttention.apply(query, key, value, mask)  # type: ignore[no-untyped-call]


def _inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    return query, key, value, attn_mask


class _FusedAttention(torch.autograd.Function):
    """Flash attention, or the memory-efficient kernel if there is a mask.

    Query [b, h, s, d], key and value [b, h or fewer, s, d]. Gives [b, h, s, d_value], stored as [b, s, h, d_value].
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
        if key.shape[1] != query.shape[1]:  # one gradient for each query head, then their sums
            whole = (query.shape[0], query.shape[1], *key.shape[2:])
            expanded = key.new_empty(whole), value.new_empty((*whole[:-1], value.shape[-1]))
            del expanded
        del delta, accumulated
        return *results, None

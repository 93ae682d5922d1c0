"""The hook into attention: one hook for all architectures, through transformers' attention interface.

transformers' attention modules ask `AttentionInterface.get_interface` for the function that computes attention
(sdpa, eager, flash, flex, …) and call it as `attention(module, query, key, value, mask, …)`. The query they pass has
been through projection, norm and rotary embedding. They get the heads' outputs before the output projection. The hook
wraps the function that `get_interface` returns. The wrapped function calls the original. If `module` carries a memory
layer, it then adds what the query reads from it. The base's `_attn_implementation` keeps its name.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

LAYER_ATTRIBUTE = "_prefix_tuning_plus_layer"

# The names that transformers' attention modules use for the same things, the preferred one first.
_HEADS = ("num_heads", "num_attention_heads")
_KV_HEADS = ("num_key_value_heads", "kv_heads")
_D_QUERY = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")


class UnsupportedModelError(ValueError):
    """The base model's attention cannot be reached through transformers' attention interface."""


@dataclass(frozen=True)
class AttentionShape:
    """The heads of one attention module."""

    layer: int
    heads: int
    kv_heads: int
    d_query: int
    d_value: int


def attention_modules(model: nn.Module) -> dict[str, AttentionShape]:
    """The decoder's attention modules that the hook reaches, by name, in the order of the model.

    Such a module asks `ALL_ATTENTION_FUNCTIONS` for its attention function in `forward`, and has a `layer_idx`.
    The vision and audio towers of multimodal models have none. A module that already carries a memory goes by the
    name of the layer that wraps it.

    Raises:
        UnsupportedModelError: there is no such module, or one without known heads; the message names the class.
    """
    found = {}
    for name, module in model.named_modules():
        layer = getattr(module, "layer_idx", None)
        if _asks_the_interface(type(module)) and isinstance(layer, int):
            found[name.removesuffix(".base_layer")] = _shape(module, layer)
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be adapted by Prefix-Tuning+: none of its modules calls attention through "
            "transformers' AttentionInterface. Use a model whose attention does (Llama, Mistral, Qwen, Gemma, Phi, "
            "GPT-2, GPT-NeoX, OLMo and most others do), or another method such as LoRA."
        )
    return found


def _asks_the_interface(module_class: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(module_class.forward), "__code__", None)
    # The hook cannot reach a class that indexes the table instead (older remote code).
    return code is not None and {"ALL_ATTENTION_FUNCTIONS", "get_interface"} <= set(code.co_names)


def _shape(module: nn.Module, layer: int) -> AttentionShape:
    config = getattr(module, "config", None)
    heads = _first_int(module, _HEADS) or _first_int(config, _HEADS)
    d_query = _first_int(module, _D_QUERY)
    if heads is None or d_query is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot be adapted by Prefix-Tuning+: it calls attention through transformers' "
            "AttentionInterface, but has no attribute that gives its number of heads and their width."
        )
    groups = _first_int(module, ("num_key_value_groups",))
    kv_heads = (
        heads // groups
        if groups
        else _first_int(module, _KV_HEADS) or _first_int(config, _KV_HEADS) or heads
    )
    return AttentionShape(
        layer, heads, kv_heads, d_query, _first_int(module, ("v_head_dim",)) or d_query
    )


def _first_int(owner: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(owner, name, None) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def attention_with_memory(
    attention: Callable[..., tuple[Tensor, Any]],
    module: nn.Module,
    query: Tensor,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Any]:
    """Call `attention` and add what the query reads from the memories that `module` carries (eq. 7).

    Args:
        attention: the base's attention function.
        module: the attention module.
        query: [batch, heads, positions, d_query], after rotary embedding.

    Returns:
        The heads' outputs, [batch, positions, heads, d_value], and whatever else `attention` returns.
    """
    output, weights = attention(module, query, *args, **kwargs)
    layer = getattr(module, LAYER_ATTRIBUTE, None)
    if layer is not None:
        for memory, *others in layer.reads():
            # Flash attention pads the values of multi-head latent attention to the keys' width.
            if output.shape[-1] > memory.d_value:
                values, padding = output[..., : memory.d_value], output[..., memory.d_value :]
                output = torch.cat((memory(query, values, others), padding), -1)
            else:
                output = memory(query, output, others)
    return output, weights


def install_hook() -> None:
    """Make every attention function of transformers look for a memory. A second call changes nothing."""
    original = AttentionInterface.get_interface
    if getattr(original, "_looks_for_memories", False):
        return

    @functools.wraps(original)
    def get_interface(
        self: AttentionInterface, attn_implementation: str, default: Callable[..., Any]
    ) -> Any:
        return functools.partial(
            attention_with_memory, original(self, attn_implementation, default)
        )

    get_interface._looks_for_memories = True  # type: ignore[attr-defined]
    AttentionInterface.get_interface = get_interface

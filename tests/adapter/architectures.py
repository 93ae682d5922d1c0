"""Tiny random models, one for each kind of attention in transformers; most claims about adapters are tested on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 64
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = COMMON | {"num_key_value_heads": 2}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXTURE = GROUPED | {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "experts_implementation": "batched_mm",
}
LATENT = COMMON | {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "experts_implementation": "batched_mm",
}


@dataclass(frozen=True)
class Architecture:
    """A tiny model, and what Prefix-Tuning+ must find in it, written by hand."""

    config: Callable[[], PreTrainedConfig]
    attention: str = "model.layers.{}.self_attn"
    feed_forward: str = "model.layers.{}.mlp"
    output_projection: str = "o_proj"
    heads: int = 4
    kv_heads: int = 2
    d_query: int = 8
    d_value: int = 8
    implementations: tuple[str, ...] = ("sdpa", "eager")


ARCHITECTURES = {
    "llama": Architecture(lambda: LlamaConfig(**GROUPED)),
    "mistral": Architecture(lambda: MistralConfig(**GROUPED, sliding_window=4)),
    "qwen2": Architecture(lambda: Qwen2Config(**GROUPED)),
    "qwen3": Architecture(lambda: Qwen3Config(**GROUPED, head_dim=16), d_query=16, d_value=16),
    # sdpa does not support its capped scores.
    "gemma2": Architecture(
        lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=4), implementations=("eager",)
    ),
    "gemma3": Architecture(
        lambda: Gemma3TextConfig(
            **GROUPED,
            head_dim=16,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
        d_query=16,
        d_value=16,
    ),
    "phi3": Architecture(lambda: Phi3Config(**GROUPED)),
    "gpt2": Architecture(
        lambda: GPT2Config(**GPT2),
        attention="transformer.h.{}.attn",
        feed_forward="transformer.h.{}.mlp",
        output_projection="c_proj",
        kv_heads=4,
    ),
    "gpt_neox": Architecture(
        lambda: GPTNeoXConfig(**COMMON),
        attention="gpt_neox.layers.{}.attention",
        feed_forward="gpt_neox.layers.{}.mlp",
        output_projection="dense",
        kv_heads=4,
    ),
    "olmo2": Architecture(lambda: Olmo2Config(**GROUPED)),
    "mixtral": Architecture(lambda: MixtralConfig(**MIXTURE)),
    "deepseek_v3": Architecture(lambda: DeepseekV3Config(**LATENT), kv_heads=4, d_query=12),
}
NAMES = list(ARCHITECTURES)
LAYERS = 3
SITES = pytest.mark.parametrize("sites", ["attention", "ffn", "attention+ffn"])


def base_model(
    name: str = "llama",
    *,
    implementation: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: int,
) -> PreTrainedModel:
    """A base in evaluation mode, with weights large enough that every part of it affects the logits."""
    architecture = ARCHITECTURES[name]
    config = architecture.config()
    config.update(changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(
        config,
        attn_implementation=implementation or architecture.implementations[0],
        dtype=torch.float32,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.to(dtype).eval()


def tokens(batch: int = 2, positions: int = 7, seed: int = 0) -> torch.Tensor:
    """Token ids without special ones, [batch, positions]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, positions), generator=generator)


def logits(model: torch.nn.Module, input_ids: torch.Tensor, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids, **kwargs).logits


def attention(model: torch.nn.Module, name: str, layer: int) -> torch.nn.Module:
    """The attention module of a layer, or the memory layer around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_submodule(ARCHITECTURES[name].attention.format(layer))


def feed_forward(model: torch.nn.Module, name: str, layer: int) -> torch.nn.Module:
    """The FFN of a layer, or the memory layer around it."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_submodule(ARCHITECTURES[name].feed_forward.format(layer))


def adapted_modules(name: str, sites: str, layers: Iterable[int] = range(LAYERS)) -> list[str]:
    """The names of the modules that an adapter of these sites wraps, in the model's order."""
    architecture = ARCHITECTURES[name]
    places = {"attention": architecture.attention, "ffn": architecture.feed_forward}
    return [place.format(n) for n in layers for site, place in places.items() if site in sites]


def fill(model: torch.nn.Module, adapter: str = "default", seed: int = 0, std: float = 0.3) -> None:
    """Give an adapter's memories random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if f"prefix_tuning_plus_memory.{adapter}." in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(std * noise)

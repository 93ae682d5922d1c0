"""The precision of the base's weights: what `bits` asks of transformers, and what a checkpoint already has.

With `bits` 4 or 8, bitsandbytes quantizes a checkpoint while it loads. A checkpoint that is already quantized keeps its
weights, be it by bitsandbytes, GPTQ, AWQ or another method that transformers can load. For it, `bits` 16 and 32 choose
the dtype of the computation, and `bits` 4 and 8 must match the checkpoint. Adapters work beside quantized layers as
beside any others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from prefixtune_cli.errors import ModelError, first_line
from prefixtune_cli.parallel.devices import device
from prefixtune_cli.recipe.schema import ModelSection

# All packages that a method needs: transformers names only one missing package at a time.
_PACKAGES = {"gptq": "optimum gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}


def check(
    section: ModelSection,
    config: PreTrainedConfig,
    method: str | None = None,
    *,
    sharded: bool = False,
) -> None:
    """Refuse a precision that the checkpoint or the installed packages do not allow. Nothing is loaded.

    Args:
        section: the recipe's model.
        config: the checkpoint's configuration.
        method: the method that will be trained; None if nothing is trained.
        sharded: each of several processes will hold a part of the weights.

    Raises:
        ModelError: the loader is not installed, the weights already have another precision, or they cannot be trained
            or sharded like this.
    """
    stored = stored_settings(config)
    wanted = stored or _settings(section.bits, sharded)
    if wanted is None:
        return
    bits, name = (_bits(stored) if stored else section.bits), _method_name(wanted)
    of = f" to {bits} bits" if bits else ""
    if stored and section.bits in (4, 8) and section.bits != bits:
        instead = f"Type --bits {bits}" if bits in (4, 8) else "Leave --bits out"
        raise ModelError(
            f"{section.name} is already quantized{of} (by {name}), so it cannot be quantized to {section.bits} bits. "
            f"{instead}, or give the model that it was made from."
        )
    if method == "full":
        raise ModelError(
            f"{section.name} is quantized{of} (by {name}), and quantized weights have no gradient: method full cannot "
            "train it. Use another method, or give the model that it was made from."
        )
    trainable = _ask_the_loader(section, wanted, name, quantized_already=stored is not None)
    if method is not None and not trainable:
        raise ModelError(
            f"{section.name} is quantized by {name}, and transformers passes no gradient through it, so nothing can be "
            "trained on it. Give the model that it was made from, with --bits 4."
        )
    if sharded and (name != "bitsandbytes" or bits != 4):
        raise ModelError(
            f"{section.name} at {bits or 'its own'} bits (by {name}) cannot be sharded: the scales of its weights "
            "would stay whole. Use --bits 4, --bits 16, or --parallel ddp, which gives each process the whole base."
        )


def loading_options(
    section: ModelSection, config: PreTrainedConfig, *, trainable: bool, sharded: bool
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that set precision and device.

    Args:
        section: the recipe's model.
        config: the checkpoint's configuration. If it is quantized, its dtypes are changed to the recipe's.
        trainable: all weights will be trained, so they are kept in float32.
        sharded: see `model.load_base`.
    """
    dtype = torch.float32 if trainable or section.bits == 32 else torch.bfloat16
    options: dict[str, Any] = {
        "dtype": dtype,
        "device_map": {"": torch.device("cpu") if sharded else device(section.device)},
    }
    stored = stored_settings(config)
    if stored is None:
        settings = _settings(section.bits, sharded)
        return options if settings is None else {**options, "quantization_config": settings}
    if "bnb_4bit_compute_dtype" in stored:
        stored["bnb_4bit_compute_dtype"] = str(dtype).removeprefix("torch.")
        if sharded:  # for transformers' trainer, which reads it; `settle` converts the weights
            stored["bnb_4bit_quant_storage"] = "bfloat16"
    return options


def stored_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """The checkpoint's quantization settings in its config.json; None if it is not quantized."""
    for part in (config, config.get_text_config(decoder=True)):
        stored = getattr(part, "quantization_config", None)
        if stored:
            return stored if isinstance(stored, dict) else dict(stored.to_dict())
    return None


def settle(model: PreTrainedModel, *, sharded: bool) -> None:
    """Finish a load by bitsandbytes. A base without quantized weights stays as it is.

    In a checkpoint that was already quantized, the norms, embeddings and output layer have the dtype in which they were
    saved. They are cast to the dtype asked for.

    Args:
        model: the base, as loaded.
        sharded: store 4-bit weights as bfloat16, the dtype of the other weights, whatever the checkpoint's storage.
    """
    if getattr(model, "quantization_method", None) == "bitsandbytes":
        kept = model._keep_in_fp32_modules_strict or ()
        for name, parameter in model.named_parameters():
            plain = parameter.is_floating_point() and not hasattr(parameter, "quant_state")
            if plain and not any(part in name for part in kept):
                parameter.data = parameter.data.to(model.config.dtype)
    if sharded:
        for layer in _layers_of_4_bits(model):
            layer.weight.data = layer.weight.data.reshape(-1).view(torch.bfloat16)[:, None]
            layer.quant_storage = layer.weight.quant_storage = torch.bfloat16
    keep_as_loaded(model)


def keep_as_loaded(model: nn.Module) -> None:
    """Keep 4-bit weights as they are, and let gradients flow through them, on a CPU as well.

    On a CPU with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first forward pass in evaluation mode, for a
    faster kernel. This function prevents it, for three reasons. The kernel has no backward pass, so from then on all
    gradients below would be lost. It fails at layers of odd sizes. And bitsandbytes rounds the scales, once when it
    packs and again whenever a state dict is taken, as peft does to load an adapter, so the base would differ from one
    adapter to the next. The price: the kernel would halve the time of an answer to a single prompt.
    """
    for layer in _layers_of_4_bits(model):
        layer.support_avx512bf16_for_cpu = False


def _layers_of_4_bits(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu"))


def _settings(bits: int, sharded: bool) -> BitsAndBytesConfig | None:
    """The settings of bitsandbytes for `bits`; None for 16 and 32."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if bits == 4:
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
            bnb_4bit_quant_storage=torch.bfloat16 if sharded else torch.uint8,
        )
    return None


def _bits(stored: dict[str, Any]) -> int | None:
    """The bits of a quantized weight; None if the checkpoint does not say."""
    if stored.get("load_in_8bit"):
        return 8
    if stored.get("load_in_4bit"):
        return 4
    bits = stored.get("bits", stored.get("w_bit"))
    return bits if isinstance(bits, int) else None


def _method_name(settings: dict[str, Any] | BitsAndBytesConfig) -> str:
    if isinstance(settings, dict):
        bitsandbytes = settings.get("load_in_8bit") or settings.get("load_in_4bit")
        return "bitsandbytes" if bitsandbytes else str(settings.get("quant_method", "unknown"))
    return str(settings.quant_method.value)


def _ask_the_loader(
    section: ModelSection,
    settings: dict[str, Any] | BitsAndBytesConfig,
    name: str,
    *,
    quantized_already: bool,
) -> bool:
    """Whether gradients pass through layers that are loaded with `settings`.

    Raises:
        ModelError: transformers has no loader for them, or the loader lacks something on this machine.
    """
    try:
        quantizer = AutoHfQuantizer.from_config(
            copy.deepcopy(settings), pre_quantized=quantized_already
        )
        quantizer.validate_environment(device_map={"": device(section.device)})
        # Some methods load plain weights if the hardware does not support them.
        plain = getattr(quantizer.quantization_config, "dequantize", False)
        return bool(plain or quantizer.is_trainable)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = first_line(error)
        install = f" Type: pip install {_PACKAGES[name]}" if name in _PACKAGES else ""
        raise ModelError(
            f"{section.name} is quantized by {name}, which cannot be loaded here: {reason.rstrip('.')}.{install}"
            if quantized_already
            else f"{section.bits} bits need {name}, which cannot be used here: {reason.rstrip('.')}.{install}"
        ) from error

"""The precision of the base's weights: what `bits` asks of transformers, and what a checkpoint has of its own.

`bits` 4 and 8 quantize a checkpoint by bitsandbytes while it loads. A checkpoint that is quantized already, by
bitsandbytes, GPTQ, AWQ or whatever else transformers can load, keeps its weights: `bits` 16 and 32 then say in what
dtype is computed, and 4 or 8 must be what it has. Adapters stand beside such layers and need none of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

from prefixtune_cli.errors import ModelError
from prefixtune_cli.parallel.devices import device
from prefixtune_cli.recipe.schema import ModelSection

# Where transformers names one missing package after the other, all of them.
_PACKAGES = {"gptq": "optimum gptqmodel", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes"}


def check(
    section: ModelSection,
    config: PreTrainedConfig,
    method: str | None = None,
    *,
    sharded: bool = False,
) -> None:
    """Refuse a precision that the checkpoint, or what is installed, does not allow; nothing is loaded.

    Args:
        section: the recipe's model.
        config: the checkpoint's configuration.
        method: the adapter's, which will be trained; None where nothing is.
        sharded: several processes will have a part of the weights each.

    Raises:
        ModelError: the loader is not installed, the weights are of another precision already, or they cannot be
            trained or sharded so.
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
            f"{section.name} is quantized{of} already (by {name}), so it cannot be quantized to {section.bits} bits. "
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
            f"{section.name} is quantized by {name}, through which transformers passes no gradient, so nothing can be "
            "trained on it. Give the model that it was made from, with --bits 4."
        )
    if sharded and (name != "bitsandbytes" or bits != 4):
        raise ModelError(
            f"{section.name} at {bits or 'its own'} bits (by {name}) cannot be sharded: its weights have scales beside "
            "them that would not be. Use --bits 4, --bits 16, or --parallel ddp, where each has the whole base."
        )


def loading_options(
    section: ModelSection, config: PreTrainedConfig, *, trainable: bool, sharded: bool
) -> dict[str, Any]:
    """The arguments of `from_pretrained` that decide about precision and place.

    Args:
        section: the recipe's model.
        config: the checkpoint's configuration; where it is quantized, what it says of dtypes becomes the recipe's.
        trainable: every weight will be trained, so they are kept in float32.
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
        if sharded:  # transformers' trainer reads it; `settle` does it
            stored["bnb_4bit_quant_storage"] = "bfloat16"
    return options


def stored_settings(config: PreTrainedConfig) -> dict[str, Any] | None:
    """How the checkpoint is quantized, as its config.json has it; None where it is not."""
    for part in (config, config.get_text_config(decoder=True)):
        stored = getattr(part, "quantization_config", None)
        if stored:
            return stored if isinstance(stored, dict) else dict(stored.to_dict())
    return None


def settle(model: PreTrainedModel, *, sharded: bool) -> None:
    """Put right what a load by bitsandbytes leaves open; a base without quantized weights is left as it is.

    A checkpoint that was quantized already has its norms, embeddings and output layer in the dtype that it was saved
    in: they get the one asked for.

    Args:
        model: the base, as loaded.
        sharded: store 4-bit weights as bfloat16, the dtype of the rest, whatever the checkpoint's storage was.
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
    """Have 4-bit weights stay as they are, and gradients flow through them, on a CPU as well.

    On a CPU with AVX512-BF16 bitsandbytes packs such weights anew at the first forward pass in evaluation mode. The
    kernel that reads them has no backward pass, so that every gradient below would be lost from then on; it stops at
    layers of odd sizes; and the scales are rounded, once in packing and again whenever a state dict is taken, as peft
    does to load an adapter, so that the base would differ from one adapter to the next. What the kernel saves is
    half of the time of an answer to a single prompt.
    """
    for layer in _layers_of_4_bits(model):
        layer.support_avx512bf16_for_cpu = False


def _layers_of_4_bits(model: nn.Module) -> Iterator[Any]:
    return (layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu"))


def _settings(bits: int, sharded: bool) -> BitsAndBytesConfig | None:
    """What `bits` asks of bitsandbytes; None for 16 and 32, which ask nothing."""
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
    """The bits of a quantized weight, where the checkpoint says so."""
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
    """Whether gradients pass through the layers that are loaded by `settings`.

    Raises:
        ModelError: transformers has no loader for them, or it lacks something here.
    """
    try:
        quantizer = AutoHfQuantizer.from_config(
            copy.deepcopy(settings), pre_quantized=quantized_already
        )
        quantizer.validate_environment(device_map={"": device(section.device)})
        # Without hardware for them some are loaded as plain weights.
        plain = getattr(quantizer.quantization_config, "dequantize", False)
        return bool(plain or quantizer.is_trainable)
    except (ImportError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        install = f" Type: pip install {_PACKAGES[name]}" if name in _PACKAGES else ""
        raise ModelError(
            f"{section.name} is quantized by {name}, which cannot be loaded here: {reason.rstrip('.')}.{install}"
            if quantized_already
            else f"{section.bits} bits need {name}, which cannot be used here: {reason.rstrip('.')}.{install}"
        ) from error

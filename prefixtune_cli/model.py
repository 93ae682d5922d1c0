"""The base model, and fresh adapters on it.

Only this module knows peft's configurations of the baseline methods.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefixtune_cli import gguf_base, peft_methods, quantization
from prefixtune_cli.adapter import PrefixTuningPlusConfig, UnsupportedModelError
from prefixtune_cli.errors import ModelError, ResourceError
from prefixtune_cli.parallel.devices import check_device, slow_precision
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.aliases import resolve
from prefixtune_cli.recipe.gguf_header import is_gguf
from prefixtune_cli.recipe.schema import (
    AdapterSection,
    Full,
    Lora,
    ModelSection,
    Peft,
    PrefixTuning,
    PrefixTuningPlus,
    Recipe,
    default_rate,
)
from prefixtune_cli.tokenizer import cannot_load, load_config

# What peft's methods raise if they do not fit a base.
FAILURES = (RuntimeError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)


def tell_loading(section: ModelSection, reporter: Reporter) -> None:
    """Say which base will be loaded, and whether another precision would be faster."""
    reporter.notice(f"Loading {section.name}.")
    if (slow := slow_precision(section.bits, section.device)) is not None:
        reporter.notice(slow)


def load_base(
    section: ModelSection, *, trainable: bool = False, sharded: bool = False
) -> PreTrainedModel:
    """The base model on this process's device, in the precision asked for, or in its own if it is already quantized.

    Args:
        section: the recipe's model.
        trainable: all weights will be trained (method `full`), so they are kept in float32.
        sharded: FSDP will give each process its part. The model is loaded into main memory, and 4-bit weights are
            stored as bfloat16, so that they are sharded like the others.

    Raises:
        ModelError: the model cannot be found or read, or cannot have this precision.
        ResourceError: the model does not fit into the memory.
    """
    check_device(section.device)
    name, config = resolve(section.name), load_config(section)
    quantization.check(section, config, "full" if trainable else None, sharded=sharded)
    options = quantization.loading_options(section, config, trainable=trainable, sharded=sharded)
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    try:
        if is_gguf(name):
            model, loaded = gguf_base.load_model(name, config, **options)
        else:
            model, loaded = AutoModelForCausalLM.from_pretrained(
                name,
                config=config,
                revision=section.revision,
                trust_remote_code=section.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"{section.name} does not fit into the GPU's memory at {section.bits} bits. Try --bits 4, or a "
            "smaller model."
        ) from error
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(cannot_load("model", section, error)) from error
    if missing := sorted(loaded["missing_keys"]):
        raise ModelError(
            f"{section.name} lacks {len(missing)} of its weights, the first is {missing[0]}: they would be random. Is "
            "it a whole causal language model, and is the download complete?"
        )
    quantization.settle(model, sharded=sharded)
    return cast(PreTrainedModel, model)


def hidden_size(section: ModelSection) -> int:
    """The width of the base's hidden states.

    Raises:
        ModelError: the model cannot be found or read, or does not give the width.
    """
    width = getattr(load_config(section).get_text_config(), "hidden_size", None)
    if not isinstance(width, int):
        raise ModelError(
            f"{section.name} does not give the width of its hidden states (config.hidden_size), which decides the "
            "default learning rate. Type a rate, such as --learning-rate 1e-3."
        )
    return width


def with_learning_rate(recipe: Recipe, reporter: Reporter | None = None) -> Recipe:
    """The recipe; if it has no learning rate, with the default for its method and its base, of which `reporter` hears.

    Raises:
        ModelError: see `hidden_size`.
    """
    if recipe.train.learning_rate is not None:
        return recipe
    width = hidden_size(recipe.model)
    recipe = recipe.with_learning_rate(width)
    if reporter is not None:
        reporter.notice(
            f"Learning rate: {recipe.train.learning_rate:g}, the default of {recipe.adapter.method} for a hidden size "
            f"of {width}: {default_rate(recipe.adapter, recipe.train.objective).why}."
        )
    return recipe


def skeleton(section: ModelSection, config: PreTrainedConfig | None = None) -> PreTrainedModel:
    """The base without its weights, on the meta device.

    Args:
        section: the recipe's model.
        config: the base's configuration, where it is known already.

    Raises:
        ModelError: the model cannot be found, or transformers does not know it.
    """
    if config is None:
        config = load_config(section)
    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code
            )
    except (ValueError, ImportError) as error:
        raise ModelError(cannot_load("model", section, error)) from error
    return cast(PreTrainedModel, built)


def check_precision(
    section: ModelSection, method: str | None = None, *, sharded: bool = False
) -> None:
    """Refuse a precision that cannot be loaded, or cannot be trained by `method`, before anything is loaded.

    Raises:
        ModelError: see `quantization.check`; or the model cannot be found.
    """
    quantization.check(section, load_config(section), method, sharded=sharded)


def check_method(
    section: ModelSection, adapter: AdapterSection, config: PreTrainedConfig | None = None
) -> None:
    """Refuse a method that peft lacks, that has wrong settings, or that does not go with the base's precision.

    Args:
        section: the recipe's model.
        adapter: the recipe's adapter.
        config: the base's configuration, if it is already known.

    Raises:
        RecipeError: see `peft_methods.build_config`.
        ModelError: see `peft_methods.check_base`.
    """
    peft_config(adapter)
    if isinstance(adapter, Peft):
        stored = quantization.stored_settings(config or load_config(section))
        quantized = section.bits in (4, 8) or stored is not None
        peft_methods.check_base(adapter.method, section.name, quantized=quantized)


@contextlib.contextmanager
def without_adapter(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the block the model is its base."""
    with model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def evaluating(model: PreTrainedModel | PeftModel) -> Iterator[None]:
    """Within the block the model is in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def cache_name(base: PreTrainedModel) -> str:
    """The name of the key/value cache in calls of the base and in their results: `cache` from transformers 5.24 on."""
    named = "cache" in inspect.signature(base.forward).parameters
    return "cache" if named else "past_key_values"


def peft_config(section: AdapterSection) -> PeftConfig | None:
    """The peft configuration of a recipe's adapter; None for `full`.

    Raises:
        RecipeError: peft does not have the method or the setting.
    """
    match section:
        case PrefixTuningPlus():
            layers = section.layers if isinstance(section.layers, str) else list(section.layers)
            return PrefixTuningPlusConfig(
                task_type="CAUSAL_LM",
                feature_map=section.feature_map,
                feature_dim=section.feature_dim,
                normalize_query=section.normalize_query,
                sites=section.sites,
                block_size=section.block_size,
                rank=section.rank,
                share_heads=section.share_heads,
                layers=layers,
            )
        case Lora():
            own = {
                "r": section.r,
                "lora_alpha": section.alpha,
                "lora_dropout": section.dropout,
                "target_modules": section.target_modules,
            }
            return peft_methods.build_config("lora", own, section.config)
        case PrefixTuning():
            own = {
                "num_virtual_tokens": section.num_virtual_tokens,
                "prefix_projection": section.prefix_projection,
            }
            return peft_methods.build_config("prefix-tuning", own, section.config)
        case Peft():
            return peft_methods.build_config(section.method, {}, section.config)
        case Full():
            return None


def attach(base: PreTrainedModel, section: AdapterSection) -> PeftModel | PreTrainedModel:
    """The base with a fresh adapter, which alone is trainable; for `full`, the base itself, all of it trainable.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    config = peft_config(section)
    if config is None:
        return base.requires_grad_(True)
    peft_methods.name_modules(config, base)
    failures = FAILURES if isinstance(section, Peft) or getattr(section, "config", None) else ()
    try:
        model = get_peft_model(base, config)
    except (UnsupportedModelError, ValueError, *failures) as error:
        raise ModelError(f"adapter: {error}") from error
    peft_methods.compute_in_one_dtype(model)
    peft_methods.call_the_cache_as_peft_does(model)
    return model


def attach_more(model: PeftModel | PreTrainedModel, method: str, count: int) -> None:
    """Add `count` fresh adapters to the one that `attach` made. All are active and trainable, and they add up.

    Raises:
        ModelError: the method can have only one active adapter.
    """
    if not isinstance(model, PeftModel) or model.active_peft_config.is_prompt_learning:
        raise ModelError(
            f"Method {method} cannot have two active adapters. Leave it out, or leave out --adapters."
        )
    config = model.active_peft_config
    try:
        for number in range(2, count + 2):
            model.add_adapter(f"number_{number}", copy.deepcopy(config))
        # The tuner's own `set_adapter`: PeftModel's takes a single name.
        model.base_model.set_adapter(list(model.peft_config))
    except (ValueError, *FAILURES) as error:
        raise ModelError(f"adapter: {error}") from error


def detach(model: PeftModel) -> None:
    """Remove every adapter from the base, which is then as it was."""
    if not model.active_peft_config.is_prompt_learning:  # those leave the base alone
        peft_methods.take_off(model)


def drop_model_card(folder: str | Path) -> None:
    """Remove peft's model card, an empty form, from a folder that peft has just written."""
    (Path(folder) / "README.md").unlink(missing_ok=True)

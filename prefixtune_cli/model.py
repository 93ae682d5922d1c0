"""The base model, and the adapters that are attached to it.

Only this module knows peft's configurations of the baseline methods.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from peft import (
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import prefixtune_cli.adapter as prefix_tuning_plus
from prefixtune_cli import gguf_base, peft_methods, quantization
from prefixtune_cli.adapter import PrefixTuningPlusConfig, UnsupportedModelError
from prefixtune_cli.errors import AdapterError, ModelError, ResourceError
from prefixtune_cli.parallel.devices import check_device, slow_precision
from prefixtune_cli.pointed import WEIGHTS, read_config
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
)
from prefixtune_cli.tokenizer import cannot_load, load_config

# What peft's methods raise if they do not fit a base.
_FAILURES = (RuntimeError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)


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


def with_learning_rate(recipe: Recipe) -> Recipe:
    """The recipe; if it has no learning rate, with the default for its method and its base.

    Raises:
        ModelError: see `hidden_size`.
    """
    if recipe.train.learning_rate is not None:
        return recipe
    return recipe.with_learning_rate(hidden_size(recipe.model))


def skeleton(section: ModelSection) -> PreTrainedModel:
    """The base without its weights, on the meta device.

    Raises:
        ModelError: the model cannot be found, or transformers does not know it.
    """
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
    """The base with a fresh adapter, of which only the adapter is trainable; for `full`, the base itself.

    Raises:
        ModelError: the adapter does not fit the base.
    """
    config = peft_config(section)
    if config is None:
        return base.requires_grad_(True)
    peft_methods.name_modules(config, base)
    failures = _FAILURES if isinstance(section, Peft) or getattr(section, "config", None) else ()
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
    except (ValueError, *_FAILURES) as error:
        raise ModelError(f"adapter: {error}") from error


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The base with a saved adapter.

    Args:
        base: the base that the adapter was trained on.
        folder: an adapter folder, as peft saves it. Weights are read only from safetensors, never from a pickle.

    Raises:
        AdapterError: there is no adapter, it is damaged or too new, or it belongs to another base.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    weights = base.state_dict()
    kept = _copied(weights, base, folder, config)
    try:
        model = PeftModel.from_pretrained(base, str(folder), config=config)
    except (UnsupportedModelError, ValueError, *_FAILURES) as error:
        raise AdapterError(_does_not_fit(base, folder, config, error)) from error
    for name, weight in kept.items():  # peft has overwritten them with the copies
        weights[name].copy_(weight)
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = set(file.keys())
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if missing := sorted(expected - stored):
        raise AdapterError(
            f"The adapter in {folder} does not fit the base {base.name_or_path}: it has no weights for "
            f"{len(missing)} of {len(expected)} places, the first is {missing[0]}. Its base was "
            f"{config.base_model_name_or_path}; give that one with --model."
        )
    peft_methods.compute_in_one_dtype(model)
    peft_methods.call_the_cache_as_peft_does(model)
    return model


def copies_of_base(
    adapter: Iterable[str], trained: Container[str], base: Container[str]
) -> dict[str, str]:
    """The keys under which peft saved weights of the base in an adapter: key → the base's name for the weight.

    peft does so if an adapter stands at the embedding or the output layer, or if the vocabulary has grown.

    Args:
        adapter: the adapter's keys.
        trained: the keys that its configuration accounts for.
        base: the names of the base's weights.
    """
    names = {
        key: key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        for key in adapter
        if key not in trained
    }
    return {key: name for key, name in names.items() if name in base}


def _copied(
    weights: Mapping[str, Tensor], base: PreTrainedModel, folder: Path, config: PeftConfig
) -> dict[str, Tensor]:
    """The base's weights of which the adapter has copies, by name.

    Raises:
        AdapterError: a copy differs from the base's weight, which peft would replace with it.
    """
    saved_whole = tuple(f".{name}." for name in getattr(config, "modules_to_save", None) or ())
    found = {}
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        keys = list(file.keys())
        trained = [key for key in keys if any(name in key for name in saved_whole)]
        for key, name in copies_of_base(keys, trained, weights).items():
            here, copy = weights[name].detach().to("cpu", copy=True), file.get_tensor(key)
            if not _same(here, copy):
                raise AdapterError(
                    f"The adapter in {folder} holds a copy of {name}, which differs from the base "
                    f"{base.name_or_path}: the adapter was trained on a base that had been resized or changed. Save "
                    "that base and its tokenizer to a folder, and give the folder with --model."
                )
            found[name] = here
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two weights are the same within their precisions. Packed ones cannot be compared, and count as same."""
    if not (a.is_floating_point() and b.is_floating_point()):
        return True
    rounding = max(torch.finfo(a.dtype).eps, torch.finfo(b.dtype).eps)
    exact = a.dtype == b.dtype
    return a.shape == b.shape and torch.allclose(
        a.float(), b.float(), rtol=0 if exact else rounding, atol=0 if exact else 1e-7
    )


def check_fits(section: ModelSection, folder: str | Path) -> None:
    """Refuse an adapter whose shapes do not fit the base, before any weight is loaded.

    Raises:
        AdapterError: as `load_adapter`.
        ModelError: the base cannot be found.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    fresh = copy.deepcopy(config)
    if config.is_prompt_learning:  # with its own numbers it would fit any base
        fresh.num_layers = fresh.token_dim = fresh.num_attention_heads = None
    with torch.device("meta"):
        base = skeleton(section)
        own = {name: tuple(weight.shape) for name, weight in base.state_dict().items()}
        try:
            model = PeftModel(base, fresh)
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        except (NotImplementedError, RuntimeError) as error:
            if "meta" in str(error).lower():  # the method reads weights: `load_adapter` checks it
                return
            raise AdapterError(_does_not_fit(base, folder, config, error)) from error
        except (UnsupportedModelError, ValueError) as error:
            raise AdapterError(_does_not_fit(base, folder, config, error)) from error
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        stored = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    shapes = {key: tuple(weight.shape) for key, weight in expected.items()}
    copies = copies_of_base(stored, shapes, own)
    shapes |= {key: own[name] for key, name in copies.items()}
    for key in sorted(shapes.keys() | stored.keys()):
        if (there := stored.get(key)) != (here := shapes.get(key)):
            said = f"size mismatch for {key}: {there or 'nothing'} in the adapter, {here or 'nothing'} for this base."
            raise AdapterError(_does_not_fit(base, folder, config, RuntimeError(said)))


def detach(model: PeftModel) -> None:
    """Remove every adapter from the base, which is then as it was."""
    if not model.active_peft_config.is_prompt_learning:  # those leave the base alone
        peft_methods.take_off(model)


def drop_model_card(folder: str | Path) -> None:
    """Remove peft's model card, an empty form, from a folder that peft has just written."""
    (Path(folder) / "README.md").unlink(missing_ok=True)


def read_adapter_config(folder: Path) -> PeftConfig:
    """The configuration of the adapter in `folder`.

    Raises:
        AdapterError: there is none, it cannot be read, or it was written by a newer version.
    """
    read_config(folder)
    try:
        with safe_open(folder / WEIGHTS, framework="pt"):
            return PeftConfig.from_pretrained(str(folder))
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {error}") from error


def _does_not_fit(base: PreTrainedModel, folder: Path, config: PeftConfig, error: Exception) -> str:
    said = next(
        (line.strip() for line in str(error).splitlines() if "size mismatch" in line), str(error)
    )
    # At an FFN, shapes are of blocks, not of heads: there the first shape that differs says more.
    of_heads = isinstance(config, PrefixTuningPlusConfig) and "attention" in config.sites
    if of_heads and isinstance(error, RuntimeError):
        modules = prefix_tuning_plus.attention_modules(base)
        here = next(iter(modules.values()))
        places = {name.rpartition(".")[2] for name in modules}
        # M whole, and M_up of a low rank: both are [heads, _, d_value].
        matrix = re.compile(rf".*\.({'|'.join(places)})\.prefix_tuning_plus_memory\.(M|M_up)")
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            names = [key for key in file.keys() if matrix.fullmatch(key)]  # noqa: SIM118
            shapes = [file.get_slice(name).get_shape() for name in names]
        heads, _, width = shapes[0]
        said = (
            f"it was trained for {len(shapes)} layers with {heads} heads of width {width}, and this base has "
            f"{base.config.get_text_config().num_hidden_layers} layers with {here.heads} heads of width {here.d_value} "
            f"({here.kv_heads} key/value heads)."
        )
    return (
        f"The adapter in {folder} does not fit the base {base.name_or_path}: {said} Its base was "
        f"{config.base_model_name_or_path}; give that one with --model."
    )

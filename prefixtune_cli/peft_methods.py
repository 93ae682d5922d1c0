"""peft's methods by name: which can be trained here, with which settings, on which bases.

peft's registry lists the methods. This module adds what the registry does not say: which methods need more than a
causal language model and its tokens, which settings would change the base itself, and which methods cannot read
quantized weights. A test tries every method of the registry.
"""

from __future__ import annotations

import functools
import json
import typing
import warnings
from collections.abc import Mapping
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from pydantic import PydanticUserError, TypeAdapter, ValidationError
from torch import nn

from prefixtune_cli.errors import ModelError, RecipeError
from prefixtune_cli.recipe.schema import canonical

# Methods that cannot be trained here, and why.
REFUSED = {
    "xlora": "it mixes adapters that are already trained, and ptp attaches fresh ones",
    "poly": "it needs a task number with every row",
    "multitask-prompt-tuning": "it needs a task number with every row",
    "adaption-prompt": "peft can neither remove it from a base nor run it on a base in bfloat16",
    "adalora": "it prunes ranks by a record of its steps, and peft has no public way to save that in a checkpoint",
    "cpt": "it needs the tokens of a context with their roles, and its own loss",
}
# A setting that a method needs, and an example.
REQUIRED = {
    "trainable-tokens": ("token_indices", "[5, 6]"),
}
# Settings that peft demands, with the values that ptp uses if the recipe has none.
FILLED_IN: dict[str, dict[str, Any]] = {
    "prompt-tuning": {"num_virtual_tokens": 32},
    "p-tuning": {"num_virtual_tokens": 32, "encoder_hidden_size": 128},
    "cartridge": {"num_virtual_tokens": 32},
}
# Methods that compute with the base's weights, which are packed at 4 or 8 bits.
NOT_QUANTIZED = frozenset(
    {"adamss", "deft", "delora", "frod", "glora", "hra", "loha", "lokr", "osf", "peanut", "psoft"}
    | {"shira", "supertuning", "tinylora", "unilora"}
)
# Methods whose layers do not cast their inputs: outside of training they need autocast.
_MIXES_DTYPES = frozenset({"ADALORA", "IA3", "LN_TUNING", "PVERA", "RANDLORA", "ROAD", "SHIRA"})
# Methods that are not meant for all linear layers.
_NOT_ALL_LINEAR = frozenset({"IA3", "LN_TUNING"})
# Initialisations of LoRA that leave the base as it is.
_BEGINNINGS = (True, False, "gaussian", "orthogonal")
# Settings of peft's configurations that say nothing of what an adapter computes.
_RECORDS = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
    | {"runtime_config", "task_type"}
)


def names() -> list[str]:
    """The methods of peft's registry, as recipes spell them."""
    return [canonical(kind.value.lower()) for kind in PEFT_TYPE_TO_CONFIG_MAPPING]


def build_config(method: str, own: Mapping[str, Any], config: Mapping[str, Any]) -> PeftConfig:
    """peft's configuration of a method.

    Args:
        method: a name of `names()`.
        own: the settings with fields of their own in the recipe's section, under peft's names.
        config: the recipe's `adapter.config`.

    Raises:
        RecipeError: the method is unknown or cannot be trained here, or a setting is unknown or wrong.
    """
    kind = _registered(method)
    problems = [
        problem for key, value in config.items() if (problem := _wrong(method, kind, key, value))
    ]
    if problems:
        raise RecipeError("\n  ".join(problems))
    if method in REQUIRED and REQUIRED[method][0] not in config:
        key, example = REQUIRED[method]
        raise RecipeError(
            f"Method {method} needs adapter.config.{key}, as in --set 'adapter.config.{key}={example}'."
        )
    given = {"task_type": "CAUSAL_LM", **FILLED_IN.get(method, {}), **own, **config}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return kind(**given)
    except (ValueError, TypeError, KeyError, AttributeError, ImportError) as error:
        raise RecipeError(f"adapter.config does not fit method {method}: {error}") from error


def has_setting(method: str, key: str) -> bool:
    """Whether peft's configuration of the method has this setting.

    Raises:
        RecipeError: peft does not have the method.
    """
    return key in {field.name for field in fields(_registered(method)) if field.init}


def check_base(method: str, name: str, *, quantized: bool) -> None:
    """Raise ModelError if the method cannot be trained on a base of this precision."""
    if quantized and method in NOT_QUANTIZED:
        raise ModelError(
            f"Method {method} computes with the base's weights, and the weights of {name} are quantized. "
            "Type --bits 16, or use another method."
        )


def why_final(config: PeftConfig) -> str | None:
    """Why a saved adapter cannot be trained on; None if it can."""
    method = canonical(config.peft_type.value.lower())
    if method == "p-tuning" or getattr(config, "prefix_projection", False):
        network = "prefix_projection" if method == "prefix-tuning" else "p-tuning"
        return f"the network of {network} is not saved with it, only the vectors that the network gives"
    return None


def differences(one: PeftConfig, other: PeftConfig) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations of a method differ, and on which depends what an adapter computes.

    How an adapter began, and its dropout, say nothing of that.

    Returns:
        the setting's name in peft → both values.
    """
    found = {}
    for name in (field.name for field in fields(one)):
        both = _plain(getattr(one, name)), _plain(getattr(other, name))
        begins = "init" in name and all(value in (*_BEGINNINGS, "eva") for value in both)
        silent = begins or name in _RECORDS or name.endswith("dropout")
        if both[0] != both[1] and not silent:
            found[name] = both
    return found


def _plain(value: Any) -> Any:
    """A collection as a sorted list: peft keeps names as sets and saves lists."""
    return sorted(value, key=str) if isinstance(value, list | set | tuple) else value


def name_modules(config: PeftConfig, base: nn.Module) -> None:
    """Let a method adapt all linear layers if peft has no default for the architecture."""
    chosen = getattr(config, "target_modules", "none")
    kind = PEFT_TYPE_TO_TUNER_MAPPING.get(config.peft_type)
    known = getattr(kind, "target_module_mapping", None)
    unknown = known and getattr(base.config, "model_type", None) not in known
    if chosen is None and unknown and config.peft_type.value not in _NOT_ALL_LINEAR:
        config.target_modules = "all-linear"


def compute_in_one_dtype(model: PeftModel) -> None:
    """Run a method whose layers mix float32 with the base's dtype under autocast, as in training.

    With the adapter disabled, the base computes as before.
    """
    base = model.get_base_model()
    dtype = base.dtype
    kept = getattr(model.active_peft_config, "modules_to_save", None)  # trained copies, in float32
    mixes = model.peft_type.value in _MIXES_DTYPES or bool(kept)
    if not mixes or dtype == torch.float32:
        return
    layers = [module for module in base.modules() if isinstance(module, BaseTunerLayer)]
    plain = base.forward

    @functools.wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        enabled = not all(layer.disable_adapters for layer in layers)
        with torch.autocast(base.device.type, dtype=dtype, enabled=enabled):
            return plain(*args, **kwargs)

    base.__dict__["forward"] = base.__dict__["_forward_in_one_dtype"] = forward


def call_the_cache_as_peft_does(model: PeftModel) -> None:
    """Let `generate` pass peft the key/value cache under the name that peft reads: `past_key_values`.

    From 5.24 on, transformers calls it `cache`. peft up to 0.21.2 then sees no cache: methods in the cache generate
    without their prefix, and methods in front of the tokens put their prompt before every token. With an older
    transformers nothing changes. Drop this when every peft that pyproject.toml allows reads both names.
    """
    if not model.active_peft_config.is_prompt_learning:
        return
    plain = model.prepare_inputs_for_generation

    @functools.wraps(plain)
    def prepare(*args: Any, **kwargs: Any) -> dict[str, Any]:
        of_base, renamed = model.base_model_prepare_inputs_for_generation, False

        def prepare_base(*args: Any, **kwargs: Any) -> dict[str, Any]:
            nonlocal renamed
            inputs: dict[str, Any] = of_base(*args, **kwargs)
            if "cache" in inputs:
                inputs["past_key_values"], renamed = inputs.pop("cache"), True
            return inputs

        # Only during the call: peft would leave this function on the base, which others may use.
        model.base_model_prepare_inputs_for_generation = prepare_base
        try:
            inputs: dict[str, Any] = plain(*args, **kwargs)
        finally:
            model.base_model_prepare_inputs_for_generation = of_base
        if renamed:
            inputs["cache"] = inputs.pop("past_key_values")
        return inputs

    model.prepare_inputs_for_generation = prepare


def take_off(model: PeftModel) -> None:
    """Remove all adapters, so that the base is as it was before."""
    base = model.get_base_model()
    ours = base.__dict__.pop("_forward_in_one_dtype", None)
    if ours is not None and base.__dict__.get("forward") is ours:
        del base.__dict__["forward"]
    for name, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # peft would leave the trained copy in its place.
            base.set_submodule(name, module.original_module)
    # peft refuses IA3's quantized layers, though nothing is merged. If a module has two layers, it removes only one.
    if model.peft_type.value != "IA3":
        model.unload()
    taken_off: tuple[str, ...] = ()
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.startswith(taken_off):
            base.set_submodule(name, module.get_base_layer())
            taken_off += (f"{name}.",)


def _registered(method: str) -> type[PeftConfig]:
    if method in REFUSED:
        raise RecipeError(f"Method {method} cannot be trained by ptp: {REFUSED[method]}.")
    for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items():
        if canonical(kind.value.lower()) == method:
            found: type[PeftConfig] = config
            return found
    known = ["prefix-tuning-plus", "full", *(n for n in names() if n not in REFUSED)]
    near = get_close_matches(method, known, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"There is no method {method}. {hint}Known are {', '.join(dict.fromkeys(known))}."
    )


def _wrong(method: str, kind: type[PeftConfig], key: str, value: Any) -> str | None:
    """A sentence about a setting that is unknown or has the wrong type; None if it is fine."""
    path = f"adapter.config.{key}"
    own = {field.name for field in fields(kind) if field.init}
    if key not in own:
        near = get_close_matches(key, own, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        return f"{path} is not a setting of method {method}.{hint}"
    if key == "bias" and value != "none":
        return f"{path} {value!r} would train the base's own biases, so there would be no base to compare with."
    if method == "lora" and key == "init_lora_weights" and value not in _BEGINNINGS:
        return (
            f"{path} {value!r} changes the base's weights, so there would be no base to compare with, or needs its own "
            "data. Use true, false, gaussian or orthogonal."
        )
    try:
        hint_of = typing.get_type_hints(kind)[key]
        checker: TypeAdapter[Any] = TypeAdapter(hint_of)
    except (NameError, KeyError, TypeError, PydanticUserError):
        return None  # only peft knows this type, and checks it
    try:
        checker.validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        expected = dict.fromkeys(
            found["msg"].removeprefix("Input should be ") for found in error.errors()
        )
        return f"{path} must be {' or '.join(expected)}, got {value!r}"
    return None

"""An adapter folder, read and put on its base, or refused because it does not fit.

Weights are read only from safetensors, never from a pickle.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

import prefixtune_cli.adapter as prefix_tuning_plus
from prefixtune_cli import peft_methods
from prefixtune_cli.adapter import PrefixTuningPlusConfig, UnsupportedModelError
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.model import FAILURES, attach, peft_config, skeleton
from prefixtune_cli.pointed import WEIGHTS, read_config
from prefixtune_cli.recipe.schema import AdapterSection, ModelSection, WithConfig


def load_adapter(base: PreTrainedModel, folder: str | Path) -> PeftModel:
    """The base with a saved adapter.

    Args:
        base: the base that the adapter was trained on.
        folder: an adapter folder, as peft saves it.

    Raises:
        AdapterError: there is no adapter, it is damaged or too new, or it belongs to another base.
    """

    def load(config: PeftConfig) -> PeftModel:
        return PeftModel.from_pretrained(base, str(folder), config=config)

    model = _loaded(base, Path(folder), load)
    peft_methods.compute_in_one_dtype(model)
    peft_methods.call_the_cache_as_peft_does(model)
    return model


def attach_trained(base: PreTrainedModel, section: AdapterSection, folder: str | Path) -> PeftModel:
    """The base with a saved adapter, which is trained on: it alone is trainable, and in float32.

    Args:
        base: the base that the adapter was trained on.
        section: the recipe's adapter, as `check_goes_on` takes it.
        folder: an adapter folder, as peft saves it.

    Raises:
        AdapterError: see `load_adapter`.
        ModelError: see `model.attach`.
    """

    def load(_: PeftConfig) -> PeftModel:
        model = cast(PeftModel, attach(base, section))
        # As a run goes on from its checkpoint.
        model.load_adapter(str(folder), model.active_adapter, is_trainable=True, torch_device="cpu")
        return model

    return _loaded(base, Path(folder), load)


def _loaded(
    base: PreTrainedModel, folder: Path, load: Callable[[PeftConfig], PeftModel]
) -> PeftModel:
    """What `load` makes of the base and of the adapter's configuration, if the whole adapter is in it."""
    config = read_adapter_config(folder)
    weights = base.state_dict()
    kept = _copied(weights, base, folder, config)
    try:
        model = load(config)
    except (UnsupportedModelError, ValueError, *FAILURES) as error:
        raise AdapterError(_does_not_fit(base, folder, config, error)) from error
    for name, weight in kept.items():  # peft has overwritten them with the copies
        weights[name].copy_(weight)
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    if missing := sorted(expected - stored_shapes(folder).keys()):
        raise AdapterError(
            f"The adapter in {folder} does not fit the base {base.name_or_path}: it has no weights for "
            f"{len(missing)} of {len(expected)} places, the first is {missing[0]}. Its base was "
            f"{config.base_model_name_or_path}; give that one with --model."
        )
    return model


def check_goes_on(section: ModelSection, adapter: AdapterSection, folder: str | Path) -> None:
    """Refuse a saved adapter that cannot be trained on as a recipe says, before any weight is loaded.

    Args:
        section: the recipe's model.
        adapter: the recipe's adapter, of the saved adapter's method.
        folder: an adapter folder.

    Raises:
        AdapterError: it does not fit the base, has other settings than the recipe, or is saved without a part.
        RecipeError: see `model.peft_config`.
        ModelError: the base cannot be found.
    """
    folder = Path(folder)
    check_fits(section, folder)
    saved, own = read_adapter_config(folder), peft_config(adapter)
    assert own is not None, "method full goes on from no adapter"
    if (why := peft_methods.why_final(saved)) is not None:
        raise AdapterError(f"Training cannot go on from the adapter in {folder}: {why}.")
    base = skeleton(section)
    peft_methods.name_modules(own, base)
    left_open: tuple[Any, ...] = ()
    try:
        own = adapted_skeleton(base, own).active_peft_config
    except (UnsupportedModelError, ValueError, *FAILURES):
        left_open = (None, "all-linear")  # the method reads weights, and peft would name them later
    lines, flags = [], list[str]()
    for name, (there, here) in peft_methods.differences(saved, own).items():
        if here not in left_open:
            key, theirs = _setting(adapter, name), json.dumps(there, default=str)
            lines.append(f"  {key}: {theirs} there, {json.dumps(here, default=str)} here")
            flags += ["--set", f"{key}={theirs}"]
    if lines:
        raise AdapterError(
            f"The adapter in {folder} has other settings, so training cannot go on from it with these:\n"
            + "\n".join(lines)
            + f"\nType its own: {shlex.join(flags)}"
        )


def _setting(adapter: AdapterSection, name: str) -> str:
    """The recipe's key of a setting of peft's."""
    if not isinstance(adapter, WithConfig):
        return f"adapter.{name}"
    return f"adapter.{adapter.OWN[name]}" if name in adapter.OWN else f"adapter.config.{name}"


def check_fits(section: ModelSection, folder: str | Path) -> None:
    """Refuse an adapter whose shapes do not fit the base, before any weight is loaded.

    Raises:
        AdapterError: as `load_adapter`.
        ModelError: the base cannot be found.
    """
    folder = Path(folder)
    config = read_adapter_config(folder)
    base = skeleton(section)
    own = {name: tuple(weight.shape) for name, weight in base.state_dict().items()}
    try:
        model = adapted_skeleton(base, config)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    except (NotImplementedError, RuntimeError) as error:
        if "meta" in str(error).lower():  # the method reads weights: `load_adapter` checks it
            return
        raise AdapterError(_does_not_fit(base, folder, config, error)) from error
    except (UnsupportedModelError, ValueError) as error:
        raise AdapterError(_does_not_fit(base, folder, config, error)) from error
    stored = stored_shapes(folder)
    shapes = {key: tuple(weight.shape) for key, weight in expected.items()}
    copies = copies_of_base(stored, shapes, own)
    shapes |= {key: own[name] for key, name in copies.items()}
    for key in sorted(shapes.keys() | stored.keys()):
        if (there := stored.get(key)) != (here := shapes.get(key)):
            said = f"size mismatch for {key}: {there or 'nothing'} in the adapter, {here or 'nothing'} for this base."
            raise AdapterError(_does_not_fit(base, folder, config, RuntimeError(said)))


def adapted_skeleton(base: PreTrainedModel, config: PeftConfig) -> PeftModel:
    """The base without its weights, with an adapter without values.

    Args:
        base: see `skeleton`.
        config: a saved adapter's, which stays as it is.

    Raises:
        whatever peft raises where the adapter does not fit, or its method looks at the base's weights.
    """
    fresh = copy.deepcopy(config)
    if fresh.is_prompt_learning:  # with the saved shapes it would fit any base
        fresh.num_layers = fresh.token_dim = fresh.num_attention_heads = None
    with torch.device("meta"):
        return PeftModel(base, fresh)


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


def stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's tensors by their keys; no tensor is read."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118


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
    """The base's weights that the adapter holds copies of, by name.

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
        shapes = [shape for key, shape in stored_shapes(folder).items() if matrix.fullmatch(key)]
        if shapes:  # none of an adapter whose base names its attention otherwise
            heads, _, width = shapes[0]
            said = (
                f"it was trained for {len(shapes)} layers with {heads} heads of width {width}, and this base has "
                f"{base.config.get_text_config().num_hidden_layers} layers with {here.heads} heads of width "
                f"{here.d_value} ({here.kv_heads} key/value heads)."
            )
    return (
        f"The adapter in {folder} does not fit the base {base.name_or_path}: {said} Its base was "
        f"{config.base_model_name_or_path}; give that one with --model."
    )

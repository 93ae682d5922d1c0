"""One Prefix-Tuning+ adapter made from several, as PEFT's `add_weighted_adapter` does for LoRA.

What a query reads is linear in M (eq. 7 of arXiv 2506.13674). If all adapters share one feature map φ,

    Σ wᵢ φ(q)ᵀMᵢ = φ(q)ᵀ Σ wᵢMᵢ,

so the linear merge is exactly the sum of the adapters. If trained maps differ, they are laid side by side:
φ = [φ₁; φ₂] and M = [w₁M₁; w₂M₂]. This is exact as well, and costs as much as both. If an adapter leaves a layer alone,
its M is zero there. The other combinations are PEFT's own functions, applied to the matrices M.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import merge_utils
from torch import Tensor

from prefixtune_cli.adapter.config import PrefixTuningPlusConfig
from prefixtune_cli.adapter.feature_map import MAPS
from prefixtune_cli.adapter.layer import MemoryLayer
from prefixtune_cli.adapter.memory import Memory

# PEFT's names for the combinations that keep only a share of the entries, `density`.
PRUNING: dict[str, Callable[[list[Tensor], Tensor, float], Tensor]] = {
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
COMBINATIONS = ("linear", *PRUNING)

# Settings that may differ between merged adapters. The result has whole matrices, in the layers of all adapters.
_FREE = {
    "layers",
    "rank",
    "basis_epsilon",
    "feature_dim",
    "init_weights",
    "inference_mode",
    "format_version",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
}


def differing_setting(
    first: PrefixTuningPlusConfig, other: PrefixTuningPlusConfig
) -> tuple[str, object, object] | None:
    """The first setting that differs and prevents a merge of two adapters, with both values."""
    for field in dataclasses.fields(first):
        mine, theirs = getattr(first, field.name), getattr(other, field.name, None)
        if field.name not in _FREE and mine != theirs:
            return field.name, mine, theirs
    return None


def add_weighted_adapter(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str = "linear",
    density: float | None = None,
) -> None:
    """Combine adapters on `model` into a new one, which is not made active.

    Args:
        model: the tuner, which carries the adapters.
        adapters: their names.
        weights: one for each; they may be negative, and need not sum to one.
        adapter_name: the name of the new adapter.
        combination_type: one of COMBINATIONS.
        density: the fraction of M's entries that each adapter keeps, in all combinations but `linear`.

    Raises:
        ValueError: the adapters do not fit each other, or the arguments do not.
    """
    _check_arguments(model, adapters, weights, adapter_name, combination_type, density)
    configs = [model.peft_config[name] for name in adapters]
    for name, config in zip(adapters, configs, strict=True):
        if found := differing_setting(configs[0], config):
            key, mine, theirs = found
            raise ValueError(
                f"Adapters with different settings cannot be merged: {key} is {mine!r} in {adapters[0]!r}, and "
                f"{theirs!r} in {name!r}."
            )
        if config.modules_to_save:
            raise ValueError(
                f"The adapter {name!r} also holds whole modules ({', '.join(config.modules_to_save)}), which cannot "
                "be merged."
            )
    layers = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, MemoryLayer)
    }
    held = _memories(layers, adapters)
    one_width = len({config.feature_dim for config in configs}) == 1
    side_by_side = MAPS[configs[0].feature_map].is_trained and not (
        one_width and all(map(_one_map, held.values()))
    )
    if side_by_side and combination_type != "linear":
        raise ValueError(
            f"Adapters whose trained feature maps differ cannot be merged by {combination_type}: the rows of their "
            "matrices M belong to different features, so their entries cannot be compared. Use linear, which lays "
            "the maps side by side and is exact."
        )
    merged = {
        path: _side_by_side(memories, [config.feature_dim for config in configs], weights)
        if side_by_side
        else _combined(memories, weights, combination_type, density)
        for path, memories in held.items()
    }
    numbers = sorted({layers[path].shape.layer for path in held})
    features = {found["M"].shape[1] for found in merged.values()} if side_by_side else set()
    model.peft_config[adapter_name] = _merged_config(configs, numbers, features)
    model.inject_adapter(model.model, adapter_name)
    for path, parameters in merged.items():
        memory = layers[path].prefix_tuning_plus_memory[adapter_name]
        for key, value in parameters.items():
            getattr(memory, key).data = value.clone()  # in float32, whatever the base's dtype


def _memories(
    layers: Mapping[str, MemoryLayer], adapters: Sequence[str]
) -> dict[str, list[Memory | None]]:
    """The adapters' memories in each module that has any; None for an adapter that leaves the module alone."""
    held: dict[str, list[Memory | None]] = {}
    for path, layer in layers.items():
        memories: dict[str, Any] = dict(layer.prefix_tuning_plus_memory.items())
        here = [memories.get(name) for name in adapters]
        if any(memory is not None for memory in here):
            held[path] = here
    return held


def _check_arguments(
    model: BaseTuner,
    adapters: Sequence[str],
    weights: Sequence[float],
    adapter_name: str,
    combination_type: str,
    density: float | None,
) -> None:
    if missing := [name for name in adapters if name not in model.peft_config]:
        raise ValueError(f"The model has no adapter {missing[0]!r}.")
    if adapter_name in model.peft_config:
        raise ValueError(f"The model has an adapter {adapter_name!r} already.")
    if not adapters or len(weights) != len(adapters):
        raise ValueError(
            f"Each adapter needs one weight, got {len(weights)} for {len(adapters)} adapters."
        )
    if combination_type not in COMBINATIONS:
        raise ValueError(
            f"combination_type must be one of {', '.join(COMBINATIONS)}, got {combination_type!r}."
        )
    if combination_type in PRUNING and (density is None or not 0 < density <= 1):
        raise ValueError(
            f"{combination_type} needs a density above 0 and up to 1, got {density!r}."
        )


def _one_map(memories: Sequence[Memory | None]) -> bool:
    """Whether all adapters that have a memory here have the same trained map."""
    first, *others = [memory for memory in memories if memory is not None]
    return all(
        torch.equal(first.W_phi, other.W_phi) and torch.equal(first.b_phi, other.b_phi)
        for other in others
    )


def _combined(
    memories: Sequence[Memory | None],
    weights: Sequence[float],
    combination_type: str,
    density: float | None,
) -> dict[str, Tensor]:
    """The parameters of one memory that combines several memories with one feature map."""
    first = next(memory for memory in memories if memory is not None)
    zero = torch.zeros_like(first.matrix().detach())
    matrices = [zero if memory is None else memory.matrix().detach() for memory in memories]
    scales = torch.tensor(weights, dtype=zero.dtype, device=zero.device)
    if combination_type == "linear":
        merged = {"M": merge_utils.task_arithmetic(matrices, scales)}
    else:
        assert density is not None
        merged = {"M": PRUNING[combination_type](matrices, scales, density)}
    if MAPS[first.feature_map].is_trained:
        merged |= {"W_phi": first.W_phi.detach(), "b_phi": first.b_phi.detach()}
    return merged


def _side_by_side(
    memories: Sequence[Memory | None],
    feature_dims: Sequence[int | None],
    weights: Sequence[float],
) -> dict[str, Tensor]:
    """φ = [φ₁; φ₂; …] and M = [w₁M₁; w₂M₂; …]. An adapter without a memory here gets zeros."""
    first = next(memory for memory in memories if memory is not None)
    d_value = first.matrix().shape[2]
    parts: dict[str, list[Tensor]] = {"M": [], "W_phi": [], "b_phi": []}
    for memory, feature_dim, weight in zip(memories, feature_dims, weights, strict=True):
        if memory is None:
            shape = (first.heads, feature_dim or first.d_query)
            parts["M"].append(first.W_phi.new_zeros(*shape, d_value))
            parts["W_phi"].append(first.W_phi.new_zeros(*shape, first.d_query))
            parts["b_phi"].append(first.W_phi.new_zeros(*shape))
        else:
            parts["M"].append(weight * memory.matrix().detach())
            parts["W_phi"].append(memory.W_phi.detach())
            parts["b_phi"].append(memory.b_phi.detach())
    return {key: torch.cat(found, dim=1) for key, found in parts.items()}


def _merged_config(
    configs: Sequence[PrefixTuningPlusConfig], numbers: list[int], features: set[int]
) -> PrefixTuningPlusConfig:
    """The first adapter's settings, for whole matrices in the layers of all; `features`: d_φ of maps side by side."""
    if len(features) > 1:
        raise ValueError(
            "Adapters whose trained feature maps differ cannot be merged here: side by side the maps would have "
            f"{' and '.join(map(str, sorted(features)))} features at attention and at the FFN, and an adapter has "
            "one feature_dim."
        )
    layers = configs[0].layers
    if any(config.layers == "all" for config in configs):
        layers = "all"
    elif any(config.layers != layers for config in configs):
        layers = numbers
    return dataclasses.replace(
        configs[0],
        layers=layers,
        feature_dim=features.pop() if features else configs[0].feature_dim,
        rank=None,
        init_weights=True,
    )

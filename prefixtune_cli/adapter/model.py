"""The tuner: puts a memory layer around the attention modules, the FFNs, or both, of the chosen layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from torch import nn

from prefixtune_cli.adapter import arithmetic
from prefixtune_cli.adapter.attention import AttentionShape, attention_modules, install_hook
from prefixtune_cli.adapter.config import PrefixTuningPlusConfig
from prefixtune_cli.adapter.feed_forward import FeedForwardShape, feed_forward_modules
from prefixtune_cli.adapter.layer import WHY_NOT_MERGED, FeedForwardMemoryLayer, MemoryLayer
from prefixtune_cli.adapter.memory import Memory
from prefixtune_cli.adapter.register import PREFIX


class PrefixTuningPlusModel(BaseTuner):
    """A model adapted by Prefix-Tuning+ (arXiv 2506.13674, at ICLR 2026 as PrefixMemory-Tuning).

    Args:
        model: the base.
        peft_config: the configuration.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the memories on the meta device, to be loaded into.

    Raises:
        UnsupportedModelError: the base does not call attention through transformers' interface, or has no FFN that
            could be adapted, and `sites` asks for it.
        ValueError: `layers` names one that the base does not have, `block_size` does not divide its width, or the
            adapter's name is one of the memory's.
    """

    prefix: str = PREFIX
    tuner_layer_cls = MemoryLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(
        self, peft_config: PrefixTuningPlusConfig, model_config: dict[str, Any]
    ) -> PrefixTuningPlusConfig:
        return peft_config

    def _prepare_model(self, peft_config: PrefixTuningPlusConfig, model: nn.Module) -> None:
        install_hook()
        attention = attention_modules(model)
        chosen = set(chosen_layers(peft_config.layers, attention))
        attention = {name: shape for name, shape in attention.items() if shape.layer in chosen}
        self._shapes: dict[str, AttentionShape | FeedForwardShape] = {}
        if "attention" in peft_config.sites:
            self._shapes.update(attention)
        if "ffn" in peft_config.sites:
            feed_forward = feed_forward_modules(model, attention)
            for shape in feed_forward.values():
                shape.block_size(peft_config.block_size)  # refused before any module is replaced
            self._shapes.update(feed_forward)

    def _check_target_module_exists(self, peft_config: PrefixTuningPlusConfig, key: str) -> Any:
        if key not in self._shapes:
            return False
        return peft_config.target_modules is None or check_target_module_exists(peft_config, key)

    def _create_and_replace(
        self,
        peft_config: PrefixTuningPlusConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if adapter_name in Memory.parameter_names:
            raise ValueError(
                f"An adapter cannot be named {adapter_name!r}: PEFT tells adapters apart by the names in a parameter's "
                f"path, and {', '.join(Memory.parameter_names)} are the memory's own. Choose another name."
            )
        shape = self._shapes[current_key]
        kind = FeedForwardMemoryLayer if isinstance(shape, FeedForwardShape) else MemoryLayer
        layer = target if isinstance(target, MemoryLayer) else kind(target, shape)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.prefix_tuning_plus_memory[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> NoReturn:
        raise NotImplementedError(WHY_NOT_MERGED)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> NoReturn:
        raise NotImplementedError(WHY_NOT_MERGED)

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "linear",
        density: float | None = None,
    ) -> None:
        """Add an adapter that is a combination of others; see `arithmetic.add_weighted_adapter`."""
        arithmetic.add_weighted_adapter(
            self, adapters, weights, adapter_name, combination_type, density
        )

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Unloading: PEFT's own way expects a module with a weight.
        if isinstance(child, MemoryLayer):
            setattr(parent, child_name, new_module)
            child.release()
        else:
            super()._replace_module(parent, child_name, new_module, child)


def chosen_layers(layers: str | list[int], shapes: dict[str, AttentionShape]) -> list[int]:
    """The layer numbers that `layers` (`all`, a list, or `last:k`) names, of those that have attention.

    Raises:
        ValueError: a number that the base does not have, or more layers than it has.
    """
    available = sorted({shape.layer for shape in shapes.values()})
    if layers == "all":
        return available
    if isinstance(layers, str):
        count = int(layers.removeprefix("last:"))
        if count > len(available):
            raise ValueError(
                f"layers is {layers}, but the model has {len(available)} attention layers."
            )
        return available[-count:]
    missing = sorted(set(layers) - set(available))
    if missing:
        raise ValueError(
            f"layers names {missing}, but the model's attention layers are {_ranges(available)}."
        )
    return sorted(layers)


def _ranges(numbers: list[int]) -> str:
    if numbers == list(range(numbers[0], numbers[-1] + 1)):
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))

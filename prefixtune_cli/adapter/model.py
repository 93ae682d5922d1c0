"""The tuner. It puts a memory layer around the attention modules, the FFNs, or both, of the chosen layers."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NoReturn

from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from prefixtune_cli.adapter import arithmetic
from prefixtune_cli.adapter.attention import (
    AttentionShape,
    UnsupportedModelError,
    attention_modules,
    install_hook,
)
from prefixtune_cli.adapter.config import PrefixTuningPlusConfig
from prefixtune_cli.adapter.feed_forward import FeedForwardShape, feed_forward_modules
from prefixtune_cli.adapter.layer import WHY_NOT_MERGED, FeedForwardMemoryLayer, MemoryLayer
from prefixtune_cli.adapter.memory import Memory
from prefixtune_cli.adapter.mixed_batch import BASE
from prefixtune_cli.adapter.register import PREFIX


class PrefixTuningPlusModel(BaseTuner):
    """A model adapted by Prefix-Tuning+ (arXiv 2506.13674, at ICLR 2026 as PrefixMemory-Tuning).

    Args:
        model: the base.
        peft_config: the configuration.
        adapter_name: the adapter's name.
        low_cpu_mem_usage: create the memories on the meta device; weights are loaded into them later.

    Raises:
        UnsupportedModelError: the base does not call attention through transformers' interface; or `sites` asks for
            FFNs, and the base has none that can be adapted.
        ValueError: `layers` names a layer that the base does not have, `block_size` does not divide the FFN's width, or
            the adapter has the name of one of the memory's parameters.
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
        chosen_attention = {name: s for name, s in attention.items() if s.layer in chosen}
        shapes: dict[str, AttentionShape | FeedForwardShape] = {}
        if "attention" in peft_config.sites:
            shapes.update(chosen_attention)
        if "ffn" in peft_config.sites:
            feed_forward = feed_forward_modules(model, chosen_attention)
            for shape in feed_forward.values():
                shape.block_size(peft_config.block_size)  # refused before any module is replaced
            shapes.update(feed_forward)
        # A state dict may name modules that the configuration does not.
        self._possible: dict[str, AttentionShape | FeedForwardShape] = {**attention}
        for name, attention_shape in attention.items():
            with contextlib.suppress(UnsupportedModelError):
                self._possible |= feed_forward_modules(model, {name: attention_shape})
        self._possible = {_uncompiled(name): shape for name, shape in self._possible.items()}
        self._chosen = set(map(_uncompiled, shapes))
        names = [_uncompiled(name) for name, _ in model.named_modules()]
        check_targets(peft_config, self._chosen, self._possible, names)

    def _check_target_module_exists(self, peft_config: PrefixTuningPlusConfig, key: str) -> Any:
        if _uncompiled(key) not in self._chosen:
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
        shape = self._possible.get(_uncompiled(current_key))
        if shape is None:
            raise ValueError(
                f"The state dict has a memory for {current_key}, which is neither attention nor an FFN of this base. "
                "Give a state dict that was saved from a base of this architecture."
            )
        kind = FeedForwardMemoryLayer if isinstance(shape, FeedForwardShape) else MemoryLayer
        layer = target if isinstance(target, MemoryLayer) else kind(target, shape)
        layer.update_layer(adapter_name, peft_config)
        if adapter_name not in self.active_adapters:
            layer.prefix_tuning_plus_memory[adapter_name].requires_grad_(False)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(
        self, *args: Any, adapter_names: Sequence[str] | None = None, **kwargs: Any
    ) -> Iterator[None]:
        """Give each row of a batch its own adapter within the block, by `adapter_names`, as in PEFT's LoRA.

        PeftModel calls this around `forward` and `generate`, with their arguments. PEFT has no public way to pass them
        to a method.
        """
        if adapter_names is None:
            yield
            return
        given = [kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds")] + [
            *args[:1]
        ]
        inputs = next((each for each in given if each is not None), None)
        self._check_adapter_names(adapter_names, inputs)
        layers = [module for module in self.modules() if isinstance(module, MemoryLayer)]
        saved = [
            module for module in self.modules() if isinstance(module, AuxiliaryTrainingWrapper)
        ]

        def name_rows(
            _: nn.Module, inputs: Any, given: dict[str, Any]
        ) -> tuple[Any, dict[str, Any]]:
            each = len(inputs[0]) // len(adapter_names)  # the beams of a search
            names = [name for name in adapter_names for _ in range(each)]
            return inputs, {**given, "adapter_names": names}

        with contextlib.ExitStack() as stack:
            for module in saved:
                hook = module.register_forward_pre_hook(name_rows, with_kwargs=True)
                stack.callback(hook.remove)
            for layer in layers:
                layer.read_by_row(adapter_names)
                stack.callback(layer.read_by_row, None)
            yield

    def _check_adapter_names(self, adapter_names: Sequence[str], inputs: Any) -> None:
        if isinstance(adapter_names, str) or not adapter_names:
            raise ValueError(
                f"adapter_names must be a list with a name for each row, got {adapter_names!r}."
            )
        if self.training:
            raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
        if unknown := sorted({*adapter_names} - {*self.peft_config, BASE}):
            known = ", ".join([*self.peft_config, BASE])
            raise ValueError(
                f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}. There are {known}."
            )
        if inputs is not None and len(inputs) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(inputs)} respectively."
            )

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


def check_targets(
    config: PrefixTuningPlusConfig,
    chosen: Collection[str],
    possible: Mapping[str, AttentionShape | FeedForwardShape],
    modules: Collection[str],
) -> None:
    """Refuse target modules that would be left out without a word.

    Args:
        config: the configuration with the `target_modules`.
        chosen: the modules that its `sites` and `layers` allow.
        possible: all attention modules and FFNs of the base.
        modules: the names of all modules of the base.

    Raises:
        ValueError: a name matches no module that is adapted; the message says why.
    """
    targets = config.target_modules
    for target in [targets] if isinstance(targets, str) else targets or ():
        if any(_names(targets, target, name) for name in chosen):
            continue
        meant = [name for name in possible if _names(targets, target, name)]
        if target == "all-linear":
            why = "it means all linear layers, and attention and FFNs are adapted whole. Leave target_modules out"
        elif any(isinstance(possible[name], FeedForwardShape) for name in meant) and (
            "ffn" not in config.sites
        ):
            why = f"{meant[0]} is an FFN, and sites is attention. Set sites to ffn or attention+ffn"
        elif any(isinstance(possible[name], AttentionShape) for name in meant) and (
            config.sites == "ffn"
        ):
            why = f"{meant[0]} is attention, and sites is ffn. Set sites to attention or attention+ffn"
        elif meant:
            why = f"{meant[0]} is in none of the layers that layers names ({config.layers!r})"
        elif any(_names(targets, target, name) for name in modules):
            own = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in possible))
            why = f"it is neither attention nor an FFN, which are called {own} here"
        else:
            why = "it is not found in the base model"
        raise ValueError(f"target_modules names {target!r}, which cannot be adapted: {why}.")


def _names(targets: Collection[str] | str | None, target: str, module: str) -> bool:
    """Whether a target means this module, by the same rules as elsewhere in PEFT."""
    if isinstance(targets, str):
        return re.fullmatch(target, module) is not None
    return module == target or module.endswith(f".{target}")


def _uncompiled(name: str) -> str:
    """A module's name without what torch.compile puts before it."""
    return name.removeprefix("_orig_mod.")


def chosen_layers(layers: str | list[int], shapes: dict[str, AttentionShape]) -> list[int]:
    """The numbers of the layers that `layers` (`all`, a list, or `last:k`) names, among those with attention.

    Raises:
        ValueError: `layers` has a number that the base does not have, or asks for more layers than it has.
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

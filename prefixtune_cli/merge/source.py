"""An adapter to be merged, with its configuration, and the rule for which adapters can be added up.

`ptp merge` and `ptp merge-info` share the rule, so one refuses what the other says cannot be merged.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig

from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter_folder import read_adapter_config
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.pointed import WEIGHTS, Pointed

INITIALISATION = "init_lora_weights"
_BESIDE_A_AND_B = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
)
_HARMLESS_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # that leave the base's weights alone


@dataclass(frozen=True, kw_only=True)
class Source(Pointed):
    """An adapter that was pointed at, with its peft configuration."""

    folder: Path
    method: str
    config: PeftConfig

    @property
    def sha256(self) -> str:
        """The hash of the file of weights."""
        with open(self.folder / WEIGHTS, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def read_source(found: Pointed) -> Source:
    """Read the configuration of an adapter; its weights are not read.

    Raises:
        AdapterError: it is a whole model, or its configuration cannot be read.
    """
    if found.whole or found.folder is None:
        raise AdapterError(
            f"{found.given} is a run of method full: it holds a whole model and no adapter, so there is nothing to "
            "merge. Give runs of prefix-tuning-plus or lora."
        )
    return Source(**vars(found), config=read_adapter_config(found.folder))


def without_a_sum(config: PeftConfig) -> dict[str, Any] | None:
    """The settings because of which an adapter cannot be added to others.

    With them it holds more than A and B, or more than its memories, or its initialisation has changed the base's
    weights.

    Returns:
        the settings with their values: empty where the adapter can be merged. None where its method cannot.
    """
    if isinstance(config, PrefixTuningPlusConfig):
        found: dict[str, Any] = {"modules_to_save": config.modules_to_save}
    elif type(config) is LoraConfig:
        drawn = config.init_lora_weights
        changes_base = isinstance(drawn, str) and drawn not in _HARMLESS_INITIALISATIONS
        found = {
            INITIALISATION: drawn if changes_base else None,
            **{key: getattr(config, key, None) for key in _BESIDE_A_AND_B},
            "bias": None if config.bias == "none" else config.bias,
        }
    else:
        return None
    return {key: value for key, value in found.items() if value}


def check_mergeable(source: Source) -> None:
    """Raise AdapterError where an adapter cannot be added to others; see `without_a_sum`."""
    beside = without_a_sum(source.config)
    if beside is None and source.method == "prefix-tuning":
        raise AdapterError(
            f"{source.given} cannot be merged: its method is prefix-tuning, whose prefixes share one softmax with the "
            "input and with each other, so no prefix acts as the sum of several. Adapters of prefix-tuning-plus and "
            "lora can be merged."
        )
    if beside is None:
        raise AdapterError(
            f"{source.given} cannot be merged: its method is {source.method}, and ptp merges adapters of "
            "prefix-tuning-plus and lora."
        )
    for key, value in beside.items():
        if key == INITIALISATION:
            raise AdapterError(
                f"{source.given} cannot be merged: its initialisation, {key} {value!r}, has changed the base's "
                "weights. Save it as a plain LoRA first (peft: save_pretrained with "
                "path_initial_model_for_weight_conversion)."
            )
        raise AdapterError(
            f"{source.given} cannot be merged: with {key} {value!r} it has more than "
            f"{'A and B' if source.method == 'lora' else 'its memories'}, which has no sum."
        )

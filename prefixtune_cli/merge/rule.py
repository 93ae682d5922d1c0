"""What an adapter may have that has no sum: the one rule of `ptp merge`, which refuses it, and `ptp merge-info`."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig, PeftConfig

from prefixtune_cli.adapter import PrefixTuningPlusConfig

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
_KIND_INITIALISATIONS = ("gaussian", "eva", "orthogonal")  # others change the base's weights


def without_a_sum(config: PeftConfig) -> dict[str, Any] | None:
    """The settings, with their values, by which an adapter has more than A and B, or than its memories.

    One is `init_lora_weights`, where it has changed the base's weights.

    Returns:
        empty where the adapter can be merged; None where no adapter of its method can.
    """
    if isinstance(config, PrefixTuningPlusConfig):
        found: dict[str, Any] = {"modules_to_save": config.modules_to_save}
    elif type(config) is LoraConfig:
        drawn = config.init_lora_weights
        changes_base = isinstance(drawn, str) and drawn not in _KIND_INITIALISATIONS
        found = {
            INITIALISATION: drawn if changes_base else None,
            **{key: getattr(config, key, None) for key in _BESIDE_A_AND_B},
            "bias": None if config.bias == "none" else config.bias,
        }
    else:
        return None
    return {key: value for key, value in found.items() if value}

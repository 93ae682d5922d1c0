"""The base of an adapter without its weights: counted, and adapted again, on the meta device."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefixtune_cli.adapter import AttentionShape, UnsupportedModelError, attention_modules
from prefixtune_cli.adapter_folder import adapted_skeleton
from prefixtune_cli.model import skeleton
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.quantization import stored_settings
from prefixtune_cli.recipe.schema import ModelSection

# What the configurations of mixtures call the experts that a token uses, and all of them.
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Base:
    """What a configuration says of its model.

    Attributes:
        parameters: all of them.
        parameters_per_token: those that a token is multiplied with: without tables that are looked up in, and of a
            mixture's experts the share that is active.
        bytes_per_parameter: in the precision that it is run in.
        attention: the heads of each attention module that the adapter's hook reaches; empty where it reaches none.
        names: of the base's own weights.
        expected: the adapter's keys and shapes, by its configuration; None where it cannot be put on the base.
        misfit: why it cannot.
        layers: the modules that the adapter changes: name → (the tuner's class, the module's class).
    """

    parameters: int
    parameters_per_token: int
    bytes_per_parameter: float
    attention: dict[str, AttentionShape]
    names: frozenset[str]
    expected: dict[str, tuple[int, ...]] | None = None
    misfit: str | None = None
    layers: dict[str, tuple[type[BaseTunerLayer], str]] = field(default_factory=dict)

    @property
    def flops_per_token(self) -> int:
        """FLOPs of a forward pass: a multiplication and an addition a weight, without attention over the context."""
        return 2 * self.parameters_per_token

    @property
    def bytes_per_token(self) -> float:
        """Read from memory for one token of one sequence."""
        return self.parameters_per_token * self.bytes_per_parameter

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Keys and values in the precision of the activations, two bytes a number (four of a float32 base)."""
        width = 4 if self.bytes_per_parameter == 4 else 2
        return sum(
            shape.kv_heads * (shape.d_query + shape.d_value) * width
            for shape in self.attention.values()
        )


def without_weights(section: ModelSection, adapter: PeftConfig) -> Base:
    """Build the base on the meta device, and the adapter on it.

    Args:
        section: the base; no weights of it are needed, and for well-known models no network.
        adapter: the adapter's configuration.

    Raises:
        ModelError: the base's configuration cannot be found or read.
    """
    config = base_config(section)
    model = skeleton(section, config)
    try:
        attention = attention_modules(model)
    except UnsupportedModelError:
        attention = {}
    names = frozenset(model.state_dict())
    counts = model.num_parameters(), _parameters_per_token(model, config)
    base = Base(*counts, _bytes_per_parameter(section, config), attention, names)
    try:
        expected, layers = _adapted(model, adapter)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        return replace(base, misfit=str(error).strip().splitlines()[0])
    return replace(base, expected=expected, layers=layers)


def _adapted(
    base: PreTrainedModel, config: PeftConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[type[BaseTunerLayer], str]]]:
    """`expected` and `layers` of `Base`; peft changes `base` in place."""
    if hasattr(config, "init_lora_weights"):  # others compute with the base's weights
        config = copy.copy(config)
        config.init_lora_weights = True
    adapted = adapted_skeleton(base, config)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    layers = {
        name.removeprefix("base_model.model."): (type(layer), type(layer.get_base_layer()).__name__)
        for name, layer in adapted.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    return {key: tuple(value.shape) for key, value in state.items()}, layers


def _parameters_per_token(model: PreTrainedModel, config: PreTrainedConfig) -> int:
    """The parameters that a token is multiplied with; a table is only looked up in, unless it is the head as well."""
    model.tie_weights()
    head = model.get_output_embeddings()
    tables = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and (head is None or module.weight is not head.weight)
    }
    text = config.get_text_config()
    active, experts = _first(text, _ACTIVE), _first(text, _EXPERTS)
    share = active / experts if active and experts else 1.0
    used = 0.0
    for name, parameter in model.named_parameters():
        if name not in tables:
            used += parameter.numel() * (share if ".experts." in name else 1.0)
    return round(used)


def _first(config: object, names: tuple[str, ...]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and value > 0), None)


def _bytes_per_parameter(section: ModelSection, config: PreTrainedConfig) -> float:
    """Bytes a weight; the scales of quantized ones left out."""
    if stored_settings(config) is not None:
        return 0.5 if "4bit" in str(stored_settings(config)).replace("_", "") else 1
    return section.bits / 8

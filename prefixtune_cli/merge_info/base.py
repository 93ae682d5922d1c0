"""An adapter's base, from its configuration alone: its size, its attention, and which adapter would fit it."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace

from peft import PeftConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from prefixtune_cli.adapter import AttentionShape, UnsupportedModelError, attention_modules
from prefixtune_cli.adapter_folder import adapted_skeleton
from prefixtune_cli.errors import first_line
from prefixtune_cli.model import skeleton
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.quantization import stored_settings
from prefixtune_cli.recipe.schema import ModelSection

# The names of two settings of mixtures of experts: how many experts a token uses, and how many there are.
_ACTIVE = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k_experts")
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class Base:
    """A base without its weights, and the adapter that belongs on it.

    Attributes:
        parameters: their number.
        parameters_per_token: the number of those that one token is multiplied with. Embeddings are only looked up,
            and of the experts of a mixture only the active share counts.
        bytes_per_parameter: in the precision that the base runs in.
        attention: the heads of each attention module that Prefix-Tuning+ can adapt; empty where it can adapt none.
        names: the names of the base's weights.
        expected: the keys and shapes that the adapter should have; None where it cannot be put on the base.
        misfit: why it cannot be put on the base.
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
        """FLOPs of a forward pass: two for each weight, without attention over the context."""
        return 2 * self.parameters_per_token

    @property
    def bytes_per_token(self) -> float:
        """Bytes of weights that are read from memory for one token of one sequence."""
        return self.parameters_per_token * self.bytes_per_parameter

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """Bytes of keys and values: two for each number, or four where the base is in float32."""
        width = 4 if self.bytes_per_parameter == 4 else 2
        return sum(
            shape.kv_heads * (shape.d_query + shape.d_value) * width
            for shape in self.attention.values()
        )


def without_weights(section: ModelSection, adapter: PeftConfig) -> Base:
    """Build the base and the adapter on it without weights, and describe both.

    Args:
        section: the base. Its weights need not be here; for well-known models no network is needed either.
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
        return replace(base, misfit=first_line(error))
    return replace(base, expected=expected, layers=layers)


def _adapted(
    base: PreTrainedModel, config: PeftConfig
) -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[type[BaseTunerLayer], str]]]:
    """`expected` and `layers` of `Base`. peft puts the adapter into `base` itself."""
    if hasattr(
        config, "init_lora_weights"
    ):  # other initialisations compute with the base's weights
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
    """See `Base.parameters_per_token`; an embedding counts where it is the output layer as well."""
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
    """Bytes of one weight; the scales of quantized weights are left out."""
    if stored_settings(config) is not None:
        return 0.5 if "4bit" in str(stored_settings(config)).replace("_", "") else 1
    return section.bits / 8

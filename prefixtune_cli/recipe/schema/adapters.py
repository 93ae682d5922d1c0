"""The `adapter` section: one class for each of four methods, and one for any other method of peft."""

from __future__ import annotations

import re
from difflib import SequenceMatcher
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Discriminator, Field, JsonValue, Tag, field_validator, model_validator

from prefixtune_cli.recipe.schema.section import Section

Method = Literal["prefix-tuning-plus", "lora", "prefix-tuning", "full"]
METHODS_WITH_SECTIONS: tuple[Method, ...] = get_args(Method)
METHOD_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")  # after `_` became `-`

# The methods with trained tokens in front of every row: as keys and values of each layer, or as embeddings.
IN_THE_CACHE = frozenset({"prefix-tuning", "cartridge"})
IN_FRONT = frozenset({"prompt-tuning", "p-tuning"})

# Named settings of Prefix-Tuning+.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "feature_map": "elu",
        "basis": False,
        "normalize_query": False,
        "sites": "attention",
        "rank": None,
        "share_heads": "query",
        "layers": "all",
    },
}


class PrefixTuningPlus(Section):
    """Prefix-Tuning+ trains M and adds φ(q)ᵀM to each head's output (paper, eq. 7), or to the FFN's."""

    method: Literal["prefix-tuning-plus"] = "prefix-tuning-plus"
    preset: Literal["paper"] | None = Field(
        None, description="A named set of these settings; `paper` is exactly the paper's form."
    )
    feature_map: Literal["elu", "gelu", "mlp"] = Field(
        "elu", description="The feature map φ of eq. 7; the paper uses elu."
    )
    feature_dim: int | None = Field(
        None, ge=1, description="Features per head of mlp; null is the query's width."
    )
    normalize_query: bool = Field(
        False, description="Divide the query that φ sees by its root mean square."
    )
    sites: Literal["attention", "ffn", "attention+ffn"] = Field(
        "attention+ffn",
        description="Where M is read; the paper has only attention. At the FFN, the blocks of its input are the "
        "queries.",
    )
    block_size: int | None = Field(
        None,
        ge=1,
        description="Width of a block of the FFN's input; null is about a query head's width.",
    )
    basis: bool = Field(
        True,
        description="Train M in the basis of its queries' second moment; a pass over some rows finds it.",
    )
    rank: int | None = Field(
        None,
        ge=1,
        description="Rank of each M, as a product of two matrices; null is the whole M.",
    )
    share_heads: Literal["query", "kv"] = Field(
        "query", description="One M per query head, or one per key/value head."
    )
    layers: str | list[Annotated[int, Field(ge=0)]] = Field(
        "all", description="Layers to adapt: `all`, a list of layer numbers, or `last:k`."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_the_preset(cls, raw: Any) -> Any:
        if not isinstance(raw, dict) or not isinstance(raw.get("preset"), str):
            return raw
        preset = PRESETS.get(raw["preset"], {})
        for key, value in preset.items():
            if raw.get(key, value) != value:
                raise ValueError(
                    f"adapter.{key} is {value!r} in the preset {raw['preset']}, got {raw[key]!r}. Leave one of the "
                    "two out."
                )
        return {**preset, **raw}

    @field_validator("layers", mode="before")
    @classmethod
    def _layers_have_a_form(cls, value: Any) -> Any:
        if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value):
            if not value or len(set(value)) != len(value):
                raise ValueError(f"must name each layer once, and at least one, got {value}")
        elif not isinstance(value, str) or not re.fullmatch(r"all|last:[1-9]\d*", value):
            raise ValueError(
                f"must be all, a list of layer numbers such as [0, 1], or last:k, got {value!r}"
            )
        return value

    @model_validator(mode="after")
    def _feature_dim_needs_mlp(self) -> PrefixTuningPlus:
        if self.feature_dim is not None and self.feature_map != "mlp":
            raise ValueError(
                f"adapter.feature_dim belongs to feature_map mlp; {self.feature_map} has the query's width. "
                "Leave it out."
            )
        return self

    @model_validator(mode="after")
    def _the_sites_have_the_setting(self) -> PrefixTuningPlus:
        if self.block_size is not None and self.sites == "attention":
            raise ValueError(
                "adapter.block_size belongs to sites ffn and attention+ffn; at attention an M has its head's width. "
                "Leave it out, or type --sites ffn."
            )
        if self.share_heads == "kv" and self.sites == "ffn":
            raise ValueError(
                "adapter.share_heads kv belongs to sites attention and attention+ffn; an FFN has no heads. "
                "Leave it out."
            )
        return self


class WithConfig(Section):
    """A section for a method of peft's, with the other settings of peft's configuration under `config`."""

    OWN: ClassVar[dict[str, str]] = {}  # peft's name → ours, for settings outside `config`
    SET_BY_PTP: ClassVar[frozenset[str]] = frozenset(
        {"peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision"}
        | {"auto_mapping", "peft_version"}
    )

    config: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="Other settings of peft's configuration of the method, as in {use_dora: true}.",
    )

    @model_validator(mode="after")
    def _no_setting_stands_twice(self) -> WithConfig:
        for key in self.config:
            if key in self.OWN:
                raise ValueError(
                    f"adapter.config.{key} has its own setting here. Give it as adapter.{self.OWN[key]}."
                )
            if key in self.SET_BY_PTP:
                raise ValueError(f"adapter.config.{key} is set by ptp itself. Leave it out.")
        return self


class Lora(WithConfig):
    """LoRA through peft (Hu et al. 2021)."""

    OWN: ClassVar[dict[str, str]] = {
        "r": "r",
        "lora_alpha": "alpha",
        "lora_dropout": "dropout",
        "target_modules": "target_modules",
    }

    method: Literal["lora"] = "lora"
    r: int = Field(16, ge=1, description="Rank.")
    alpha: float = Field(32, gt=0, description="Scale; the update is multiplied by alpha / r.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the adapter's input.")
    target_modules: str | list[str] = Field(
        "all-linear", description="Modules to adapt, as in peft: `all-linear`, names, or a regex."
    )


class PrefixTuning(WithConfig):
    """Prefix-Tuning through peft (Li and Liang 2021)."""

    OWN: ClassVar[dict[str, str]] = {
        "num_virtual_tokens": "num_virtual_tokens",
        "prefix_projection": "prefix_projection",
    }

    method: Literal["prefix-tuning"] = "prefix-tuning"
    num_virtual_tokens: int = Field(32, ge=1, description="Trained key/value vectors per layer.")
    prefix_projection: bool = Field(
        False, description="Reparametrise the prefix by an MLP during training."
    )
    init: Literal["random", "rows"] = Field(
        "random",
        description="How the prefix starts; `rows` takes the base's keys and values of some training rows.",
    )

    @model_validator(mode="after")
    def _an_mlp_has_no_start_of_its_own(self) -> PrefixTuning:
        if self.init == "rows" and self.prefix_projection:
            raise ValueError(
                "init: rows does not go with prefix_projection, whose MLP makes the keys and values. "
                "Leave out one of the two."
            )
        return self


class Full(Section):
    """Every weight of the base is trained."""

    method: Literal["full"] = "full"


class Peft(WithConfig):
    """Any other method of peft, by its name there, with its settings under `config`."""

    method: str = Field(
        description="A name of peft's registry in lower case, such as `ia3`.",
        json_schema_extra={"not": {"enum": [*METHODS_WITH_SECTIONS]}},
    )


AdapterSection = PrefixTuningPlus | Lora | PrefixTuning | Full | Peft


def canonical(method: str) -> str:
    """A method's name with hyphens, which peft writes with underscores."""
    return method.replace("_", "-")


def _tag(adapter: Any) -> str:
    """The section that an adapter is read as: one of the four methods, `peft`, or `none`."""
    if isinstance(adapter, Section):
        method = getattr(adapter, "method", None)
    elif isinstance(adapter, dict):
        method = adapter.get("method", "prefix-tuning-plus")
    else:
        method = "prefix-tuning-plus"  # its section then says what is wrong
    if method in METHODS_WITH_SECTIONS:
        return str(method)
    if not isinstance(method, str) or not METHOD_NAME.fullmatch(method) or _is_misspelled(method):
        return "none"
    return "peft"


def _is_misspelled(method: str) -> bool:
    """Whether a name is one of the four with a typo: letters swapped, or a wrong letter in a long name."""
    return any(
        sorted(method) == sorted(name)
        or (len(name) > 8 and SequenceMatcher(None, method, name).ratio() > 0.85)
        for name in METHODS_WITH_SECTIONS
    )


# The adapter of a recipe: its `method` chooses the section.
ChosenAdapter = Annotated[
    Annotated[PrefixTuningPlus, Tag("prefix-tuning-plus")]
    | Annotated[Lora, Tag("lora")]
    | Annotated[PrefixTuning, Tag("prefix-tuning")]
    | Annotated[Full, Tag("full")]
    | Annotated[Peft, Tag("peft")],
    Discriminator(_tag),
]

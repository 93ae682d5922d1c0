"""The recipe's schema: the only home of defaults, choices and descriptions.

Help shows the first clause of a setting's description, up to a semicolon (see `settings`).

A recipe is frozen once validated, and unknown keys are forbidden. `adapter` is a union, and `adapter.method` chooses
its member. `METHOD_DEFAULTS` and `OBJECTIVE_DEFAULTS` have the training defaults that depend on the method and on the
objective; `RATES` has the learning rates, which also depend on the base's width. Four methods have their own section.
Any other name is a method of peft's. This layer does not import peft, so `peft_methods` checks the name and its
settings.
"""

from __future__ import annotations

import math
import re
from difflib import SequenceMatcher
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    field_validator,
    model_validator,
)

Method = Literal["prefix-tuning-plus", "lora", "prefix-tuning", "full"]
METHODS_WITH_SECTIONS: tuple[Method, ...] = get_args(Method)
Objective = Literal["sft", "dpo", "simpo"]
DataFormat = Literal[
    "auto", "messages", "conversations", "prompt-completion", "alpaca", "question-answer", "text",
    "preference",
]  # fmt: skip

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"save_minutes": None},  # a checkpoint is six times as large as the base
}
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {
    "simpo": {
        "beta": 2.0
    },  # of mean log-probabilities, which are smaller than those of whole answers
}


class Rate(NamedTuple):
    """A default learning rate: at·(2,000 / hidden size)^power, but at most `most`.

    The power is from the tinker cookbook's fit over models of many widths (0.781 for Llama). The fit is too high for
    small bases, hence `most`. A power of 0 means one rate for all bases.
    """

    at: float
    power: float
    why: str
    most: float = math.inf

    def of(self, width: int) -> float:
        """The rate for a base of this hidden size, to two digits."""
        return float(f"{min(self.most, self.at * (2000 / width) ** self.power):.1e}")

    def times(self, factor: float, why: str) -> Rate:
        """The rate with all its numbers multiplied, for a reason."""
        return Rate(self.at * factor, self.power, why, self.most * factor)


# Chosen by sweeps, on the built-in base (hidden size 192) and on SmolLM2-135M (576): see the README.
IN_THE_BASIS = Rate(0.03, 0, "a step changes the output that M adds to by about 3 %")
WITHOUT_A_BASIS = Rate(1e-3, 0, "without a basis, one rate for outputs of any size")
RATES: dict[str, Rate] = {
    "lora": Rate(1.1e-3, 0.781, "it falls with the base's hidden size", most=3e-3),
    "prefix-tuning": Rate(3e-2, 0, "one rate for all bases"),
    "full": Rate(5e-5, 0.781, "it falls with the base's hidden size"),
    # Not swept. These methods train few small vectors, or many weights.
    "vera": Rate(1e-2, 0, "ten times LoRA's"),  # Kopiczko et al. 2024
    "prompt-tuning": Rate(3e-2, 0, "the rate of peft's example"),
    "osf": Rate(5e-5, 0.781, "the rate of full, as it trains nearly every weight"),
}
# Pairs give a gradient of whole answers, not of one token: at a rate of SFT it leaves the base far behind.
OF_SFT = 0.1
METHOD_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")  # after `_` became `-`

# The methods with trained tokens in front of every row: as keys and values of each layer, or as embeddings.
IN_THE_CACHE = frozenset({"prefix-tuning", "cartridge"})
IN_FRONT = frozenset({"prompt-tuning", "p-tuning"})


# Methods that do not go with a way of spreading a run over GPUs, and why.
NOT_SPREAD = {
    ("fsdp", "prefix-tuning"): "whose prefix peft computes outside the sharded modules",
    ("fsdp", "full"): "which trains the base, and fsdp shards it as frozen",
    ("deepspeed-zero3", "prefix-tuning"): "whose prefix peft computes outside the sharded modules",
}


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


class Section(BaseModel):
    # Strict, so that `batch_size: true` is an error instead of 1, and `"8"` is told from 8.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class ModelSection(Section):
    name: str = Field(
        "tiny",
        description="tiny, an alias of `ptp models`, a local folder, a GGUF file, or a hub id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    bits: Literal[4, 8, 16, 32] = Field(
        16,
        description="Precision of the frozen base; 4 and 8 by bitsandbytes, 16 is bfloat16, 32 is float32; for a base "
        "that is already quantized, 16 and 32 are the precision of the computation.",
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        "auto", description="Where to compute; `auto` takes the GPUs if there are any."
    )
    attention: Literal[
        "auto", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"
    ] = Field(
        "auto", description="The base's attention kernel; `auto` leaves the choice to transformers."
    )
    trust_remote_code: bool = Field(
        False, description="Run Python code from the model's repository."
    )


HELD_OUT_SHARE = 0.05  # of the rows, if neither `eval` nor `eval_split` is set


class DataSection(Section):
    train: str | None = Field(
        None, description="A file, a folder, sample:NAME, or a hub data set id."
    )
    eval: str | None = Field(None, description="Held-out data, in the same forms as `train`.")
    eval_split: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=f"Fraction of `train` to hold out if there is no `eval`; null is {HELD_OUT_SHARE}.",
    )
    format: DataFormat = Field(
        "auto", description="Format of the rows; `auto` recognises it from the columns."
    )
    map: dict[str, str] = Field(
        default_factory=dict, description="Renamed columns, as in {prompt: question}."
    )
    train_on: Literal["completion", "all"] = Field(
        "completion",
        description="Tokens with a loss; completions and assistant turns, or every token.",
    )
    max_length: int = Field(
        1024, ge=8, description="Maximum tokens per example, template included."
    )
    on_long: Literal["truncate", "drop", "error"] = Field(
        "truncate", description="What to do with longer examples."
    )
    chat_template: str | None = Field(
        None, description="A Jinja file to use in place of the tokenizer's template."
    )

    @property
    def held_out_share(self) -> float:
        """The fraction of `train` that is held out if there is no `eval`."""
        return HELD_OUT_SHARE if self.eval_split is None else self.eval_split


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


def method_defaults(method: str) -> dict[str, Any]:
    """A method's own defaults of training settings, besides its learning rate."""
    return METHOD_DEFAULTS.get(method, {})


def objective_defaults(objective: str) -> dict[str, Any]:
    """An objective's own defaults of training settings, besides its learning rate."""
    return OBJECTIVE_DEFAULTS.get(objective, {})


def default_rate(adapter: Section, objective: Objective = "sft") -> Rate:
    """The learning rate of an adapter if the recipe has none; LoRA's for a method that is not in `RATES`."""
    if isinstance(adapter, PrefixTuningPlus):
        rate = IN_THE_BASIS if adapter.basis else WITHOUT_A_BASIS
    else:
        rate = RATES.get(str(getattr(adapter, "method", "")), RATES["lora"])
    if objective != "sft":
        return rate.times(OF_SFT, f"a tenth of sft's, as {objective} compares whole answers")
    return rate


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


class TrainSection(Section):
    objective: Objective = Field(
        "sft",
        description="What is learned; sft learns answers, dpo and simpo to prefer one answer of a pair to the other "
        "(Rafailov et al. 2023, arXiv 2305.18290; Meng et al. 2024, arXiv 2405.14734).",
    )
    beta: float = Field(
        0.1,
        gt=0,
        description="How strongly DPO holds the adapter to its base, or its start (β); SimPO's factor of the mean "
        "log-probabilities, 2.0 there.",
    )
    gamma: float = Field(
        1.0, ge=0, description="By how much SimPO wants the chosen answer ahead (γ)."
    )
    start_from: str | None = Field(
        None,
        description="A run or an adapter folder whose adapter is trained on; it gives the base and the adapter's "
        "settings that are not set.",
    )
    first_tokens: int | None = Field(
        None,
        ge=1,
        description="Learn only so many answer tokens of a training row, the first ones, and leave out the rest of it "
        "(UPFT, Ji et al. 2025, arXiv 2503.02875); null learns all.",
    )
    epochs: float = Field(3.0, gt=0, description="Passes over the data; `max_steps` overrides it.")
    max_steps: int | None = Field(None, ge=1, description="Optimizer steps.")
    learning_rate: float | None = Field(
        None,
        gt=0,
        description="Peak learning rate; null is a rate for the method and the base's width, which `ptp train` prints.",
    )
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate changes during training."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Fraction of the steps for warm-up.")
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of the trained weights.")
    batch_size: int = Field(8, ge=1, description="Examples per device and forward pass.")
    gradient_accumulation: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    auto_batch: bool = Field(
        False,
        description="Halve the batch and double the accumulation until it fits into memory.",
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient clipping; 0 switches it off.")
    packing: bool = Field(
        False,
        description="Fill each row with several examples; only if the attention kernel keeps them apart.",
    )
    group_by_length: bool = Field(
        False,
        description="Make batches of rows of about the same length, in random order; saves padding if lengths differ.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass, to save memory."
    )
    optimizer: str = Field(
        "adamw_torch", description="An optimizer of transformers' TrainingArguments."
    )
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of everything random.")
    log_steps: int = Field(10, ge=1, description="Steps between two lines of metrics.jsonl.")
    eval_steps: int | None = Field(
        None, ge=1, description="Steps between two held-out losses; null is only at the end."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between two checkpoints; null is a tenth of the run."
    )
    save_minutes: float | None = Field(
        10, gt=0, description="Minutes between two checkpoints, besides the steps; null is never."
    )
    keep_checkpoints: int = Field(
        3, ge=1, description="Checkpoints to keep; older ones are deleted."
    )
    gpus: int | str | list[Annotated[int, Field(ge=0)]] | None = Field(
        None,
        description="GPUs of each machine: a number, `auto` for all, or a list; null is the first, or the CPU.",
    )
    parallel: Literal["ddp", "fsdp", "deepspeed-zero2", "deepspeed-zero3"] = Field(
        "ddp",
        description="How to use several GPUs; ddp gives each the whole base, the others shard the base or the trained "
        "weights.",
    )
    track: Literal["none", "tensorboard", "wandb", "trackio"] = Field(
        "none", description="Where else to send the metrics."
    )

    @field_validator("gpus", mode="before")
    @classmethod
    def _gpus_have_a_form(cls, value: Any) -> Any:
        number = type(value) is int and value >= 1
        listed = isinstance(value, list) and value and all(type(n) is int and n >= 0 for n in value)
        if not (value in (None, "auto") or number or (listed and len(set(value)) == len(value))):
            raise ValueError(
                f"must be a number of GPUs, auto, or a list such as [0, 2], each once, got {value!r}"
            )
        return value


class EvaluateSection(Section):
    """The evaluation on held-out data that ends a run, and the local data of `ptp eval`'s benchmarks."""

    max_rows: int = Field(500, ge=1, description="Held-out rows to score, evenly spread.")
    max_new_tokens: int = Field(
        32, ge=1, description="Answers longer than this count as long, and are not matched exactly."
    )
    answer_pattern: str | None = Field(
        None,
        description="The part of an answer that must match the reference: '#### (.*)' for worked answers; a regular "
        "expression of Python's re. Its group's first match in the answer must equal that in the reference, however "
        "long both are.",
    )
    batch_size: int = Field(32, ge=1, description="Rows per forward pass.")
    bench_data: dict[str, str] = Field(
        default_factory=dict,
        description="Local copies of benchmarks' data, as in {mmlu: /data/mmlu}, for `ptp eval`.",
    )

    @field_validator("answer_pattern")
    @classmethod
    def _pattern_finds_one_part(cls, value: str | None) -> str | None:
        if not value:
            return None
        try:
            groups = re.compile(value).groups
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(
                f"must be a regular expression of Python's re, got {value!r}: {error}"
            ) from None
        if groups > 1:
            raise ValueError(
                f"must have one group, got {groups} in {value!r}. Write the other brackets as (?:…)"
            )
        return value


class Recipe(Section):
    """Everything that a run depends on."""

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    adapter: Annotated[
        Annotated[PrefixTuningPlus, Tag("prefix-tuning-plus")]
        | Annotated[Lora, Tag("lora")]
        | Annotated[PrefixTuning, Tag("prefix-tuning")]
        | Annotated[Full, Tag("full")]
        | Annotated[Peft, Tag("peft")],
        Discriminator(_tag),
    ] = Field(default_factory=PrefixTuningPlus)
    train: TrainSection = Field(default_factory=TrainSection)
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection)
    out: str | None = Field(
        None, description="The run directory; null is runs/<model>-<data>-<method>."
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in_what_depends_on_method_and_objective(cls, raw: Any) -> Any:
        if not isinstance(raw, dict):
            return raw
        raw = dict(raw)
        adapter = raw.get("adapter")
        if isinstance(adapter, dict) and "method" not in adapter:
            raw["adapter"] = adapter = {"method": "prefix-tuning-plus", **adapter}
        if isinstance(adapter, dict) and isinstance(adapter["method"], str):
            raw["adapter"] = adapter = {**adapter, "method": canonical(adapter["method"])}
        method = adapter.get("method") if isinstance(adapter, dict) else "prefix-tuning-plus"
        train = raw.get("train", {})
        if isinstance(train, dict) and isinstance(method, str):
            own = objective_defaults(str(train.get("objective")))
            raw["train"] = {**method_defaults(method), **own, **train}
        return raw

    @model_validator(mode="after")
    def _the_objective_goes_with_the_rest(self) -> Recipe:
        train = self.train
        if train.first_tokens is not None and (self.on_pairs or self.data.train_on == "all"):
            other = f"train.objective {train.objective}" if self.on_pairs else "data.train_on all"
            raise ValueError(
                f"train.first_tokens counts tokens of answers, and does not go with {other}. Leave out one of the two."
            )
        for name, objectives in (("beta", ("dpo", "simpo")), ("gamma", ("simpo",))):
            chosen = getattr(train, name) != TrainSection.model_fields[name].default
            if chosen and train.objective not in objectives:
                raise ValueError(
                    f"train.{name} belongs to objective {' and '.join(objectives)}. Leave it out, or type --objective "
                    f"{objectives[0]}."
                )
        if not self.on_pairs:
            return self
        objective = train.objective
        if self.adapter.method == "full":
            raise ValueError(
                f"train.objective {objective} does not go with method full, which changes the base that its answers "
                "are compared with. Use another method."
            )
        if train.packing:
            raise ValueError(
                f"train.packing does not go with objective {objective}, which compares whole answers, each in a row "
                "of its own. Type --no-packing."
            )
        if train.parallel != "ddp":
            raise ValueError(
                f"train.parallel {train.parallel} does not go with objective {objective} yet. Type --parallel ddp."
            )
        settings = self.adapter.model_dump()
        for name, value in {**settings, **(settings.get("config") or {})}.items():
            if name.endswith("dropout") and value and objective == "dpo":
                raise ValueError(
                    f"{name} does not go with objective dpo, whose reference has no noise. Leave it out."
                )
        if self.data.train_on == "all":
            raise ValueError(
                f"data.train_on all does not go with objective {objective}, which compares answers alone. Leave it out."
            )
        return self

    @model_validator(mode="after")
    def _an_adapter_goes_on(self) -> Recipe:
        if self.train.start_from is not None and self.adapter.method == "full":
            raise ValueError(
                "train.start_from (--from) does not go with method full, which trains no adapter. Leave one of the "
                "two out."
            )
        return self

    @model_validator(mode="after")
    def _prefix_tuning_takes_no_shortcuts(self) -> Recipe:
        method = self.adapter.method
        for key in ("packing", "gradient_checkpointing"):
            if method in IN_THE_CACHE:
                why = "whose prefix lies in the key/value cache"
            elif method in IN_FRONT and key == "packing":
                why = "whose trained tokens stand in front of a row, not of each example"
            else:
                continue
            if getattr(self.train, key):
                raise ValueError(
                    f"train.{key} does not go with method {method}, {why}. "
                    f"Type --no-{key.replace('_', '-')}, or use another method."
                )
        return self

    @model_validator(mode="after")
    def _packed_rows_have_one_length(self) -> Recipe:
        if self.train.packing and self.train.group_by_length:
            raise ValueError(
                "train.group_by_length does not go with train.packing, whose rows are all filled to the same length. "
                "Type --no-packing, or --set train.group_by_length=false."
            )
        return self

    @model_validator(mode="after")
    def _the_method_can_be_spread(self) -> Recipe:
        why = NOT_SPREAD.get((self.train.parallel, self.adapter.method))
        if self.train.parallel in ("fsdp", "deepspeed-zero3") and (
            isinstance(self.adapter, Peft)
            or (isinstance(self.adapter, Lora) and self.adapter.config.get("use_dora"))
        ):
            why = "which may read the base's weights, and each process has only a part of them"
        if why:
            instead = " or deepspeed-zero3" if self.adapter.method == "full" else ""
            raise ValueError(
                f"train.parallel {self.train.parallel} does not go with method {self.adapter.method}, {why}. "
                f"Use --parallel ddp{instead}, or another method."
            )
        return self

    @model_validator(mode="after")
    def _full_needs_full_precision(self) -> Recipe:
        if self.adapter.method == "full" and self.model.bits in (4, 8):
            raise ValueError(
                f"model.bits {self.model.bits} cannot be trained by method full: quantized weights have no gradient. "
                "Use --bits 16, or another method."
            )
        return self

    def with_learning_rate(self, width: int) -> Recipe:
        """The recipe; if it has no learning rate, with the default for a base of this hidden size."""
        if self.train.learning_rate is not None:
            return self
        rate = default_rate(self.adapter, self.train.objective).of(width)
        return self.model_copy(
            update={"train": self.train.model_copy(update={"learning_rate": rate})}
        )

    @property
    def names_base(self) -> bool:
        """Whether a base was chosen. Sample data chooses the built-in base, for which it was made."""
        chosen = "name" in self.model.model_fields_set
        return chosen or (self.data.train or "").startswith("sample:")

    @property
    def on_pairs(self) -> bool:
        """Whether the training rows are pairs of answers."""
        return self.train.objective != "sft"

    @property
    def data_of_answers(self) -> DataSection:
        """How rows with one answer are read: as `data`, but for the columns and the format of pairs."""
        if not self.on_pairs:
            return self.data
        shared = {k: v for k, v in self.data.map.items() if k not in ("chosen", "rejected")}
        return self.data.model_copy(update={"map": shared, "format": "auto"})

    @property
    def folder(self) -> str:
        """The run directory."""
        return self.out or str(Path("runs") / self.run_name)

    @property
    def run_name(self) -> str:
        """The run directory's default name: model, data, method and objective but sft, as a file name."""
        data = Path(self.data.train or "data").stem.replace("sample:", "")
        model = re.sub(r"\.gguf$", "", self.model.name.rstrip("/").split("/")[-1])
        objective = () if self.train.objective == "sft" else (self.train.objective,)
        parts = (model, data, self.adapter.method, *objective)
        return re.sub(r"[^\w.-]+", "-", "-".join(parts)).strip("-")

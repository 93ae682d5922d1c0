"""A whole recipe, and what does not go together in it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, model_validator

from prefixtune_cli.recipe.schema.adapters import (
    IN_FRONT,
    IN_THE_CACHE,
    ChosenAdapter,
    Lora,
    Peft,
    PrefixTuningPlus,
    canonical,
)
from prefixtune_cli.recipe.schema.rates import default_rate
from prefixtune_cli.recipe.schema.section import Section
from prefixtune_cli.recipe.schema.sections import (
    DataSection,
    EvaluateSection,
    Kind,
    ModelSection,
    Objective,
    TrainSection,
)

METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "full": {"save_minutes": None},  # a checkpoint is six times as large as the base
}
# Their losses compare the adapter with what it was before training.
WITH_REFERENCE = ("dpo", "kto")
# The settings that one objective alone has.
OWN_SETTINGS: dict[str, tuple[str, ...]] = {
    "simpo": ("gamma",),
    "kto": ("desirable_weight", "undesirable_weight"),
}
# SimPO's β multiplies log-probabilities per token, which are smaller than those of answers.
OBJECTIVE_DEFAULTS: dict[str, dict[str, Any]] = {"simpo": {"beta": 2.0}}

# Methods that do not go with a way of spreading a run over GPUs, and why.
NOT_SPREAD = {
    ("fsdp", "prefix-tuning"): "whose prefix peft computes outside the sharded modules",
    ("fsdp", "full"): "which trains the base, and fsdp shards it as frozen",
    ("deepspeed-zero3", "prefix-tuning"): "whose prefix peft computes outside the sharded modules",
}


def kind_of(objective: str | None) -> Kind:
    """The kind of rows that an objective learns from; None is that of no preferences."""
    kinds: dict[str | None, Kind] = {None: "answers", "sft": "answers", "kto": "labelled"}
    return kinds.get(objective, "pairs")


def method_defaults(method: str) -> dict[str, Any]:
    """A method's own defaults of training settings, besides its learning rate."""
    return METHOD_DEFAULTS.get(method, {})


def objective_defaults(objective: str) -> dict[str, Any]:
    """An objective's own defaults of training settings, besides its learning rate."""
    return OBJECTIVE_DEFAULTS.get(objective, {})


class Recipe(Section):
    """Everything that a run depends on."""

    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    adapter: ChosenAdapter = Field(default_factory=PrefixTuningPlus)
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
        if train.first_tokens is not None and (self.on_preferences or self.data.train_on == "all"):
            other = (
                f"train.objective {train.objective}" if self.on_preferences else "data.train_on all"
            )
            raise ValueError(
                f"train.first_tokens counts tokens of answers, and does not go with {other}. Leave out one of the two."
            )
        owners = {name: [o] for o, names in OWN_SETTINGS.items() for name in names}
        owners["beta"] = [o for o in get_args(Objective) if o != "sft"]
        for name, objectives in owners.items():
            chosen = getattr(train, name) != TrainSection.model_fields[name].default
            if chosen and train.objective not in objectives:
                raise ValueError(
                    f"train.{name} belongs to objective {', '.join(objectives)}. Leave it out, or type --objective "
                    f"{objectives[0]}."
                )
        if train.batch_size < self.least_batch:
            raise ValueError(
                "train.batch_size 1 does not go with objective kto, which estimates from a batch how far the adapter "
                "is from its reference. Type --batch-size 2 or more."
            )
        if not self.on_preferences:
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
            if name.endswith("dropout") and value and objective in WITH_REFERENCE:
                raise ValueError(
                    f"{name} does not go with objective {objective}, whose reference has no noise. Leave it out."
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
    def kind(self) -> Kind:
        """What the training rows are."""
        return kind_of(self.train.objective)

    @property
    def least_batch(self) -> int:
        """The fewest examples of a forward pass."""
        return 2 if self.train.objective == "kto" else 1

    @property
    def on_preferences(self) -> bool:
        """Whether the training rows say which answers are better than others."""
        return self.kind != "answers"

    @property
    def data_of_answers(self) -> DataSection:
        """How rows with one answer are read: as `data`, but for the columns and the format of preferences."""
        if not self.on_preferences:
            return self.data
        shared = {
            k: v for k, v in self.data.map.items() if k not in ("chosen", "rejected", "label")
        }
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

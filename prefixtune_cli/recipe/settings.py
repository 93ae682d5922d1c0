"""What the schema says about one setting, for help and completion: what it does, its type, default and values."""

from __future__ import annotations

import re
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefixtune_cli.recipe.aliases import ALIASES
from prefixtune_cli.recipe.explain import METHODS
from prefixtune_cli.recipe.load import shipped
from prefixtune_cli.recipe.schema import Lora, PrefixTuning, PrefixTuningPlus, Recipe

OF_PEFT = ("ia3", "boft", "vera")  # the best-known of the many other methods
TITLES = {PrefixTuningPlus: "Prefix-Tuning+", Lora: "LoRA", PrefixTuning: "Prefix-Tuning"}


def told(key: str) -> str:
    """What a setting does, in one line: the first clause of its description, with its named values.

    Args:
        key: dotted. For a key of `adapter`, the line begins with the first method that has it.
    """
    clause = (_field(key).description or "").partition(";")[0].rstrip(".")
    *most, last = _choices(key) or [""]
    listed = f": {', '.join(most)} or {last}" if most else ""
    title = TITLES.get(_section(key))
    return f"{title}: {clause[:1].lower()}{clause[1:]}{listed}." if title else f"{clause}{listed}."


def kind(key: str) -> Any:
    """The type that is typed for a setting: text if it has several types, a list of texts for a mapping."""
    annotation = _field(key).annotation
    union = get_origin(annotation) in (Union, UnionType)
    members = [
        one for one in (get_args(annotation) if union else [annotation]) if one is not NoneType
    ]
    if len(members) > 1:
        return str
    if get_origin(members[0]) is Literal:
        return type(get_args(members[0])[0])
    return list[str] if get_origin(members[0]) is dict else members[0]


def default(key: str) -> str:
    """The default of a setting in a user's words; empty if it has none.

    Args:
        key: dotted, as in train.batch_size. A key of `adapter` is that of the first method that has it.
    """
    field = _field(key)
    value: Any = field.get_default(call_default_factory=True)
    if value is None:  # the description says what null stands for
        told = re.search(r"\bnull (?:is )?([^;]+?)\.?$", field.description or "")
        return told[1] if told else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else ""


def values(key: str) -> list[str]:
    """The named values that a setting takes; empty if there are none.

    Args:
        key: dotted, or `recipe`.
    """
    if key == "recipe":
        return list(shipped())
    if key == "model.name":
        return ["tiny", *ALIASES]
    if key == "adapter.method":
        return [*METHODS, *OF_PEFT]
    return _choices(key)


def _choices(key: str) -> list[str]:
    annotation = _field(key).annotation
    members = [inner for part in get_args(annotation) for inner in (get_args(part) or (part,))]
    return [str(member) for member in members if isinstance(member, str | int)]


def _section(key: str) -> type[BaseModel]:
    """The model that has a setting; for a key of `adapter`, the model of the first method that has it."""
    section, _, name = key.rpartition(".")
    if not section:
        return Recipe
    if section == "adapter":
        return next(model for model in METHODS.values() if name in model.model_fields)
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model


def _field(key: str) -> FieldInfo:
    return _section(key).model_fields[key.rpartition(".")[2]]

"""What the schema says of one setting, for those who type it: its default, and the values that it takes."""

from __future__ import annotations

import re
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from prefixtune_cli.recipe.aliases import ALIASES
from prefixtune_cli.recipe.explain import METHODS
from prefixtune_cli.recipe.load import shipped
from prefixtune_cli.recipe.schema import Recipe

OF_PEFT = ("ia3", "boft", "vera")  # of the many other methods, those that people look for


def default(key: str) -> str:
    """The default of a setting as a user says it; empty where it has none.

    Args:
        key: dotted, as in train.batch_size; one of `adapter` is that of the first method that has it.
    """
    field = _field(key)
    value: Any = field.get_default(call_default_factory=True)
    if value is None:  # what it stands for, the description tells
        told = re.search(r"\bnull (?:is )?([^;]+?)\.?$", field.description or "")
        return told[1] if told else ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) if isinstance(value, str | int) else ""


def values(key: str) -> list[str]:
    """The values that a setting takes, or those that have names; none where any value goes.

    Args:
        key: dotted, or `recipe`.
    """
    if key == "recipe":
        return list(shipped())
    if key == "model.name":
        return ["tiny", *ALIASES]
    if key == "adapter.method":
        return [*METHODS, *OF_PEFT]
    annotation = _field(key).annotation
    members = [inner for part in get_args(annotation) for inner in (get_args(part) or (part,))]
    return [str(member) for member in members if isinstance(member, str | int)]


def _field(key: str) -> FieldInfo:
    section, _, name = key.rpartition(".")
    if not section:
        return Recipe.model_fields[name]
    if section == "adapter":
        return next(m.model_fields[name] for m in METHODS.values() if name in m.model_fields)
    model = Recipe.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, BaseModel)
    return model.model_fields[name]

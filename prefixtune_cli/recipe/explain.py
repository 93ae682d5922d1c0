"""Pydantic's errors about a recipe, in plain words.

Pydantic says `Input should be 'elu', 'gelu' or 'mlp'`, at ('adapter', 'prefix-tuning-plus',
'feature_map'). The user, who wrote `adapter.feature_map: relu`, reads: "adapter.feature_map must be
elu, gelu or mlp, got 'relu'. Did you mean 'elu'?"
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import get_close_matches

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from prefixtune_cli.recipe.foreign import in_a_recipe
from prefixtune_cli.recipe.schema import (
    Full,
    Lora,
    Peft,
    PrefixTuning,
    PrefixTuningPlus,
    Recipe,
)

METHODS: dict[str, type[BaseModel]] = {
    section.model_fields["method"].default: section
    for section in (PrefixTuningPlus, Lora, PrefixTuning, Full)
}
# The sections that `adapter` can be: one of these four, or `peft`.
SECTIONS: dict[str, type[BaseModel]] = {**METHODS, "peft": Peft}
EXPECTED = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping such as {{prompt: question}}",
    "model_type": "a section, with keys under it",
    "model_attributes_type": "a section, with keys under it",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "{ge:g} or more",
    "less_than": "less than {lt:g}",
    "less_than_equal": "{le:g} or less",
}
UNION_MEMBERS = {"str": "text", "list[str]": "a list of text"}


def explain(error: ValidationError) -> list[tuple[str, str]]:
    """The problems of a recipe, one for each key.

    Returns:
        pairs of a dotted key that is wrong and a sentence about it.
    """
    told: dict[str, str] = {}
    unions: dict[str, list[str]] = {}
    for found in error.errors():
        method, loc = _without_the_tag(found["loc"])
        path, member = _field(loc)
        if member is None:
            path, sentence = _sentence(found, path, method)
            told.setdefault(path, sentence)
        else:  # one member of a union such as `str | list[str]`: every member complains
            unions.setdefault(path, []).append(UNION_MEMBERS[member])
            expected = " or ".join(dict.fromkeys(unions[path]))
            got = told[path].rpartition(", got ")[2] if path in told else show(found["input"])
            told[path] = f"{path} must be {expected}, got {got}"
    return list(told.items())


def unknown_key(path: str, method: str) -> str:
    """The sentence about a key that the schema does not have."""
    section, _, last = path.rpartition(".")
    if section == "adapter":
        owners = [name for name, model in METHODS.items() if last in model.model_fields]
        if method == "peft" and owners != ["prefix-tuning-plus"]:
            return (
                f"{path} is not a setting. Settings of peft's methods belong under adapter.config"
            )
        if method == "peft":
            method = "another one"
        if owners:
            return f"{path} belongs to {' and '.join(owners)}, but adapter.method is {method}"
    if told := in_a_recipe(path):
        return told
    near = _nearest_key(path, method)
    hint = f"Did you mean {near}?" if near else "`ptp recipe-schema` lists all settings."
    return f"{path} is not a setting. {hint}"


def keys(method: str) -> list[str]:
    """Every dotted key of a recipe for this method, sections included."""
    return list(_keys(Recipe, "", SECTIONS.get(method, PrefixTuningPlus)))


def show(value: object) -> str:
    """A value as a recipe spells it, cut if it is long."""
    names: dict[object, str] = {None: "nothing (null)", True: "true", False: "false"}
    text = names[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _keys(model: type[BaseModel], above: str, adapter: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield above + name
        section = adapter if name == "adapter" else field.annotation
        if isinstance(section, type) and issubclass(section, BaseModel):
            yield from _keys(section, f"{above}{name}.", adapter)


def _nearest_key(path: str, method: str) -> str | None:
    known = keys(method)
    section, _, last = path.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == section}
    elsewhere = {key.rpartition(".")[2]: key for key in known}
    if near := get_close_matches(last, siblings, n=1, cutoff=0.7):
        return siblings[near[0]]
    if near := get_close_matches(last, elsewhere, n=1, cutoff=0.8):
        return elsewhere[near[0]]
    return next(iter(get_close_matches(path, known, n=1)), None)


def _without_the_tag(loc: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]]:
    """The method, and the location without it: pydantic puts the union's member into the location."""
    if loc[:1] == ("adapter",) and len(loc) > 1 and loc[1] in SECTIONS:
        return str(loc[1]), ("adapter", *loc[2:])
    return "prefix-tuning-plus", loc


def _field(loc: tuple[int | str, ...]) -> tuple[str, str | None]:
    """A location's dotted key and, if the field is a union of types, the member that complains."""
    if len(loc) > 2 and loc[:2] not in (("data", "map"), ("adapter", "config")):
        return ".".join(map(str, loc[:2])), str(loc[2])
    return ".".join(map(str, loc)), None


def _sentence(found: ErrorDetails, path: str, method: str) -> tuple[str, str]:
    kind, context = found["type"], found.get("ctx", {})
    if kind == "extra_forbidden":
        return path, unknown_key(path, method)
    if kind == "value_error":
        reason = str(context["error"])
        if reason.startswith("must "):  # from a field; a section's validator names its keys itself
            return path, f"{path} {reason}"
        return reason.split(" ")[0], reason
    if kind == "union_tag_invalid":
        path, value = f"{path}.method", found["input"]["method"]
        choices = list(METHODS)
        expected = f"{', '.join(choices)} or another method of peft's, such as ia3"
    elif kind == "literal_error":
        value, choices = found["input"], re.findall(r"'([^']*)'", context["expected"])
        expected = context["expected"].replace("'", "")
    else:
        value, choices = found["input"], list[str]()
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else found["msg"]
    if path == "adapter" and isinstance(value, str):  # as in Axolotl
        method = value.replace("qlora", "lora")  # its 4 bits are the base's: model.bits
        expected += f", as in `adapter: {{method: {method}}}`"
    near = get_close_matches(str(value), choices, n=1, cutoff=0.5)
    hint = f". Did you mean {near[0]!r}?" if near else ""
    return path, f"{path} must be {expected}, got {show(value)}{hint}"

"""YAML to plain values, with the line of every key.

PyYAML reads YAML 1.1, in which `1e-4` is a string, `no` is false and `12:30` a number. Recipes use the
scalars of YAML 1.2, without these surprises. A duplicate key, which PyYAML accepts, is an error here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import yaml

from prefixtune_cli.errors import RecipeError

FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?$"  # 0.1, .5, 2.5e-3
    r"|[-+]?[0-9]+[eE][-+]?[0-9]+$"  # 1e-4
    r"|[-+]?\.inf$|\.nan$"
)
SCALARS = (
    ("tag:yaml.org,2002:null", re.compile(r"(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789")),
    ("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789")),
)


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes whatever either version of YAML would take for something other than a string."""


for _tag, _pattern, _first in SCALARS:
    _Loader.add_implicit_resolver(_tag, _pattern, _first)
    _Dumper.add_implicit_resolver(_tag, _pattern, _first)


@dataclass(frozen=True)
class Parsed:
    """A recipe's values, and the line (from 1) of each dotted key."""

    values: dict[str, Any]
    lines: dict[str, int]


def together(problems: Iterable[str]) -> RecipeError:
    """All problems as one error, one per line."""
    lines = list(problems)
    if len(lines) == 1:
        return RecipeError(lines[0])
    return RecipeError("\n  ".join([f"{len(lines)} problems:", *lines]))


def parse(text: str, name: str) -> Parsed:
    """Read a recipe's text.

    Args:
        text: YAML, a mapping at its top.
        name: the file's name, as errors show it.

    Raises:
        RecipeError: it is not YAML, not a mapping, or has a key twice.
    """
    loader = _loader(text, name)
    try:
        node = loader.get_single_node()
        if node is None:
            return Parsed({}, {})
        if not isinstance(node, yaml.MappingNode):
            raise RecipeError(f"{name} must hold sections such as `train:`, got {_kind(node)}.")
        lines: dict[str, int] = {}
        twice: list[str] = []
        values = _mapping(loader, node, "", lines, twice)
    except yaml.MarkedYAMLError as error:
        raise RecipeError(_told(error, name, text)) from None
    except (yaml.YAMLError, ValueError) as error:
        raise RecipeError(f"{name} cannot be read as YAML: {error}") from None
    except RecursionError:
        raise RecipeError(f"{name} has an alias (*) inside its own anchor (&).") from None
    finally:
        loader.dispose()
    if twice:
        raise together(f"{name}:{problem}" for problem in twice)
    return Parsed(values, lines)


def parse_value(text: str, name: str) -> Any:
    """Read one value as YAML: `3`, `1e-4`, `true`, `[0, 1]`, or plain text.

    Raises:
        RecipeError: it is not YAML.
    """
    loader = _loader(text, name)
    try:
        return loader.get_single_data()
    except (yaml.YAMLError, ValueError) as error:
        problem = getattr(error, "problem", None) or error
        raise RecipeError(
            f"{name}: {text!r} cannot be read as a YAML value: {problem}. Quote it."
        ) from None
    finally:
        loader.dispose()


def write(values: dict[str, Any]) -> str:
    """Values as YAML, in their order, that `parse` reads back unchanged."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def _loader(text: str, name: str) -> _Loader:
    try:
        return _Loader(text)
    except yaml.YAMLError as error:  # a character that YAML forbids
        raise RecipeError(f"{name} cannot be read as YAML: {error}") from None


def _mapping(
    loader: _Loader, node: yaml.MappingNode, above: str, lines: dict[str, int], twice: list[str]
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(problem="a key must be text", problem_mark=key.start_mark)
        path = f"{above}{key.value}"
        if key.value in values:
            twice.append(f"{line}: {path} occurs twice; the first is on line {lines[path]}")
            continue
        lines[path] = line
        if isinstance(value, yaml.MappingNode):
            values[key.value] = _mapping(loader, value, f"{path}.", lines, twice)
        else:
            values[key.value] = loader.construct_document(value)
    return values


def _kind(node: yaml.Node) -> str:
    return "a list" if isinstance(node, yaml.SequenceNode) else f"only {node.value!r}"


def _told(error: yaml.MarkedYAMLError, name: str, text: str) -> str:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return f"{name} cannot be read as YAML: {error.problem}"
    row = text.split("\n")[mark.line]
    if "\t" in row[: len(row) - len(row.lstrip())]:
        return f"{name}:{mark.line + 1}: the line is indented by a tab; YAML takes spaces only."
    return f"{name}:{mark.line + 1}: this is not YAML: {error.problem}. The line is {row.strip()!r}"

"""A recipe's file, `--set` and flags become a `Recipe`, and a `Recipe` becomes YAML.

A flag wins over `--set`, which wins over the recipe, which wins over the schema's default. One `RecipeError`
lists everything that is wrong with the result, with file and line for values from a file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import prefixtune_cli
from prefixtune_cli.errors import RecipeError
from prefixtune_cli.recipe import read
from prefixtune_cli.recipe.explain import explain, keys
from prefixtune_cli.recipe.schema import (
    OWN_SETTINGS,
    PrefixTuningPlus,
    Recipe,
    TrainSection,
    canonical,
    method_defaults,
)

DEFAULT_METHOD = PrefixTuningPlus().method


def resolve(
    recipe: str | None = None,
    sets: Sequence[str] = (),
    flags: Mapping[str, Any] | None = None,
    of_start: Callable[[str, Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> Recipe:
    """The recipe that a command runs by.

    If flags or `--set` choose another method than the recipe's, the recipe's `adapter` section, its learning rate,
    and training settings that are the old method's defaults are left out, because they belong to the old method.
    Other replaced settings take their companions with them, see `_without_what_is_replaced`.

    Args:
        recipe: a YAML file, or the name of a shipped recipe; None means only the defaults.
        sets: `section.key=value` each, the value in YAML.
        flags: nested overrides, as in {"train": {"batch_size": 4}}.
        of_start: gives the settings that `train.start_from` brings with it, from its value and all values. The recipe
            wins over them. None lets it bring none.

    Raises:
        RecipeError: the recipe cannot be found or read, or a value is wrong.
    """
    file, parsed = _read(recipe)
    chosen = _merge(_parse_sets(sets), flags or {})
    values = _over(parsed.values, chosen)
    train = values.get("train")
    start = train.get("start_from") if isinstance(train, Mapping) else None
    if of_start is not None and isinstance(start, str):
        values = _over(of_start(start, values), values)
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        overridden = {path for path, _ in _flatten(chosen)}
        lines = {key: line for key, line in parsed.lines.items() if key not in overridden}
        found = sorted(explain(error), key=lambda pair: lines.get(pair[0], 0))
        problems = [f"{file}:{lines[k]}: {told}" if k in lines else told for k, told in found]
    raise read.together(problems)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML, every default written out; `resolve` reads it back as an equal recipe."""
    return read.write(recipe.model_dump())


def difference(a: Recipe, b: Recipe) -> list[str]:
    """The settings in which two recipes differ, as in `train.learning_rate: 0.01 → 0.02`."""
    before, after = dict(_flatten(a.model_dump())), dict(_flatten(b.model_dump()))
    return [
        f"{key}: {_spelled(before, key)} → {_spelled(after, key)}"
        for key in dict.fromkeys([*before, *after])
        if key not in before or key not in after or before[key] != after[key]
    ]


def shipped() -> dict[str, Path]:
    """The recipes that come with ptp, by name: from the wheel, or from a source tree's top level."""
    package = Path(prefixtune_cli.__file__).parent
    in_wheel, in_source = package / "recipes", package.parent / "recipes"
    folder = in_wheel if in_wheel.is_dir() or not _is_source_tree(package.parent) else in_source
    found = sorted(folder.glob("*.yaml"))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in found}


def summary(text: str) -> str:
    """What a recipe says about itself: its first line, if that is a comment."""
    first = text.split("\n", 1)[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def find(recipe: str) -> Path:
    """The file of a recipe, given by its path or by the name of a shipped recipe.

    Raises:
        RecipeError: there is none.
    """
    path, known = Path(recipe).expanduser(), shipped()
    if path.is_file():
        return path
    if recipe in known:
        return known[recipe]
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f" Type {inside}" if inside.is_file() else " Type the YAML file in it"
        raise RecipeError(f"The recipe {recipe} is a folder.{hint}.")
    near = get_close_matches(path.stem, known, n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"There is no recipe {recipe}: no such file, and the shipped ones are {', '.join(known)}. {hint}".strip()
    )


def _is_source_tree(folder: Path) -> bool:
    return (folder / "pyproject.toml").is_file()


def _read(recipe: str | None) -> tuple[str, read.Parsed]:
    if recipe is None:
        return "", read.Parsed({}, {})
    path = find(recipe)
    name = recipe if path == Path(recipe) else path.name
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe {path} cannot be read: {error}") from None
    parsed = read.parse(text, name)
    # A section whose keys are all commented out is null in YAML.
    values = {
        key: {} if value is None and key in Recipe.model_fields and key != "out" else value
        for key, value in parsed.values.items()
    }
    return name, read.Parsed(values, parsed.lines)


def _parse_sets(sets: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    problems = []
    for given in sets:
        key, equals, text = given.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            near = get_close_matches(key.strip(), keys(DEFAULT_METHOD), n=1)
            example = near[0] if near else "train.batch_size"
            problems.append(f"--set takes section.key=value, as in {example}=…, got {given!r}")
            continue
        try:
            nested = read.parse_value(text, f"--set {key}")
        except RecipeError as error:
            problems.append(str(error))
            continue
        for part in reversed(parts):
            nested = {part: nested}
        values = _merge(values, nested)
    if problems:
        raise read.together(problems)
    return values


def _over(below: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `below` with those of `chosen`, which win, and without what does not go with them."""
    kept = _without_another_methods_settings(below, chosen)
    return _merge(_without_what_is_replaced(kept, chosen), chosen)


def _without_another_methods_settings(
    values: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    old, new = _method(values) or DEFAULT_METHOD, _method(chosen)
    if new is None or new == old:
        return dict(values)
    kept = {key: value for key, value in values.items() if key != "adapter"}
    if isinstance(train := kept.get("train"), Mapping):
        defaults = method_defaults(old)  # a learning rate is a method's own
        kept["train"] = {
            k: v
            for k, v in train.items()
            if k != "learning_rate" and (k not in defaults or v != defaults[k])
        }
    return kept


def _without_what_is_replaced(
    values: Mapping[str, Any], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """The values without settings that belong to something that `chosen` replaces.

    The recipe's held-out data, columns and format belong to its own training data. Its number of steps would win over
    the epochs that were asked for. A preset replaces all settings of the adapter. A learning rate is an objective's
    own, and so are beta and what `OWN_SETTINGS` has if the recipe names one.
    """
    data, train = chosen.get("data") or {}, chosen.get("train") or {}
    adapter = chosen.get("adapter") or {}
    replaced: dict[str, set[str]] = {"data": set(), "train": set(), "adapter": set()}
    if isinstance(adapter, Mapping) and adapter.get("preset") is not None:
        replaced["adapter"] |= {*PrefixTuningPlus.model_fields} - {"method"}
    if isinstance(data, Mapping) and "train" in data:
        replaced["data"] |= {"eval", "eval_split", "map", "format"}
    if isinstance(data, Mapping) and "eval_split" in data:
        replaced["data"] |= {"eval"}
    if isinstance(train, Mapping) and "epochs" in train:
        replaced["train"] |= {"max_steps"}
    if isinstance(train, Mapping) and train.get("objective", was := _objective(values)) != was:
        replaced["train"] |= {"learning_rate"}
        if isinstance(values.get("train"), Mapping) and "objective" in values["train"]:
            replaced["train"] |= {"beta", *(name for own in OWN_SETTINGS.values() for name in own)}
    return {
        key: {k: v for k, v in value.items() if k not in replaced.get(key, set())}
        if isinstance(value, Mapping)
        else value
        for key, value in values.items()
    }


def _objective(values: Mapping[str, Any]) -> Any:
    train = values.get("train")
    default = TrainSection.model_fields["objective"].default
    return train.get("objective", default) if isinstance(train, Mapping) else default


def _method(values: Mapping[str, Any]) -> str | None:
    adapter = values.get("adapter")
    method = adapter.get("method") if isinstance(adapter, Mapping) else None
    return canonical(method) if isinstance(method, str) else None


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, Mapping) and isinstance(value, Mapping):
            merged[key] = _merge(under, value)
        else:
            merged[key] = value
    return merged


def _flatten(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _spelled(values: Mapping[str, Any], key: str) -> str:
    value = values.get(key, "(none)")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

"""Who takes part in a comparison, and under which conditions: from what was typed to recipes. Loads nothing.

Every method is trained from the same recipe but for its own settings: the same rows in the same order, the same batch,
the same number of optimizer steps; and each gets a sweep of as many learning rates around its own default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import UsageError
from prefixtune_cli.recipe import load, read
from prefixtune_cli.recipe.explain import METHODS
from prefixtune_cli.recipe.schema import Peft, Recipe, canonical

DEFAULT_METHODS = ("prefix-tuning-plus", "lora", "prefix-tuning", "full")
STEP = 10**0.5  # between two learning rates of a sweep
# A cell is a run of one process, and nobody goes back in it.
NEVER = 10**9  # steps
OF_A_CELL = {"gpus": None, "parallel": "ddp", "track": "none", "keep_checkpoints": 1}
# What is the same for all contestants, or what a comparison sets itself, and what to type instead.
NO_GRID = {
    "train.seed": "--seeds sets it",
    "train.gpus": "--workers sets it",
    "train.parallel": "a cell is one process",
    "train.track": "a comparison has its own report",
    "out": "--out sets it",
    "model": "compare runs on several bases one by one",
    "data": "compare on several data sets one by one, or with --ood",
    "evaluate": "all contestants are judged alike",
}
# What a cost depends on beside the adapter: a grid may vary it where costs alone are measured.
OF_A_COST = (
    "model.name",
    "model.bits",
    "model.attention",
    "data.max_length",
    "train.batch_size",
    "train.gradient_checkpointing",
    "train.optimizer",
)


@dataclass(frozen=True)
class Entry:
    """One contestant before it has run.

    Attributes:
        label: tells it from the others.
        settings: by dotted recipe key, what tells it from its method as typed.
        recipe: without seed, learning rate and run directory of a cell.
    """

    label: str
    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def method(self) -> str:
        return self.recipe.adapter.method

    @property
    def folder(self) -> str:
        """Its name as a file name."""
        name = re.sub(r"[^\w.+=-]+", "-", self.label).strip("-")
        plain = name == self.label.replace(" ", "-") and len(name) < 100
        return (
            name if plain else f"{name[:90]}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"
        )

    def learning_rates(self, count: int) -> list[float]:
        """`count` rates around its own, a factor of √10 apart, two digits each; its own is among them."""
        own = self.recipe.train.learning_rate
        assert own is not None, "given by with_learning_rate"
        exponents = range(-((count - 1) // 2), count // 2 + 1)
        return [own if e == 0 else float(f"{own * STEP**e:.1e}") for e in exponents]

    def cell(self, seed: int, learning_rate: float, out: str, data: Mapping[str, str]) -> Recipe:
        """The recipe of one run on the files of `data`: `train` and `eval`."""
        section = self.recipe.data.model_copy(
            update={**data, "eval_split": None, "map": {}, "format": "auto"}
        )
        train = self.recipe.train.model_copy(
            update={"seed": seed, "learning_rate": learning_rate, **OF_A_CELL}
        )
        if train.save_steps is None:  # the clock is enough: a cell that is stopped is saved besides
            train = train.model_copy(update={"save_steps": NEVER, "save_minutes": 10.0})
        return self.recipe.model_copy(update={"data": section, "train": train, "out": out})


@dataclass(frozen=True)
class Typed:
    """What was typed of a recipe: the recipe, `--set`, and flags, nested as a recipe is."""

    recipe: str | None = None
    sets: Sequence[str] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        typed: the recipe, `--set` and flags, which all methods share.
        methods: the others are compared with the first; `lora(r=8)` is one with settings of its own.
        grids: dotted recipe key → values; every combination is a contestant.
        seeds: cells of each contestant: train.seed and those after it.
        sweep: learning rates of each contestant, on the first seed; 1 is the default alone.
        few_shot: training examples a class, others for each seed; None takes all rows.
        ood: data of another distribution, to test on.
        text: text that has nothing to do with the task, to measure forgetting on.
        speed: measure what a contestant costs, in so many `rounds`, at `prompts` prompts of `prompt_tokens`, with
            `adapters` of its kind active at once.
        out: folder of the comparison; None is compare/<model>-<data>.
        workers: processes; None is one a GPU, or what the CPU bears.
        command: as typed, for the record.
    """

    typed: Typed
    methods: Sequence[str] = DEFAULT_METHODS
    grids: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    seeds: int = 3
    sweep: int = 3
    few_shot: int | None = None
    ood: str | None = None
    text: str | None = None
    speed: bool = True
    rounds: int | None = None
    prompt_tokens: int | None = None
    prompts: int | None = None
    adapters: int | None = None
    out: str | None = None
    workers: int | None = None
    command: str = ""

    def folder(self, recipe: Recipe) -> Path:
        """The comparison's folder."""
        if self.out is not None:
            return Path(self.out)
        shot = f"-{self.few_shot}-shot" if self.few_shot else ""
        return (
            Path("compare") / f"{recipe.run_name.removesuffix(f'-{recipe.adapter.method}')}{shot}"
        )

    def check(self) -> None:
        """Raise UsageError for a number below 1."""
        numbers = ("seeds", "sweep", "few_shot", "workers")
        for flag in (*numbers, "rounds", "prompt_tokens", "prompts", "adapters"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                name = flag.replace("_", "-")
                raise UsageError(f"--{name} must be 1 or more, got {value}.")


def entries(settings: Settings) -> list[Entry]:
    """The contestants: each method with every combination of the grids' values that it has a setting for.

    Settings of the adapter that were typed go to the methods that have them.

    Raises:
        UsageError: a number below 1, no method or one twice, a setting that no method has, or two contestants that
            are one.
        RecipeError: a recipe that is wrong for one of them.
    """
    settings.check()
    typed, methods, grids = settings.typed, settings.methods, settings.grids
    if not methods:
        raise UsageError("--methods names none. Type, say, --methods prefix-tuning-plus,lora")
    adapter = _typed_of_the_adapter(typed)
    used: set[str] = set()
    found: list[Entry] = []
    for method, settings_of in map(_parsed, methods):
        given = {f"adapter.{key}": [value] for key, value in settings_of.items()}
        own = given | {
            key: values for key, values in grids.items() if _has(method, key) and key not in given
        }
        keys = {key: value for key, value in adapter.items() if _has(method, f"adapter.{key}")}
        used |= {*own, *(f"adapter.{key}" for key in keys)}
        for combination in itertools.product(*own.values()):
            chosen = dict(zip(own, combination, strict=True))
            recipe = _recipe(typed, method, {f"adapter.{k}": v for k, v in keys.items()} | chosen)
            found.append(Entry(_label(method, chosen), chosen, recipe))
    _check_all_are_used([*grids, *(f"adapter.{key}" for key in adapter)], used, methods)
    _check_distinct(found)
    return found


def parse_grids(given: Iterable[str], *, speed: bool = False) -> dict[str, list[Any]]:
    """`--grid adapter.layers=all,last:8` as {key: values}; a list is one value: `[0,1],[4,5]`.

    Args:
        given: what was typed.
        speed: costs alone are measured, so that keys are the adapter's and OF_A_COST.

    Raises:
        UsageError: it has another form, a key is given twice, or is none that a comparison can vary.
    """
    grids: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not values.strip() or key.count(".") < 1:
            raise UsageError(
                f"--grid takes section.key=value,value, as in adapter.layers=all,last:8, got {text!r}"
            )
        _check_can_vary(key, speed=speed)
        if key in grids:
            raise UsageError(f"--grid {key} is given twice. Give all of its values at once.")
        grids[key] = [read.parse_value(part, f"--grid {key}") for part in split(values)]
    return grids


def _check_can_vary(key: str, *, speed: bool) -> None:
    if speed:
        if not key.startswith("adapter.") and key not in OF_A_COST:
            raise UsageError(
                f"--speed takes no --grid {key}: what is measured does not depend on it. Type a setting of the "
                f"adapter, such as adapter.r, or one of {', '.join(OF_A_COST)}."
            )
        return
    for taken in (key, key.partition(".")[0]):
        if taken in NO_GRID:
            raise UsageError(f"--grid {key} makes no fair comparison: {NO_GRID[taken]}.")


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _parsed(method: str) -> tuple[str, dict[str, Any]]:
    """`lora(r=5)` as a method with settings of its adapter."""
    name, bracket, inside = method.partition("(")
    if bracket and not inside.endswith(")"):
        raise UsageError(
            f"--methods takes names such as lora, or lora(r=8,alpha=16), got {method!r}"
        )
    settings: dict[str, Any] = {}
    for part in split(inside.removesuffix(")")):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"--methods takes settings as in lora(r=8,alpha=16), got {method!r}")
        settings[key.strip()] = read.parse_value(value, f"--methods {method}")
    return canonical(name.strip()), settings


def _typed_of_the_adapter(typed: Typed) -> dict[str, Any]:
    """The adapter's settings that flags and `--set` ask for, but for the method."""
    nested: dict[str, Any] = {}
    for given in typed.sets:
        key, _, value = given.partition("=")
        if key.strip().startswith("adapter."):
            nested[key.strip().removeprefix("adapter.")] = read.parse_value(value, f"--set {key}")
    nested.update(typed.flags.get("adapter", {}))
    if "method" in nested:
        raise UsageError(
            "`ptp compare` takes several methods: type --methods in place of --method."
        )
    return nested


def _has(method: str, key: str) -> bool:
    """Whether a recipe of this method has the setting; what is no adapter's all of them have."""
    section, _, rest = key.partition(".")
    if section != "adapter":
        return True
    first, _, further = rest.partition(".")
    if first not in METHODS.get(method, Peft).model_fields:
        return False
    if not further:
        return True
    from prefixtune_cli.peft_methods import has_setting

    return has_setting(method, further)


def _recipe(typed: Typed, method: str, settings: Mapping[str, Any]) -> Recipe:
    sets = [given for given in typed.sets if not given.strip().startswith("adapter.")]
    flags = {key: value for key, value in typed.flags.items() if key != "adapter"}
    nested: dict[str, Any] = {**flags, "adapter": {"method": method}}
    if typed.recipe is not None and not _types_a_rate(typed):
        written = load.resolve(typed.recipe)
        if written.adapter.method != method:  # whose rate was chosen for it
            nested["train"] = {**nested.get("train", {}), "learning_rate": None}
    for key, value in settings.items():
        *above, last = key.split(".")
        inner = nested
        for section in above:
            inner[section] = inner = dict(inner.get(section, {}))
        inner[last] = value
    return load.resolve(typed.recipe, sets, nested)


def _types_a_rate(typed: Typed) -> bool:
    in_sets = any(given.partition("=")[0].strip() == "train.learning_rate" for given in typed.sets)
    return in_sets or "learning_rate" in typed.flags.get("train", {})


def _label(method: str, settings: Mapping[str, Any]) -> str:
    return " ".join([method, *(spelled(key, value) for key, value in settings.items())])


def spelled(key: str, value: Any) -> str:
    """A setting as a label has it: `r=8`, `lr=0.003`, and where the value says enough, it alone: `elu`."""
    if key in ("adapter.preset", "adapter.feature_map", "adapter.sites", "model.name"):
        return str(value)
    shown = json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace('"', "")
    last = key.rpartition(".")[2]
    return f"{'lr' if last == 'learning_rate' else last}={shown}"


def _check_all_are_used(given: Sequence[str], used: set[str], methods: Sequence[str]) -> None:
    for key in given:
        if key not in used:
            raise UsageError(
                f"{key} is a setting of none of the methods ({', '.join(methods)}). `ptp recipe-schema` lists what "
                "each of them has."
            )


def _check_distinct(found: Sequence[Entry]) -> None:
    by_label = {}
    for entry in found:
        if entry.label in by_label:
            raise UsageError(f"--methods and --grid name {entry.label} twice. Give each once.")
        by_label[entry.label] = entry
    same: Iterator[tuple[Entry, Entry]] = itertools.combinations(found, 2)
    for one, other in same:
        if one.recipe == other.recipe:
            raise UsageError(f"{one.label} and {other.label} are the same run. Leave one out.")

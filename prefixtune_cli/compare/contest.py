"""Who takes part in a comparison, and under which conditions: from what was typed to recipes. It loads no model.

All methods are trained from the same recipe but for their own settings: they see the same rows in the same order, with
the same batch and the same number of optimizer steps. Each has a sweep of equally many learning rates around its own
default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.grids import parse_method
from prefixtune_cli.errors import UsageError
from prefixtune_cli.recipe import load, read
from prefixtune_cli.recipe.explain import METHODS
from prefixtune_cli.recipe.schema import Peft, Recipe

DEFAULT_METHODS = ("prefix-tuning-plus", "lora", "prefix-tuning", "full")  # pairs go without full
FACTOR = 10**0.5  # between two learning rates of a sweep
NEVER = 10**9  # steps: more than any run has
OF_A_CELL = {"gpus": None, "parallel": "ddp", "track": "none", "keep_checkpoints": 1}


@dataclass(frozen=True)
class Entry:
    """A contestant before it has run.

    Attributes:
        label: its name, which no other contestant has.
        settings: dotted recipe key → value, of the settings that `--methods` and `--grid` give to this one.
        recipe: without the seed, learning rate and run directory of a cell.
    """

    label: str
    settings: Mapping[str, Any]
    recipe: Recipe

    @property
    def method(self) -> str:
        return self.recipe.adapter.method

    @property
    def folder(self) -> str:
        """Its label as a file name."""
        name = re.sub(r"[^\w.+=-]+", "-", self.label).strip("-")
        if name == self.label.replace(" ", "-") and len(name) < 100:
            return name
        return f"{name[:90]}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"

    def cell(self, seed: int, learning_rate: float, out: str, data: Mapping[str, str]) -> Recipe:
        """The recipe of one run. `data` has the files `train` and `eval`, in which columns are renamed already."""
        section = self.recipe.data.model_copy(
            update={**data, "eval_split": None, "map": {}, "format": "auto"}
        )
        train = self.recipe.train.model_copy(
            update={"seed": seed, "learning_rate": learning_rate, **OF_A_CELL}
        )
        if train.save_steps is None:  # by time alone; a cell that is stopped is saved anyway
            train = train.model_copy(update={"save_steps": NEVER, "save_minutes": 10.0})
        return self.recipe.model_copy(update={"data": section, "train": train, "out": out})


def learning_rates(recipe: Recipe, count: int) -> list[float]:
    """`count` rates around the recipe's own, which is one of them: each √10 times the one before, with two digits."""
    own = recipe.train.learning_rate
    assert own is not None, "given by with_learning_rate"
    exponents = range(-((count - 1) // 2), count // 2 + 1)
    return [own if e == 0 else float(f"{own * FACTOR**e:.1e}") for e in exponents]


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        recipe, sets, flags: the recipe, `--set`, and flags nested as a recipe is; all methods share them.
        methods: the others are compared with the first; `lora(r=8)` is one with settings of its own. None are
            DEFAULT_METHODS.
        grids: dotted recipe key → values; every combination is a contestant.
        seeds: cells of each contestant: train.seed and those after it.
        sweep: learning rates of each contestant, on the first seed; 1 is the default alone.
        few_shot: training examples of each class, drawn anew for each seed; None takes all rows.
        ood: data of another distribution, to test on.
        text: text that has nothing to do with the task, to measure forgetting on.
        speed: whether costs are measured.
        rounds, prompt_tokens, prompts, adapters: how costs are measured; see `speed.Shape`.
        out: folder of the comparison; None is compare/<model>-<data>.
        workers: processes; None is one for each GPU, or as many as the CPU bears.
        command: as typed, for the record.
    """

    recipe: str | None = None
    sets: Sequence[str] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    methods: Sequence[str] | None = None
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
        objective = f"-{recipe.train.objective}" if recipe.on_preferences else ""
        name = recipe.run_name.removesuffix(f"-{recipe.adapter.method}{objective}")
        return Path("compare") / f"{name}{objective}{shot}"

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
        UsageError: a number is below 1, there is no method, one is named twice, two are the same run, or no method has
            a setting; objectives differ, pairs of answers do not go with the rest, or the recipe goes on from an
            adapter.
        RecipeError: the recipe of one of them is wrong.
    """
    settings.check()
    methods = settings.methods
    if methods is None:
        shared = {k: v[0] for k, v in settings.grids.items() if not k.startswith("adapter.")}
        on_preferences = _recipe(settings, DEFAULT_METHODS[0], shared).on_preferences
        methods = [name for name in DEFAULT_METHODS if not (on_preferences and name == "full")]
    if not methods:
        raise UsageError("--methods names none. Type, say, --methods prefix-tuning-plus,lora")
    grids, adapter = settings.grids, _typed_of_the_adapter(settings)
    used: set[str] = set()
    found: list[Entry] = []
    for method, own_settings in map(parse_method, methods):
        typed = {key: value for key, value in adapter.items() if _has(method, key)}
        given = {f"adapter.{key}": [value] for key, value in own_settings.items()}
        varied = {key: v for key, v in grids.items() if _has(method, key) and key not in given}
        values = given | varied
        used |= {*values, *typed}
        for combination in itertools.product(*values.values()):
            chosen = dict(zip(values, combination, strict=True))
            label = " ".join([method, *(spelled(key, value) for key, value in chosen.items())])
            recipe = _recipe(settings, method, typed | chosen)
            if recipe.train.start_from is not None:
                raise UsageError(
                    "`ptp compare` trains fresh adapters. Leave train.start_from out, or compare finished runs."
                )
            found.append(Entry(label, chosen, recipe))
    for key in (*grids, *adapter):
        if key not in used:
            raise UsageError(
                f"{key} is a setting of none of the methods ({', '.join(methods)}). `ptp recipe-schema` lists "
                "what each of them has."
            )
    _check_objectives(settings, [entry.recipe for entry in found])
    for one, other in itertools.combinations(found, 2):
        if one.label == other.label:
            raise UsageError(f"--methods and --grid name {one.label} twice. Give each once.")
        if one.recipe == other.recipe:
            raise UsageError(f"{one.label} and {other.label} are the same run. Leave one out.")
    return found


def _check_objectives(settings: Settings, recipes: Sequence[Recipe]) -> None:
    objectives = sorted({recipe.train.objective for recipe in recipes})
    if len(objectives) > 1:
        raise UsageError(
            f"The objectives {' and '.join(objectives)} share no figure by which they could be compared. Compare with "
            "one at a time."
        )
    if settings.few_shot is not None and recipes[0].on_preferences:
        raise UsageError(
            f"--few-shot draws rows of each class, and the preferences of objective {objectives[0]} have none. "
            "Leave it out."
        )


def _typed_of_the_adapter(settings: Settings) -> dict[str, Any]:
    """Dotted key → value, of the adapter's settings that flags and `--set` ask for."""
    typed: dict[str, Any] = {}
    for given in settings.sets:
        key, _, value = given.partition("=")
        if key.strip().startswith("adapter."):
            typed[key.strip()] = read.parse_value(value, f"--set {key}")
    typed |= {f"adapter.{key}": value for key, value in settings.flags.get("adapter", {}).items()}
    if "adapter.method" in typed:
        raise UsageError(
            "`ptp compare` takes several methods: type --methods in place of --method."
        )
    return typed


def _has(method: str, key: str) -> bool:
    """Whether the method has the setting; all methods have those that are not the adapter's."""
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


def _recipe(shared: Settings, method: str, own: Mapping[str, Any]) -> Recipe:
    """The recipe of one method; `own` has the settings of its adapter and those of the grids, by dotted key."""
    sets = [given for given in shared.sets if not given.strip().startswith("adapter.")]
    flags = {key: value for key, value in shared.flags.items() if key != "adapter"}
    nested: dict[str, Any] = {**flags, "adapter": {"method": method}}
    if shared.recipe is not None and not _types_a_rate(shared):
        written = load.resolve(shared.recipe)
        if written.adapter.method != method:  # the recipe's rate is for its own method
            nested["train"] = {**nested.get("train", {}), "learning_rate": None}
    for key, value in own.items():
        *above, last = key.split(".")
        inner = nested
        for section in above:
            inner[section] = inner = dict(inner.get(section, {}))
        inner[last] = value
    return load.resolve(shared.recipe, sets, nested)


def _types_a_rate(settings: Settings) -> bool:
    typed = [given.partition("=")[0].strip() for given in settings.sets]
    return "train.learning_rate" in typed or "learning_rate" in settings.flags.get("train", {})


def spelled(key: str, value: Any) -> str:
    """A setting in a label: `r=8`, `lr=0.003`, or the value alone where that is enough: `elu`."""
    if key in ("adapter.preset", "adapter.feature_map", "adapter.sites", "model.name"):
        return str(value)
    shown = json.dumps(value, separators=(",", ":"), ensure_ascii=False).replace('"', "")
    last = key.rpartition(".")[2]
    return f"{'lr' if last == 'learning_rate' else last}={shown}"

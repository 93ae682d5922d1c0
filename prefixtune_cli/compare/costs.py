"""What contestants cost, measured beside each other on one base: the one they were trained on, or random weights.

If a grid varies the base or the shape, then contestants that share both are a group, and each group is measured alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from accelerate.utils.memory import clear_device_cache
from transformers import PreTrainedConfig, PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.compare.comparison import Comparison, Contestant, Group
from prefixtune_cli.compare.contest import Entry, Settings, entries, spelled
from prefixtune_cli.compare.folder import claimed
from prefixtune_cli.compare.grids import OF_A_COST
from prefixtune_cli.compare.metrics import Cost
from prefixtune_cli.compare.speed import (
    BASE,
    Shape,
    Speeds,
    config_of,
    measure,
    most_virtual_tokens,
    random_base,
)
from prefixtune_cli.compare.wording import reason
from prefixtune_cli.errors import Interrupted, UsageError
from prefixtune_cli.optimizer import check_optimizer
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import ModelSection, Recipe
from prefixtune_cli.train.environment import describe_environment

ROUNDS = 5
LONG_PROMPT = 2048  # tokens
# What results.json keeps of a shape.
PROTOCOL = (
    "rounds", "batch_size", "length", "prompt_tokens", "prompts", "adapters", "new_tokens"
)  # fmt: skip
Groups = Mapping[str, Sequence[Entry]]  # label of the group's base → its contestants


def compare_costs(settings: Settings, reporter: Reporter | None = None) -> tuple[Comparison, Path]:
    """Measure costs alone, on bases of the models' shapes with random weights; no data is read.

    Returns:
        what was found, and the comparison's folder. If one of several groups cannot be measured, it has the reason.

    Raises:
        PtpError: see `errors`; what can be checked is checked before a base is built.
    """
    reporter = reporter or Silent()
    groups = _groups(entries(settings))
    contest = [entry for group in groups.values() for entry in group]
    if contest[0].recipe.on_preferences:
        raise UsageError(
            f"--speed measures steps on answers, not on preferences. Leave objective "
            f"{contest[0].recipe.train.objective} out."
        )
    for entry in contest:
        models.peft_config(entry.recipe.adapter)
        check_optimizer(entry.recipe.train.optimizer)
    recipes = {label: group[0].recipe for label, group in groups.items()}
    room = room_of([config_of(recipe.model) for recipe in recipes.values()], contest)
    shapes = {label: shape_of(recipe, settings, room) for label, recipe in recipes.items()}
    name = f"{contest[0].recipe.model.name.rstrip('/').split('/')[-1]}-speed"
    folder = Path(settings.out) if settings.out else Path("compare") / name
    with claimed(folder):
        speeds = _measured(groups, shapes, reporter)
    known = {label: each for label, each in speeds.items() if isinstance(each, Speeds)}
    parameters = {k: count for each in known.values() for k, count in each.parameters.items()}
    stored = {k: size for each in known.values() for k, size in each.adapter_bytes.items()}
    contestants = [
        Contestant(
            label=entry.label,
            method=entry.method,
            settings=entry.settings,
            learning_rate=None,
            trainable_parameters=parameters.get(entry.label),
            adapter_bytes=stored.get(entry.label),
            cells=[],
        )
        for entry in contest
    ]
    sizes = {recipes[label].model: each.parameters[BASE] for label, each in known.items()}
    found = Comparison(
        name=folder.name,
        kind="speed",
        command=settings.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model=_model([recipe.model for recipe in recipes.values()], sizes),
        data={},
        protocol=_alike([{key: vars(shape)[key] for key in PROTOCOL} for shape in shapes.values()]),
        environment=describe_environment({}, 1),
        base={},
        contestants=contestants,
    )
    return with_costs(found, groups, speeds), folder


def _groups(contest: Sequence[Entry]) -> Groups:
    """Contestants that share base and shape; the base's label has the settings in which the groups differ."""
    groups: dict[str, list[Entry]] = {}
    for entry in contest:
        apart = [spelled(key, value) for key, value in entry.settings.items() if key in OF_A_COST]
        groups.setdefault(" ".join([BASE, *apart]), []).append(entry)
    return groups if len(groups) > 1 else {BASE: contest}


def _measured(
    groups: Groups, shapes: Mapping[str, Shape], reporter: Reporter
) -> dict[str, Speeds | str]:
    """Label of the group's base → the group's speeds, or why there are none.

    The groups of one base come one after another: each base is built once, and is gone before the next is built.

    Raises:
        PtpError: a single group cannot be measured; see `measure` and `random_base`.
    """
    found: dict[str, Speeds | str] = {}
    sections = list(dict.fromkeys(group[0].recipe.model for group in groups.values()))
    base: PreTrainedModel | None = None
    for section in sections:
        base = None
        clear_device_cache(garbage_collection=True)
        for label, group in groups.items():
            if group[0].recipe.model != section:
                continue
            try:
                if base is None:
                    reporter.notice(f"Building {section.name} with random weights.")
                    base = random_base(section)
                found[label] = costs_of(group, shapes[label], base, reporter)
            except Interrupted:
                raise
            except Exception as error:  # whatever one group runs into, the others go on
                if len(groups) == 1:
                    raise
                found[label] = said = reason(error)
                reporter.warning(f"{label} cannot be measured. {said}")
    return found


def costs_of(
    contest: Sequence[Entry], shape: Shape, base: PreTrainedModel, reporter: Reporter
) -> Speeds:
    """Measure the contestants on this base."""
    adapters = [(entry.label, entry.recipe.adapter) for entry in contest]
    return measure(contest[0].recipe.model, adapters, shape, base=base, reporter=reporter)


def room_of(configs: Sequence[PreTrainedConfig], contest: Sequence[Entry]) -> int:
    """The longest row, in tokens, that every base has positions for beside the contestants' virtual tokens."""
    texts = [config.get_text_config(decoder=True) for config in configs]
    positions = [getattr(text, "max_position_embeddings", None) or LONG_PROMPT for text in texts]
    return min(positions) - most_virtual_tokens(entry.recipe.adapter for entry in contest)


def shape_of(recipe: Recipe, settings: Settings, room: int) -> Shape:
    """A training step of the recipe's size, and a prompt as long as the bases take, but no longer than LONG_PROMPT.

    A length from a grid is in the labels, so it is not shortened; `measure` refuses it if it is too long.
    """
    plain, length = Shape(), recipe.data.max_length
    return Shape(
        rounds=settings.rounds or ROUNDS,
        batch_size=recipe.train.batch_size,
        length=length if "data.max_length" in settings.grids else max(1, min(length, room)),
        prompt_tokens=settings.prompt_tokens or max(1, min(LONG_PROMPT, room - plain.new_tokens)),
        prompts=settings.prompts or plain.prompts,
        adapters=settings.adapters or plain.adapters,
        gradient_checkpointing=recipe.train.gradient_checkpointing,
        optimizer=recipe.train.optimizer,
    )


def with_costs(found: Comparison, groups: Groups, speeds: Mapping[str, Speeds | str]) -> Comparison:
    """The comparison with what its contestants cost, or why they could not be measured.

    Args:
        found: its contestants are in the order of the groups.
        groups: all contestants.
        speeds: label of the group's base → its speeds, or why the whole group could not be measured.
    """
    each: dict[str, Cost | str] = {}
    measured: list[Group] = []
    for label, group in groups.items():
        of_group = speeds[label]
        base: Cost | None = None
        if isinstance(of_group, str):
            each[label] = of_group
        else:
            each |= of_group.contestants
            base = of_group.base
        measured.append(Group(label, base, [entry.label for entry in group]))
    costs = {label: cost for label, cost in each.items() if isinstance(cost, Cost)}
    alone = len(measured) == 1
    return replace(
        found,
        contestants=[replace(one, cost=costs.get(one.label)) for one in found.contestants],
        base_cost=measured[0].base_cost if alone else None,
        unmeasured={label: why for label, why in each.items() if isinstance(why, str)},
        groups=() if alone else measured,
    )


def _model(sections: Sequence[ModelSection], sizes: Mapping[ModelSection, int]) -> dict[str, Any]:
    """The names of the bases, and whatever else all of them share."""
    about = [
        {
            **section.model_dump(include={"name", "revision", "bits"}),
            "parameters": sizes.get(section),
        }
        for section in sections
    ]
    names = dict.fromkeys(section.name for section in sections)
    return {"name": ", ".join(names), **_alike(about)}


def _alike(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The keys that have the same value in all of them."""
    return {key: value for key, value in each[0].items() if all(e[key] == value for e in each)}

"""From the run directories of a comparison's cells to what the comparison found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixtune_cli import model as models
from prefixtune_cli.compare.cells import judged
from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Cell, Comparison, Contestant
from prefixtune_cli.compare.contest import Entry, Settings
from prefixtune_cli.compare.fairness import shared_objective
from prefixtune_cli.compare.finished_run import ADAPTER, BASE, result_of
from prefixtune_cli.compare.rows import VALIDATION, Rows
from prefixtune_cli.compare.stages import Stages, summary
from prefixtune_cli.compare.wording import data_name
from prefixtune_cli.evaluate.matching import rule_sentence
from prefixtune_cli.evaluate.preferences import TITLES
from prefixtune_cli.evaluate.settings import Settings as EvalSettings
from prefixtune_cli.recipe.schema import WITH_REFERENCE
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.environment import describe_environment

Items = Sequence[Mapping[str, Any]]  # the rows of an eval file


def collect(
    settings: Settings,
    contest: Sequence[Entry],
    rows: Rows,
    folder: Path,
    stages: Stages,
    judging: EvalSettings,
) -> Comparison:
    """What the stages found, once all of them have ended; the runs were judged by the settings `judging`."""
    recipe = contest[0].recipe
    of_base = {} if stages.judged_base is None else judged(stages.judged_base, judging)
    items_of_base = {name: found["items"] for name, found in of_base.items()}
    contestants = [_contestant(entry, stages, judging, items_of_base) for entry in contest]
    notices = list(rows.notices)
    if (pattern := recipe.evaluate.answer_pattern) and not recipe.on_preferences:
        notices.append(rule_sentence(pattern))
    for name, found in of_base.items():
        if why := found.get("why_no_exact_match"):
            notices.append(why if name == TEST else f"Of {data_name(name)}: {why}")
    cells = [cell for one in contestants for cell in one.cells]
    steps = {cell.steps for cell in cells if cell.steps is not None}
    if len(steps) > 1:
        notices.append("The contestants took different numbers of steps, as the grid asks for.")
    if (objective := recipe.train.objective) in WITH_REFERENCE and TEST not in of_base:
        name = TITLES[objective]
        notices.append(f"The base was not judged, so {name}'s loss and its rewards are not known.")
    if settings.speed and recipe.on_preferences:
        notices.append("What steps on preferences cost is not measured.")
    if settings.few_shot is not None and settings.sweep > 1:
        labelled = rows.about[VALIDATION]["rows"]
        notices.append(f"The learning rates were chosen on {labelled} labelled rows beside those.")
    return Comparison(
        name=folder.name,
        kind="trained",
        command=settings.command,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model={
            **recipe.model.model_dump(include={"name", "revision", "bits"}),
            "parameters": models.skeleton(recipe.model).num_parameters(),
        },
        data=_data(rows, recipe.evaluate.max_rows, of_base.get(FORGETTING)),
        protocol={
            "seeds": [recipe.train.seed + i for i in range(settings.seeds)],
            "steps": min(steps) if len(steps) == 1 else None,
            "batch": recipe.train.batch_size * recipe.train.gradient_accumulation,
            "schedule": recipe.train.schedule,
            "sweep": settings.sweep,
            "sweep_chosen_on": VALIDATION,
            "few_shot": settings.few_shot,
            **shared_objective([entry.recipe for entry in contest]),
        },
        environment=describe_environment({}, 1),
        base={name: result_of(items, BASE, recipe) for name, items in items_of_base.items()},
        contestants=contestants,
        notices=notices,
    )


def _data(rows: Rows, most: int, forgetting: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The data sets, with `evaluated` where at most `most` of their rows were, and the text of forgetting."""
    about = {name: dict(found) for name, found in rows.about.items()}
    for name in (TEST, OOD):
        if name in about and about[name]["rows"] > most:
            about[name]["evaluated"] = most
    if forgetting is not None:
        text = forgetting["text"]
        kept = {name: text[name] for name in ("source", "sha256")}
        about[FORGETTING] = {"rows": text["evaluated"], **kept}
    return about


def _contestant(
    entry: Entry, stages: Stages, judging: EvalSettings, of_base: Mapping[str, Items]
) -> Contestant:
    cells = [
        _cell(entry, seed, run, stages.failures.get(run), judging, of_base)
        for seed, run in stages.chosen(entry)
    ]
    whole = next((summary(cell.run) for cell in cells if cell.failure is None), {})
    return Contestant(
        label=entry.label,
        method=entry.method,
        settings=entry.settings,
        learning_rate=stages.rates[entry.label],
        trainable_parameters=whole.get("trainable_parameters"),
        adapter_bytes=whole.get("adapter_bytes"),
        cells=cells,
        sweep=stages.sweeps[entry.label],
    )


def _cell(
    entry: Entry,
    seed: int,
    run: str,
    failure: str | None,
    judging: EvalSettings,
    of_base: Mapping[str, Items],
) -> Cell:
    run_dir = RunDir(run)
    if not run_dir.finished:
        return Cell(seed, run, failure=failure)
    items = {name: found["items"] for name, found in judged(run, judging).items()}
    return Cell(
        seed=seed,
        run=run,
        steps=summary(run)["steps"],
        failure=failure,
        results={
            name: result_of(rows, ADAPTER, entry.recipe, of_base.get(name))
            for name, rows in items.items()
        },
        losses=[(row["step"], row["loss"]) for row in run_dir.read_metrics() if "loss" in row],
    )

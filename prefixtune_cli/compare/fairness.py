"""Whether runs can be compared: which of them are one contestant, and what differs beside method and seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.contest import spelled
from prefixtune_cli.compare.finished_run import FinishedRun
from prefixtune_cli.pointed import base_key
from prefixtune_cli.recipe.schema import OWN_SETTINGS, Recipe
from prefixtune_cli.run_dir import RunDir

# Settings that do not make another contestant: how a run is carried out and recorded, and its seed.
CIRCUMSTANCES = {
    "model.device", "train.seed", "train.log_steps", "train.eval_steps", "train.save_steps",
    "train.save_minutes", "train.keep_checkpoints", "train.track", "train.gpus",
    "evaluate.batch_size", "evaluate.bench_data",
}  # fmt: skip


def settings(run: FinishedRun) -> dict[str, Any]:
    """The recipe as {dotted key: value}, with hashes of the data, the base's full name, and no CIRCUMSTANCES."""
    recipe = run.recipe
    found = {
        f"{section}.{key}": value
        for section, values in recipe.model_dump().items()
        if isinstance(values, Mapping)
        for key, value in values.items()
        if f"{section}.{key}" not in CIRCUMSTANCES
    }
    found |= {f"adapter.config.{k}": v for k, v in found.pop("adapter.config", {}).items()}
    found["model.name"] = base_key(recipe.model)
    for key in ("train", "eval", "chat_template"):
        found[f"data.{key}"] = run.fingerprints.get(key, {}).get("sha256")
    found["train.start_from"] = run.start.get("sha256")
    if recipe.train.max_steps is not None:
        del found["train.epochs"]
    return found


def identity(run: FinishedRun) -> str:
    """A text that is the same for all runs of a contestant."""
    return json.dumps(settings(run), sort_keys=True)


def labels(runs: Sequence[FinishedRun]) -> list[str]:
    """A name for each contestant: its method, and the settings in which it differs from others of its method.

    Args:
        runs: one of each contestant.
    """
    flat = [settings(run) for run in runs]
    found = []
    for run, own in zip(runs, flat, strict=True):
        method = run.recipe.adapter.method
        rivals = [other for other in flat if other["adapter.method"] == method]
        apart = [k for k in own if any(other.get(k) != own[k] for other in rivals)]
        words = [_spelled(run, key, own[key]) for key in apart if own[key] is not None]
        found.append(" ".join([method, *words]))
    return found


def _spelled(run: FinishedRun, key: str, value: Any) -> str:
    section, *_, last = key.split(".")
    if key == "train.start_from":
        value = run.recipe.train.start_from
    if key == "model.name":
        value = run.recipe.model.name
    if section == "data" and last in run.fingerprints:
        return Path(run.fingerprints[last]["source"].replace("sample:", "")).stem
    return spelled(key, value)


def differences(runs: Sequence[FinishedRun]) -> list[str]:
    """A sentence about each thing that makes a comparison unfair: a difference, an unfinished or a repeated run."""
    found = [
        f"{run.given} has not finished. {RunDir(run.given).how_to_go_on}"
        for run in runs
        if not run.finished
    ]
    found += [
        f"{run.given} is the same recipe with the same seed as {other.given}. Leave one out."
        for run, other in twins(runs)
    ]
    finished = [run for run in runs if run.finished]
    for what, of_runs in _aspects(finished):
        groups: dict[Hashable, tuple[str, list[str]]] = {}
        for run, (key, shown) in zip(finished, of_runs, strict=True):
            groups.setdefault(key, (shown, []))[1].append(run.given)
        if len(groups) > 1:
            each = [f"{shown} in {', '.join(given)}" for shown, given in groups.values()]
            found.append(f"The runs have different {what}: {'; '.join(each)}.")
    return found


def twins(runs: Sequence[FinishedRun]) -> Iterator[tuple[FinishedRun, FinishedRun]]:
    """Each run that repeats an earlier one, with the earlier one."""
    first: dict[Hashable, FinishedRun] = {}
    for run in runs:
        earlier = first.setdefault((identity(run), run.seed), run)
        if earlier is not run:
            yield run, earlier


def shared_objective(recipes: Sequence[Recipe]) -> dict[str, Any]:
    """What runs on preferences share of objective, beta and `OWN_SETTINGS`; nothing of other runs."""
    keys = ["objective", "beta"] if any(recipe.on_preferences for recipe in recipes) else []
    objectives = {recipe.train.objective for recipe in recipes}
    keys += OWN_SETTINGS.get(objectives.pop(), ()) if len(objectives) == 1 else ()
    found = {key: {getattr(recipe.train, key) for recipe in recipes} for key in keys}
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def base(run: FinishedRun) -> Hashable:
    """Runs with the same base have the same of this."""
    model = run.recipe.model
    return base_key(model), model.bits


def _aspects(runs: Sequence[FinishedRun]) -> Iterator[tuple[str, list[tuple[Hashable, str]]]]:
    """What has to be the same: its name, and for each run a key and how a sentence shows it."""
    yield "bases", [(base(run), _shown_base(run)) for run in runs]
    objectives = [run.recipe.train.objective for run in runs]
    yield "objectives", [(objective, objective) for objective in objectives]
    yield "starts", [(run.start.get("sha256"), _shown_start(run)) for run in runs]
    trained_on = [run.fingerprints["train"] for run in runs]
    yield "training data", [(data["sha256"], _shown_data(data)) for data in trained_on]
    budgets = [(run.summary["steps"], run.batch) for run in runs]
    yield "budgets", [((s, batch), f"{s} steps of {batch} examples") for s, batch in budgets]
    yield "held-out rows", [(held_out_rows(run), _shown_held_out_rows(run)) for run in runs]
    yield "ways to read their data", [(shown, shown) for shown in _shown_reading(runs)]
    if len({held_out_rows(run) for run in runs}) == 1:
        yield "answers to match", [(_references(run), _shown_answers(run)) for run in runs]


def _shown_base(run: FinishedRun) -> str:
    model = run.recipe.model
    revision = f" at {model.revision}" if model.revision else ""
    return f"{model.name}{revision} with {model.bits} bits"


def _shown_start(run: FinishedRun) -> str:
    if not run.start:
        return "a fresh adapter"
    return f"{run.recipe.train.start_from} (sha256 {run.start['sha256'][:8]}…)"


def _shown_data(data: Mapping[str, Any]) -> str:
    return f"{data['source']} (sha256 {data['sha256'][:8]}…)"


def _shown_reading(runs: Sequence[FinishedRun]) -> list[str]:
    """How each run read its data: the settings in which the runs differ."""
    found = [_reading(run) for run in runs]
    apart = sorted(
        key
        for key in {key for settings in found for key in settings}
        if len({json.dumps(settings.get(key)) for settings in found}) > 1
    )
    return [", ".join(spelled(f"data.{key}", own.get(key)) for key in apart) for own in found]


def _reading(run: FinishedRun) -> dict[str, Any]:
    where = {"train": None, "eval": None, "eval_split": None, "chat_template": None}
    template = run.fingerprints.get("chat_template", {}).get("sha256")
    settings = run.recipe.data.model_copy(update=where).model_dump(exclude_none=True)
    pattern = run.recipe.evaluate.answer_pattern
    return {**settings, "chat_template": template, "answer_pattern": pattern}


def held_out_rows(run: FinishedRun) -> Hashable:
    """Runs with the same held-out rows have the same of this. If rows were split off, the seed chose them."""
    held_out = run.fingerprints.get("eval")
    split = None if held_out else (run.recipe.data.held_out_share, run.seed)
    return held_out["sha256"] if held_out else None, split, run.summary["held_out_rows"]


def _shown_held_out_rows(run: FinishedRun) -> str:
    rows = run.summary["held_out_rows"]
    if held_out := run.fingerprints.get("eval"):
        return f"{rows} of {_shown_data(held_out)}"
    return f"{rows} that were split off by seed {run.seed} (give runs the same --eval-data)"


def same_held_out_rows(runs: Sequence[FinishedRun]) -> bool:
    """Whether all runs were judged on the same rows, and those that matched answers on the same answers."""
    known = {_references(run) for run in runs if run.answers}
    return len({held_out_rows(run) for run in runs}) == 1 and len(known) <= 1


def _references(run: FinishedRun) -> tuple[str, ...]:
    return tuple(row["answer"] for row in run.answers)


def _shown_answers(run: FinishedRun) -> str:
    most = f"with evaluate.max_new_tokens {run.recipe.evaluate.max_new_tokens}"
    if not run.answers:
        return f"none {most}"
    digest = hashlib.sha256(json.dumps(_references(run)).encode()).hexdigest()
    return f"{len(run.answers)} {most} (sha256 {digest[:8]}…)"

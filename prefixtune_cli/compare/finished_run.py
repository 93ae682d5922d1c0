"""A run directory that `ptp train` has written, read for a comparison. It needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from prefixtune_cli.compare.comparison import FORGETTING, TEST, Result
from prefixtune_cli.errors import PtpError, RunDirError
from prefixtune_cli.evaluate import labelled
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.preferences import Likelihoods, Objective, Preferences, hits
from prefixtune_cli.pointed import nothing_at, run_of
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Kind, Recipe, kind_of
from prefixtune_cli.run_dir import RunDir

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Evaluated:
    """What `ptp eval` has found of a run on one data set: one file of its eval/.

    Attributes:
        source, sha256: of the data or text.
        origins: where each evaluated row comes from.
        results: the run's under ADAPTER and, where the base was evaluated as well, the base's under BASE.
    """

    source: str
    sha256: str
    origins: Sequence[str]
    results: Mapping[str, Result]

    @property
    def rows(self) -> tuple[object, ...]:
        """Two runs can be compared row by row where this is the same."""
        own = self.results[ADAPTER]
        return self.sha256, tuple(self.origins), tuple(own.tokens), own.right is None


@dataclass(frozen=True)
class FinishedRun:
    """A run directory that has been read.

    Attributes:
        given: its folder, as the user typed it.
        environment, summary: the run's files; the summary is empty where the run has not finished.
        answers: of each held-out row, the reference and both models' answers; empty where answers are long.
        metrics: the rows of metrics.jsonl.
        evaluated: data set → what `ptp eval` found.
    """

    given: str
    recipe: Recipe
    environment: Mapping[str, Any]
    summary: Mapping[str, Any] = field(default_factory=dict)
    answers: Sequence[Mapping[str, str]] = ()
    metrics: Sequence[Mapping[str, Any]] = ()
    evaluated: Mapping[str, Evaluated] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return bool(self.summary)

    @property
    def seed(self) -> int:
        return self.recipe.train.seed

    @property
    def fingerprints(self) -> Mapping[str, Mapping[str, Any]]:
        """source, rows and sha256 of `train`, and of `eval` where the held-out rows have a source of their own."""
        found: Mapping[str, Mapping[str, Any]] = self.environment["data"]
        return found

    @property
    def start(self) -> Mapping[str, str]:
        """folder and sha256 of the adapter that the run went on from; empty if it began with a fresh one."""
        found: Mapping[str, str] = self.environment.get("start", {})
        return found

    @property
    def batch(self) -> int:
        """Examples of an optimizer step. auto_batch keeps their number: it halves one factor and doubles the other."""
        train = self.recipe.train
        processes = int(self.environment.get("processes", 1))
        return train.batch_size * train.gradient_accumulation * processes

    def held_out(self, who: str) -> Result:
        """The result of `who` on the held-out rows. A run keeps the mean of their losses alone, so that is one row."""
        if self.recipe.on_preferences:
            return _of_preferences_alone(self.summary, who)
        pattern = self.recipe.evaluate.answer_pattern
        right = [exactly_matches(row[who], row["answer"], pattern) for row in self.answers]
        return Result([float(self.summary[who]["loss"])], [1], right or None)


def open_run(given: str) -> FinishedRun:
    """Read a run directory, finished or not; `given` may also be its adapter/.

    Raises:
        RunDirError: there is no run, or one of its files cannot be read.
    """
    run_dir = run_of(Path(given).expanduser())
    if run_dir is None:
        raise RunDirError(nothing_at(Path(given)))
    given = str(run_dir.path)
    try:
        recipe = resolve(str(run_dir.recipe))
        environment = _json(run_dir.environment)
        environment["data"]["train"]["sha256"]
        if not run_dir.finished:
            return FinishedRun(given, recipe, environment)
        summary = _json(run_dir.summary)
        for who in (BASE, ADAPTER):
            float(summary[who]["loss"])
            if recipe.on_preferences:
                _of_preferences_alone(summary, who)
        evaluated = {
            name: found
            for file in sorted(run_dir.summary.parent.glob("eval/*.json"))
            if (name := _data_set(file.stem))
            and (found := _evaluated(run_dir, _json(file), recipe))
        }
        return FinishedRun(
            given,
            recipe,
            environment,
            summary,
            _answers(run_dir),
            run_dir.read_metrics(),
            evaluated,
        )
    except PtpError as error:
        raise RunDirError(f"The run {given} cannot be read: {error}") from None
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise RunDirError(f"The run {given} cannot be read ({said}). Leave it out.") from None


def _json(file: Path) -> dict[str, Any]:
    found = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no object")
    return found


def _answers(run_dir: RunDir) -> list[dict[str, str]]:
    if not run_dir.answers.exists():
        return []
    text = run_dir.answers.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def _data_set(bench: str) -> str | None:
    """The data set of an eval file; None for benchmarks, whose files keep no rows."""
    if bench == FORGETTING:
        return FORGETTING
    if not bench.startswith("data-"):
        return None
    name = bench.removeprefix("data-")
    return bench if name in (TEST, "train", "validation") else name


def _of_preferences_alone(summary: Mapping[str, Any], who: str) -> Result:
    """The result of `who` on the held-out rows, of which a run keeps the means alone, so that is one row."""
    found = Preferences.of_json(dict(summary["preferences"]))
    result = Result([float(summary[who]["loss"])], [1], kind=kind_of(found.objective))
    if who == ADAPTER:
        return replace(result, losses=[found.loss], ahead=[found.reward_accuracy])
    if found.start is not None:  # the figures are against it, and not against the base
        return result
    of_base = [found.base.accuracy] if found.is_per_token else None  # others reward nothing
    return replace(result, losses=[found.reference_loss], ahead=of_base)


def _evaluated(run_dir: RunDir, found: Mapping[str, Any], recipe: Recipe) -> Evaluated | None:
    """The content of an eval file; None where this run is not among its subjects."""
    about = found.get("text") or found["data"]
    own = _subject(run_dir, found["subjects"])
    if own is None:
        return None
    names = {ADAPTER: own}
    if any(subject["name"] == BASE for subject in found["subjects"]):
        names[BASE] = BASE
    return Evaluated(
        about["source"],
        about["sha256"],
        [item["origin"] for item in found["items"]],
        {who: result_of(found["items"], name, recipe) for who, name in names.items()},
    )


def result_of(
    items: Sequence[Mapping[str, Any]],
    who: str,
    recipe: Recipe,
    of_base: Sequence[Mapping[str, Any]] | None = None,
) -> Result:
    """The result of one model, from the rows of an eval file.

    Args:
        items: the rows.
        who: the model's name in them.
        recipe: the run's; of preferences, it has the objective.
        of_base: the same rows with the base's figures, where `items` are without.
    """
    if items and isinstance(items[0]["tokens"], Mapping):
        return _result_of_preferences(items, who, recipe, of_base or items)
    has_answers = bool(items) and all("right" in item for item in items)
    return Result(
        nats=[float(item["nats"][who]) for item in items],
        tokens=[int(item["tokens"]) for item in items],
        right=[bool(item["right"][who]) for item in items] if has_answers else None,
    )


def _result_of_preferences(
    items: Sequence[Mapping[str, Any]],
    who: str,
    recipe: Recipe,
    of_base: Sequence[Mapping[str, Any]],
) -> Result:
    better = [item for item in items if item.get("desirable", True)]
    nats = [float(item["nats"][who]["chosen"]) for item in better]
    tokens = [int(item["tokens"]["chosen"]) for item in better]
    kind: Kind = "labelled" if "desirable" in items[0] else "pairs"
    result = Result(nats, tokens, kind=kind if recipe.on_preferences else "answers")
    if recipe.kind != kind:
        return result
    objective, reference = Objective.of(recipe.train), None
    if objective.has_reference:
        if recipe.train.start_from is not None or BASE not in of_base[0]["nats"]:
            return result  # the reference's figures are not there
        reference = _likelihoods(of_base, BASE, objective)
    found = _likelihoods(items, who, objective)
    if kind == "labelled":
        assert reference is not None
        return _of_labelled(result, items, objective, found, reference, of_base=who == BASE)
    rewards_nothing = objective.has_reference and who == BASE
    ahead = None if rewards_nothing else hits(objective.margins(found, reference)).tolist()
    return replace(result, losses=objective.losses(found, reference).tolist(), ahead=ahead)


def _of_labelled(
    result: Result,
    items: Sequence[Mapping[str, Any]],
    objective: Objective,
    found: Likelihoods,
    reference: Likelihoods,
    *,
    of_base: bool,
) -> Result:
    """The result with KTO's figures; the base rewards nothing."""
    desirable = np.array([item["desirable"] for item in items])
    above = labelled.rewards(objective, found, reference)
    losses = labelled.losses(objective, above, desirable).tolist()
    ahead = None if of_base else labelled.Auc(above, desirable).ahead.tolist()
    return replace(result, losses=losses, ahead=ahead)


def _likelihoods(items: Sequence[Mapping[str, Any]], who: str, objective: Objective) -> Likelihoods:
    """A model's log-probabilities, per token where the objective takes such."""

    def of(side: str) -> list[float]:
        tokens = [item["tokens"][side] if objective.is_per_token else 1 for item in items]
        return [-item["nats"][who][side] / n for item, n in zip(items, tokens, strict=True)]

    return Likelihoods(np.array(of("chosen")), np.array(of("rejected")))


def _subject(run_dir: RunDir, subjects: Sequence[Mapping[str, Any]]) -> str | None:
    """The name under which the run's adapter was evaluated; the folder may have been moved since."""
    adapters: dict[str, Path] = {
        s["name"]: Path(s["folder"]) for s in subjects if s["folder"] is not None
    }
    if len(adapters) == 1:
        return next(iter(adapters))
    here = run_dir.adapter.resolve()
    exact = [name for name, folder in adapters.items() if folder.resolve() == here]
    moved = [n for n, folder in adapters.items() if folder.parent.name == here.parent.name]
    found = exact or (moved if len(moved) == 1 else [])
    return found[0] if found else None

"""One finished run, as its files tell it. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.comparison import FORGETTING, TEST, Result
from prefixtune_cli.errors import PtpError, RunDirError
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.pointed import nothing_at, run_of
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir

BASE, ADAPTER = "base", "adapter"


@dataclass(frozen=True)
class Evaluated:
    """What `ptp eval` has written of a run: one file of its eval/.

    Attributes:
        source, sha256: of the data or text.
        origins: where each row that was evaluated comes from.
        results: of the run under ADAPTER and, where it took part, of the base under BASE.
    """

    source: str
    sha256: str
    origins: Sequence[str]
    results: Mapping[str, Result]

    @property
    def rows(self) -> tuple[object, ...]:
        """What has to be the same for two runs to be compared row by row."""
        own = self.results[ADAPTER]
        return self.sha256, tuple(self.origins), tuple(own.tokens), own.right is None


@dataclass(frozen=True)
class FinishedRun:
    """A run directory that has been read.

    Attributes:
        given: its folder, as it was typed.
        environment, summary: as written; the summary is empty where the run has not finished.
        answers: the held-out rows' references with both models' answers; empty where answers are long.
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
        """source, rows and sha256 of `train` and, where they are another source, of `eval`."""
        found: Mapping[str, Mapping[str, Any]] = self.environment["data"]
        return found

    @property
    def batch(self) -> int:
        """Examples an optimizer step; where auto_batch halved the one factor it doubled the other."""
        train = self.recipe.train
        processes = int(self.environment.get("processes", 1))
        return train.batch_size * train.gradient_accumulation * processes

    def held_out(self, who: str) -> Result:
        """On its held-out rows: the loss is kept as their mean alone, right and wrong row by row."""
        pattern = self.recipe.evaluate.answer_pattern
        right = [exactly_matches(row[who], row["answer"], pattern) for row in self.answers]
        return Result([float(self.summary[who]["loss"])], [1], right or None)


def open_run(given: str) -> FinishedRun:
    """Read a run directory, finished or not; its adapter/ stands for it.

    Raises:
        RunDirError: it is none, or a file of it cannot be read.
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
        evaluated = {
            name: found
            for file in sorted(run_dir.summary.parent.glob("eval/*.json"))
            if (name := _data_set(file.stem)) and (found := _evaluated(run_dir, _json(file)))
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
    """The name of a data set whose rows an eval file keeps: own data, and the text of forgetting."""
    if bench == FORGETTING:
        return FORGETTING
    if not bench.startswith("data-"):
        return None
    name = bench.removeprefix("data-")
    return bench if name in (TEST, "train", "validation") else name


def _evaluated(run_dir: RunDir, found: Mapping[str, Any]) -> Evaluated | None:
    """One eval file, where this run is among its subjects."""
    about = found.get("text") or found["data"]
    own = _subject(run_dir, found["subjects"])
    if own is None:
        return None
    items = found["items"]
    names = {ADAPTER: own}
    if any(subject["name"] == BASE for subject in found["subjects"]):
        names[BASE] = BASE
    tokens = [int(item["tokens"]) for item in items]
    has_answers = bool(items) and all("right" in item for item in items)
    results = {
        who: Result(
            [float(item["nats"][name]) for item in items],
            tokens,
            [bool(item["right"][name]) for item in items] if has_answers else None,
        )
        for who, name in names.items()
    }
    return Evaluated(about["source"], about["sha256"], [item["origin"] for item in items], results)


def _subject(run_dir: RunDir, subjects: Sequence[Mapping[str, Any]]) -> str | None:
    """Under which name the run's adapter was evaluated; the folder may have been moved since."""
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

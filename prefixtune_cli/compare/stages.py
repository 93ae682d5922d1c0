"""The stages of a comparison: a sweep of learning rates, the other seeds at the best rate, and the test rows.

A cell that fails is marked and the others go on. A finished cell is not trained again, so that the same command goes on
where an earlier one stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.cells import is_done, judge_cell, train_cell
from prefixtune_cli.compare.comparison import Point
from prefixtune_cli.compare.contest import Entry, learning_rates
from prefixtune_cli.compare.rows import Rows
from prefixtune_cli.compare.wording import edge_of_sweep
from prefixtune_cli.compare.workers import Failure, Workers
from prefixtune_cli.evaluate.settings import Settings as EvalSettings
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir


class Stages:
    """Trains and judges the cells, and keeps what `collect` cannot read from their run directories.

    Attributes:
        failures: run directory → why the cell failed.
        rates: contestant → its chosen learning rate.
        sweeps: contestant → its learning rates with their figures; empty where there was one alone.
        judged_base: the run whose eval/ has the base's results as well; None where no cell finished.
    """

    def __init__(
        self,
        contest: Sequence[Entry],
        seeds: Sequence[int],
        rows: Rows,
        folder: Path,
        workers: Workers,
        reporter: Reporter,
    ) -> None:
        self._contest = contest
        self._seeds = seeds
        self._rows = rows
        self._folder = folder
        self._workers = workers
        self._reporter = reporter
        self.failures: dict[str, str] = {}
        self.rates: dict[str, float] = {}
        self.sweeps: dict[str, list[Point]] = {}
        self.judged_base: str | None = None

    def sweep(self, count: int) -> None:
        """Train each contestant with `count` learning rates on the first seed; the validation rows choose one."""
        rates = {e.label: learning_rates(e.recipe, count) for e in self._contest}
        first = self._seeds[0]
        self._train(
            "sweep" if count > 1 else "first seed",
            [(entry, first, rate) for entry in self._contest for rate in rates[entry.label]],
        )
        for entry in self._contest:
            points = [self._point(entry, rate) for rate in rates[entry.label]]
            best = min(points, key=_merit).learning_rate
            self.rates[entry.label] = best
            self.sweeps[entry.label] = points if count > 1 else []
            if edge := edge_of_sweep(entry.label, points, best):
                self._reporter.notice(edge)

    def repeat(self) -> None:
        """Train the other seeds at the chosen rates."""
        others = self._seeds[1:]
        cells = [(e, seed, self.rates[e.label]) for e in self._contest for seed in others]
        self._train("seeds", cells)

    def judge(self, settings: EvalSettings) -> None:
        """Have the chosen runs answer the test rows of the settings, and the base beside the first that can do so."""
        named = {
            run: f"{entry.label}, seed {seed}"
            for entry in self._contest
            for seed, run in self.chosen(entry)
            if run not in self.failures
        }
        self.judged_base = next(iter(named), None)
        jobs = {
            run: (name, (run, replace(settings, base=run == self.judged_base)))
            for run, name in named.items()
        }
        self._do("test", judge_cell, jobs)
        sound = [run for run in named if run not in self.failures]
        if sound and self.judged_base in self.failures:
            self.judged_base = run = sound[0]
            self._do("base", judge_cell, {run: (named[run], (run, replace(settings, base=True)))})

    def chosen(self, entry: Entry) -> list[tuple[int, str]]:
        """The seeds, and the run directories of the cells at the chosen rate."""
        return [(seed, self._run(entry, seed, self.rates[entry.label])) for seed in self._seeds]

    def _run(self, entry: Entry, seed: int, rate: float) -> str:
        return str(self._folder / "cells" / entry.folder / f"lr-{rate:g}" / f"seed-{seed}")

    def _train(self, stage: str, cells: Sequence[tuple[Entry, int, float]]) -> None:
        """Train those of the cells (contestant, seed, learning rate) that are not done."""
        jobs: dict[str, tuple[str, tuple[Recipe]]] = {}
        anew = 0
        for entry, seed, rate in cells:
            run = self._run(entry, seed, rate)
            data = {"train": str(self._rows.train[seed]), "eval": str(self._rows.validation)}
            recipe = entry.cell(seed, rate, run, data)
            if not is_done(recipe):
                jobs[run] = (f"{entry.label}, seed {seed}, lr {rate:g}", (recipe,))
                anew += RunDir(run).finished
        if len(jobs) < len(cells):
            done = len(cells) - len(jobs)
            self._reporter.notice(f"{done} of {len(cells)} cells are finished already.")
        if anew:
            self._reporter.warning(
                f"{anew} finished cells have another recipe, base or data, and are trained anew."
            )
        self._do(stage, train_cell, jobs)

    def _do(
        self,
        stage: str,
        work: Callable[..., Failure],
        jobs: Mapping[str, tuple[str, tuple[Any, ...]]],
    ) -> None:
        """Do the work of a stage; the jobs are run directory → name of the cell, arguments of the work."""
        runs, task = list(jobs), f"cells ({stage})"
        arguments = [given for _, given in jobs.values()]
        self._reporter.progress(task, 0, len(runs), {})
        ended = self._workers.run(work, arguments, reporter=self._reporter)
        for done, (i, failure) in enumerate(ended, 1):
            if failure is not None:
                self.failures[runs[i]] = failure
                self._reporter.warning(f"{jobs[runs[i]][0]} failed: {failure}")
            self._reporter.progress(task, done, len(runs), {})

    def _point(self, entry: Entry, rate: float) -> Point:
        run = self._run(entry, self._seeds[0], rate)
        if run in self.failures:
            return Point(rate, None, None, run, self.failures[run])
        found = summary(run)
        score = found["preferences"] or found["adapter"]
        failure = None if score["loss"] is not None else "Its held-out loss is not a number."
        return Point(rate, score["loss"], score.get("exact_match"), run, failure)


def _merit(point: Point) -> tuple[bool, float, float]:
    """Smaller is better: more exact matches, and among equals less loss; a point that failed is last."""
    if point.loss is None:
        return (True, 0.0, 0.0)
    return (False, -(point.exact_match or 0.0), point.loss)


def summary(run: str) -> dict[str, Any]:
    """The summary.json of a run."""
    found: dict[str, Any] = json.loads(RunDir(run).summary.read_text(encoding="utf-8"))
    return found

"""`ptp compare --methods …`: every method trained, judged and timed, fairly. Reads from top to bottom.

All that can be refused is refused before a model loads. A cell that fails is marked, and the rest goes on; what is
finished is not done again, so that the same command goes on where an earlier one stopped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefixtune_cli import model as models
from prefixtune_cli.compare.cells import (
    BASES,
    Sheet,
    is_done,
    judge_cell,
    results_of,
    train_cell,
    why_unmatched,
)
from prefixtune_cli.compare.comparison import (
    BASE,
    FORGETTING,
    OOD,
    TEST,
    Cell,
    Comparison,
    Contestant,
    Point,
)
from prefixtune_cli.compare.contest import Entry, Settings, entries
from prefixtune_cli.compare.costs import (
    costs_of,
    most_virtual_tokens,
    room_of,
    shape_of,
    with_costs,
)
from prefixtune_cli.compare.folder import RESULTS, claimed, mark
from prefixtune_cli.compare.rows import VALIDATION, Rows, draw_rows
from prefixtune_cli.compare.wording import data_name, edge_of_sweep
from prefixtune_cli.compare.workers import Ended, Work, Workers, told_to_stop
from prefixtune_cli.errors import Interrupted, PtpError
from prefixtune_cli.evaluate.answer_cache import check_room
from prefixtune_cli.evaluate.evaluations import WINDOW
from prefixtune_cli.evaluate.forgetting import prepare as prepare_text
from prefixtune_cli.evaluate.matching import rule_sentence
from prefixtune_cli.parallel.devices import device, processes_here, show_only, slow_precision
from prefixtune_cli.parallel.processes import check_environment
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, write_json
from prefixtune_cli.tokenizer import check_base, load_config, load_tokenizer
from prefixtune_cli.train.environment import describe_environment

ANSWERS = "answers"
SMALL_BASE = 64 * 2**20  # parameters; several such bases share a CPU
MOST_WORKERS = 4


def compare(
    settings: Settings,
    reporter: Reporter | None = None,
    *,
    begin: Callable[[], object] | None = None,
) -> tuple[Comparison, Path]:
    """Compare methods, and write results.json as soon as there is something to tell.

    Args:
        settings: what was asked for.
        reporter: is told what happens.
        begin: what a worker process calls first.

    Returns:
        what was found, and the comparison's folder.

    Raises:
        PtpError: see `errors`; everything that can be checked is checked before a model loads.
        Interrupted: what is finished is kept, and the same command goes on.
    """
    reporter = reporter or Silent()
    check_environment()
    with told_to_stop():
        return _compare(settings, reporter, begin)


def _compare(
    settings: Settings, reporter: Reporter, begin: Callable[[], object] | None
) -> tuple[Comparison, Path]:
    contest = entries(settings)
    folder = settings.folder(contest[0].recipe)
    with claimed(folder):
        return _compared(contest, settings, folder, reporter, begin), folder


def _compared(
    contest: Sequence[Entry],
    settings: Settings,
    folder: Path,
    reporter: Reporter,
    begin: Callable[[], object] | None,
) -> Comparison:
    """What is found, in a folder that is claimed."""
    recipe = contest[0].recipe
    for entry in contest:
        models.check_precision(entry.recipe.model, entry.method)
        models.check_method(entry.recipe.model, entry.recipe.adapter)
    check_base(recipe.model)
    contest = [replace(one, recipe=models.with_learning_rate(one.recipe)) for one in contest]
    recipe = contest[0].recipe
    window = _window(contest, settings)
    seeds = [recipe.train.seed + i for i in range(settings.seeds)]
    rows = draw_rows(
        recipe, folder / "data", seeds,
        few_shot=settings.few_shot, ood=settings.ood, begin=lambda: mark(folder), reporter=reporter,
    )  # fmt: skip
    check_room(folder / ANSWERS, 0)
    if (slow := slow_precision(recipe.model.bits, recipe.model.device)) is not None:
        reporter.notice(slow)
    workers = Workers(*_workers(settings, recipe), begin)
    try:
        cells = _Cells(settings, contest, rows, seeds, folder, window, workers, reporter)
        cells.sweep()
        cells.repeat()
        cells.judge()
    finally:
        workers.close()
    found = cells.comparison()
    if settings.speed:
        write_json(folder / RESULTS, found.to_json())
        found = _with_costs(found, contest, settings, reporter)
    write_json(folder / RESULTS, found.to_json())
    return found


class _Cells:
    """The cells of a comparison, stage by stage."""

    def __init__(
        self,
        settings: Settings,
        contest: Sequence[Entry],
        rows: Rows,
        seeds: Sequence[int],
        folder: Path,
        window: int | None,
        workers: Workers,
        reporter: Reporter,
    ) -> None:
        self._settings = settings
        self._contest = contest
        self._rows = rows
        self._seeds = seeds
        self._folder = folder
        self._workers = workers
        self._reporter = reporter
        self._failures: dict[str, str] = {}  # run directory → why
        self._points: dict[str, list[Point]] = {}  # label → sweep
        self._rates: dict[str, float] = {}  # label → the one that was chosen
        self._sheet = Sheet(
            {TEST: rows.test, **({OOD: rows.ood} if rows.ood else {})},
            settings.text,
            window,
            rows=contest[0].recipe.evaluate.max_rows,
            cache=folder / ANSWERS,
            base=False,
        )

    def sweep(self) -> None:
        """Train each contestant with each of its learning rates on the first seed; the validation rows choose."""
        rates = {e.label: e.learning_rates(self._settings.sweep) for e in self._contest}
        first = self._seeds[0]
        stage = "sweep" if self._settings.sweep > 1 else "first seed"
        self._train([(e, first, rate) for e in self._contest for rate in rates[e.label]], stage)
        for entry in self._contest:
            points = [self._point(entry, rate) for rate in rates[entry.label]]
            self._points[entry.label] = points if len(points) > 1 else []
            best = min(points, key=_merit)
            self._rates[entry.label] = best.learning_rate
            if edge := edge_of_sweep(entry.label, points, best.learning_rate):
                self._reporter.notice(edge)

    def repeat(self) -> None:
        """Train the other seeds at the chosen rates."""
        self._train(
            [(e, seed, self._rates[e.label]) for e in self._contest for seed in self._seeds[1:]],
            "seeds",
        )

    def judge(self) -> None:
        """Have the chosen runs answer the test rows, and the base with the first of them."""
        runs = [
            run for e in self._contest for _, run in self._chosen(e) if run not in self._failures
        ]
        work: list[Work] = [
            (judge_cell, (run, replace(self._sheet, base=i == 0))) for i, run in enumerate(runs)
        ]
        ended = self._progress("test", [Path(run).parent.parent.name for run in runs])
        for run, end in zip(runs, self._workers.run(work, ended, **self._here()), strict=True):
            if end.failure is not None:
                self._failures[run] = end.failure
        self._judged_base = runs[0] if runs else None

    def comparison(self) -> Comparison:
        """All that was found."""
        recipe, rows = self._contest[0].recipe, self._rows
        base = {}
        if self._judged_base is not None:
            base = results_of(self._judged_base, self._sheet, "base")
        told = self._judged_base and RunDir(self._judged_base).eval_result(FORGETTING)
        about = {name: dict(found) for name, found in rows.about.items()}
        for name in (TEST, OOD):
            if name in about and about[name]["rows"] > self._sheet.rows:
                about[name]["evaluated"] = self._sheet.rows
        if told and told.exists() and self._settings.text is not None:
            text = json.loads(told.read_text(encoding="utf-8"))["text"]
            about[FORGETTING] = {"rows": text["evaluated"]} | {
                name: text[name] for name in ("source", "sha256")
            }
        contestants = [self._contestant(entry) for entry in self._contest]
        found = Comparison(
            name=self._folder.name,
            kind="trained",
            command=self._settings.command,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model={
                **recipe.model.model_dump(include={"name", "revision", "bits"}),
                "parameters": models.skeleton(recipe.model).num_parameters(),
            },
            data=about,
            protocol=self._protocol(contestants),
            environment=describe_environment({}, 1),
            base=base,
            contestants=contestants,
            notices=self._notices(contestants),
        )
        return found

    def _train(self, cells: Sequence[tuple[Entry, int, float]], stage: str) -> None:
        recipes = [self._recipe(*cell) for cell in cells]
        todo = [i for i, recipe in enumerate(recipes) if not is_done(recipe)]
        if len(todo) < len(cells):
            self._reporter.notice(
                f"{len(cells) - len(todo)} of {len(cells)} cells are finished already."
            )
        if anew := [r for r in recipes if RunDir(r.folder).finished and not is_done(r)]:
            self._reporter.warning(
                f"{len(anew)} finished cells have another recipe, base or data, and are trained anew."
            )
        names = [f"{cells[i][0].label}, seed {cells[i][1]}, lr {cells[i][2]:g}" for i in todo]
        work: list[Work] = [(train_cell, (recipes[i],)) for i in todo]
        found = self._workers.run(work, self._progress(stage, names), **self._here())
        for i, end in zip(todo, found, strict=True):
            if end.failure is not None:
                self._failures[str(recipes[i].out)] = end.failure

    def _here(self) -> dict[str, Any]:
        return {"reporter": self._reporter} if self._workers.count == 1 else {}

    def _progress(self, stage: str, names: Sequence[str]) -> Callable[[int, Ended], None]:
        done = 0
        self._reporter.progress(f"cells ({stage})", 0, len(names), {})

        def ended(i: int, how: Ended) -> None:
            nonlocal done
            done += 1
            if how.failure is not None:
                self._reporter.warning(f"{names[i]} failed: {how.failure}")
            self._reporter.progress(f"cells ({stage})", done, len(names), {})

        return ended

    def _recipe(self, entry: Entry, seed: int, rate: float) -> Recipe:
        return entry.cell(
            seed,
            rate,
            self._run(entry, seed, rate),
            {"train": str(self._rows.train[seed]), "eval": str(self._rows.validation)},
        )

    def _run(self, entry: Entry, seed: int, rate: float) -> str:
        return str(self._folder / "cells" / entry.folder / f"lr-{rate:g}" / f"seed-{seed}")

    def _chosen(self, entry: Entry) -> list[tuple[int, str]]:
        """Seeds and run directories of the contestant's cells."""
        return [(s, self._run(entry, s, self._rates[entry.label])) for s in self._seeds]

    def _point(self, entry: Entry, rate: float) -> Point:
        run = self._run(entry, self._seeds[0], rate)
        if run in self._failures:
            return Point(rate, None, None, run, self._failures[run])
        score = _summary(run)["adapter"]
        failure = None if score["loss"] is not None else "Its held-out loss is not a number."
        return Point(rate, score["loss"], score["exact_match"], run, failure)

    def _contestant(self, entry: Entry) -> Contestant:
        cells = [self._cell(seed, run) for seed, run in self._chosen(entry)]
        whole = next((_summary(c.run) for c in cells if c.failure is None), {})
        return Contestant(
            label=entry.label,
            method=entry.method,
            settings=entry.settings,
            learning_rate=self._rates[entry.label],
            trainable_parameters=whole.get("trainable_parameters"),
            adapter_bytes=whole.get("adapter_bytes"),
            cells=cells,
            sweep=self._points[entry.label],
        )

    def _cell(self, seed: int, run: str) -> Cell:
        failure = self._failures.get(run)
        if not RunDir(run).finished:
            return Cell(seed, run, failure=failure)
        losses = [(r["step"], r["loss"]) for r in RunDir(run).read_metrics() if "loss" in r]
        return Cell(
            seed=seed,
            run=run,
            steps=_summary(run)["steps"],
            failure=failure,
            results=results_of(run, self._sheet, "adapter"),
            losses=losses,
        )

    def _protocol(self, contestants: Iterable[Contestant]) -> dict[str, Any]:
        settings, train = self._settings, self._contest[0].recipe.train
        steps = sorted({c.steps for one in contestants for c in one.cells if c.steps is not None})
        return {
            "seeds": list(self._seeds),
            "steps": steps[0] if len(steps) == 1 else None,
            "batch": train.batch_size * train.gradient_accumulation,
            "schedule": train.schedule,
            "sweep": settings.sweep,
            "sweep_chosen_on": VALIDATION,
            "few_shot": settings.few_shot,
        }

    def _notices(self, contestants: Iterable[Contestant]) -> list[str]:
        found = list(self._rows.notices)
        if pattern := self._contest[0].recipe.evaluate.answer_pattern:
            found.append(rule_sentence(pattern))
        if self._judged_base is not None:
            unmatched = why_unmatched(self._judged_base, self._sheet).items()
            found += [
                why if name == TEST else f"Of {data_name(name)}: {why}" for name, why in unmatched
            ]
        if len({c.steps for one in contestants for c in one.cells if c.steps is not None}) > 1:
            found.append("The contestants took different numbers of steps, as the grid asks for.")
        if self._settings.few_shot is not None and self._settings.sweep > 1:
            rows = self._rows.about[VALIDATION]["rows"]
            found.append(f"The learning rates were chosen on {rows} labelled rows beside those.")
        return found


def _merit(point: Point) -> tuple[bool, float, float]:
    """Smaller is better: exact match where answers are short, and then the loss."""
    if point.loss is None:
        return (True, 0.0, 0.0)
    return (False, -(point.exact_match or 0.0), point.loss)


def _summary(run: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RunDir(run).summary.read_text(encoding="utf-8"))
    return found


def _window(contest: Sequence[Entry], settings: Settings) -> int | None:
    """Tokens of a stretch of text on which forgetting is measured: so many that all contestants have room for them."""
    if settings.text is None:
        return None
    recipe = contest[0].recipe
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model).get_text_config()
    most = getattr(config, "max_position_embeddings", None) or WINDOW
    room = min(most, int(tokenizer.model_max_length)) - most_virtual_tokens(contest)
    window = min(WINDOW, room)
    prepare_text(settings.text, tokenizer, window, recipe.evaluate.max_rows)
    return window


def _with_costs(
    found: Comparison, contest: Sequence[Entry], settings: Settings, reporter: Reporter
) -> Comparison:
    """What was found is not lost where the costs cannot be measured."""
    recipe = contest[0].recipe
    try:
        with BASES.lent(recipe.model) as base:
            shape = shape_of(recipe, settings, room_of([base.config], contest))
            speeds = costs_of(contest, shape, base, reporter)
            return with_costs(found, {BASE: contest}, {BASE: speeds})
    except Interrupted:
        raise
    except PtpError as error:
        reporter.warning(f"The costs were not measured. {error}")
        return replace(found, unmeasured={c.label: str(error) for c in found.contestants})


def _workers(settings: Settings, recipe: Recipe) -> tuple[int, list[str]]:
    """How many processes, and their GPUs; this process has the first of them."""
    if device(recipe.model.device).type == "cuda":
        count = processes_here(recipe.train.gpus or "auto", recipe.model.device)
        show_only(recipe.train.gpus)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
        names = visible.split(",")[: min(settings.workers or count, count)]
        return len(names), names
    if settings.workers is not None:
        return settings.workers, []
    small = models.skeleton(recipe.model).num_parameters() <= SMALL_BASE
    return (min(MOST_WORKERS, os.cpu_count() or 1) if small else 1), []

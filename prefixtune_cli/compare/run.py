"""`ptp compare --methods …`: every method is trained, judged and timed under the same conditions.

Whatever can be refused is refused before a model loads.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from prefixtune_cli import model as models
from prefixtune_cli.compare.cells import BASES
from prefixtune_cli.compare.collect import collect
from prefixtune_cli.compare.comparison import BASE, FORGETTING, Comparison
from prefixtune_cli.compare.contest import Entry, Settings, entries
from prefixtune_cli.compare.costs import (
    costs_of,
    room_of,
    shape_of,
    with_costs,
)
from prefixtune_cli.compare.folder import RESULTS, claimed
from prefixtune_cli.compare.rows import draw_rows
from prefixtune_cli.compare.speed import most_virtual_tokens
from prefixtune_cli.compare.stages import Stages
from prefixtune_cli.compare.workers import Workers, told_to_stop
from prefixtune_cli.errors import Interrupted, PtpError
from prefixtune_cli.evaluate.answer_cache import check_room
from prefixtune_cli.evaluate.evaluations import WINDOW
from prefixtune_cli.evaluate.forgetting import prepare as prepare_text
from prefixtune_cli.evaluate.settings import Settings as EvalSettings
from prefixtune_cli.parallel.devices import device, processes_here, show_only, slow_precision
from prefixtune_cli.parallel.processes import check_environment
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import write_json
from prefixtune_cli.tokenizer import check_base, load_config, load_tokenizer

SMALL_BASE = 64 * 2**20  # parameters; several bases of this size share a CPU
MOST_WORKERS = 4


def compare(
    settings: Settings,
    reporter: Reporter | None = None,
    *,
    begin: Callable[[], object] | None = None,
) -> tuple[Comparison, Path]:
    """Compare methods, and write results.json before and after the costs are measured.

    Args:
        settings: what was asked for.
        reporter: hears what happens.
        begin: each worker process calls it first.

    Returns:
        what was found, and the comparison's folder.

    Raises:
        PtpError: see `errors`; everything that can be checked is checked before a model loads.
        Interrupted: what is finished is kept, and the same command goes on.
    """
    reporter = reporter or Silent()
    check_environment()
    with told_to_stop():
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
    """Compare the contestants in a folder that no other command writes to."""
    for entry in contest:
        models.check_precision(entry.recipe.model, entry.method)
        models.check_method(entry.recipe.model, entry.recipe.adapter)
    check_base(contest[0].recipe.model)
    contest = [replace(one, recipe=models.with_learning_rate(one.recipe)) for one in contest]
    recipe = contest[0].recipe
    window = None if settings.text is None else _window(contest, settings.text)
    seeds = [recipe.train.seed + i for i in range(settings.seeds)]
    rows = draw_rows(
        recipe, folder, seeds, few_shot=settings.few_shot, ood=settings.ood, reporter=reporter
    )
    judging = EvalSettings(
        who=(),
        data=tuple(str(file) for file in (rows.test, rows.ood) if file is not None),
        benches=(FORGETTING,) if settings.text else (),
        text=settings.text,
        window=window,
        limit=recipe.evaluate.max_rows,
        cache=folder / "answers",
    )
    check_room(folder / "answers", 0)
    if (slow := slow_precision(recipe.model.bits, recipe.model.device)) is not None:
        reporter.notice(slow)
    count, gpus = _processes(settings, recipe)
    with Workers(count, gpus, begin) as workers:
        stages = Stages(contest, seeds, rows, folder, workers, reporter)
        stages.sweep(settings.sweep)
        stages.repeat()
        stages.judge(judging)
    found = collect(settings, contest, rows, folder, stages, judging)
    write_json(folder / RESULTS, found.to_json())
    if settings.speed and not recipe.on_preferences:
        found = _with_costs(found, contest, settings, reporter)
        write_json(folder / RESULTS, found.to_json())
    return found


def _window(contest: Sequence[Entry], text: str) -> int:
    """The tokens of a stretch of text on which forgetting is measured. Every contestant has room for them."""
    recipe = contest[0].recipe
    tokenizer = load_tokenizer(recipe.model)
    config = load_config(recipe.model).get_text_config()
    most = getattr(config, "max_position_embeddings", None) or WINDOW
    room = min(most, int(tokenizer.model_max_length)) - most_virtual_tokens(
        entry.recipe.adapter for entry in contest
    )
    window = min(WINDOW, room)
    prepare_text(text, tokenizer, window, recipe.evaluate.max_rows)
    return window


def _with_costs(
    found: Comparison, contest: Sequence[Entry], settings: Settings, reporter: Reporter
) -> Comparison:
    """Add the costs; where they cannot be measured, add why."""
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


def _processes(settings: Settings, recipe: Recipe) -> tuple[int, list[str]]:
    """How many processes there are, and the GPU of each; this process takes the first of them itself."""
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

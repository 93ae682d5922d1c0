"""One cell of a comparison: it is trained, it answers the test rows, and its results are read from its files.

The first two may run in another process, which keeps the base for its next cell: arguments and results can be pickled.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.wording import reason
from prefixtune_cli.compare.workers import Failure
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.errors import Interrupted, PtpError
from prefixtune_cli.evaluate.run import evaluate
from prefixtune_cli.evaluate.settings import Settings
from prefixtune_cli.evaluate.subjects import hash_of_base
from prefixtune_cli.pointed import point
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.load import difference, resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.train import train
from prefixtune_cli.train.checks import told_in_words
from prefixtune_cli.train.stop import StopRequest

BASES = SharedBase()  # this process's


def train_cell(recipe: Recipe, *, reporter: Reporter | None = None) -> Failure:
    """Train one cell, or go on with it; a cell that is done stays as it is.

    Raises:
        Interrupted: a signal came; what was done is kept.
    """
    run_dir = RunDir(recipe.folder)
    try:
        anew = run_dir.recipe.exists() and not _is_of(run_dir, recipe)
        if run_dir.finished and not anew:
            return None
        train(
            recipe,
            resume=False if anew else "auto",
            overwrite=anew,
            bases=BASES,
            reporter=reporter or Silent(),
        )
        run_dir.drop_checkpoints()
    except Interrupted:
        raise
    except Exception as error:
        return reason(error)
    return None


def is_done(recipe: Recipe) -> bool:
    """Whether the cell is finished, with this recipe, this base and this data."""
    run_dir = RunDir(recipe.folder)
    return run_dir.finished and _is_of(run_dir, recipe)


def judge_cell(run: str, settings: Settings, *, reporter: Reporter | None = None) -> Failure:
    """Have a finished run answer the test rows of the settings; the results are written to its eval/.

    Raises:
        Interrupted: a signal came.
    """
    run_dir = RunDir(run)
    stop = StopRequest(run_dir)
    for file in _results(run, settings).values():
        file.unlink(missing_ok=True)
    try:
        with stop.listening(), told_in_words(run_dir, stop):
            of_run = replace(settings, who=(point(run),))
            found = evaluate(of_run, reporter or Silent(), bases=BASES)
    except Interrupted:
        raise
    except Exception as error:
        return reason(error)
    return "; ".join(f"{name}: {why}" for name, why in found.failures.items()) or None


def judged(run: str, settings: Settings) -> dict[str, Any]:
    """Data set → what `judge_cell` has written of it."""
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in _results(run, settings).items()
        if file.exists()
    }


def _results(run: str, settings: Settings) -> dict[str, Path]:
    """Data set → its file in eval/; the files of rows are named by their data sets."""
    stems = {Path(file).stem: f"data-{Path(file).stem}" for file in settings.data}
    benches = {**stems, **{bench: bench for bench in settings.benches}}
    return {name: RunDir(run).eval_result(bench) for name, bench in benches.items()}


def _is_of(run_dir: RunDir, recipe: Recipe) -> bool:
    """Whether the run has this recipe, this base and this data; the paths of the files do not matter."""
    try:
        saved = resolve(str(run_dir.recipe))
        about: Any = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    except (PtpError, OSError, ValueError):
        return False
    data = saved.data.model_copy(update={"train": recipe.data.train, "eval": recipe.data.eval})
    if difference(saved.model_copy(update={"data": data, "out": recipe.out}), recipe):
        return False
    key = recipe.model.model_dump_json()
    if about.get("base_sha256") != BASES.once(key, lambda: hash_of_base(recipe.model)):
        return False
    sources = {"train": recipe.data.train, "eval": recipe.data.eval}
    return all(
        source is not None
        and about["data"].get(name, {}).get("sha256")
        == load_rows(source, recipe.data, recipe.kind).fingerprint
        for name, source in sources.items()
    )

"""One cell of a comparison: it is trained, it answers the test rows, and its results are read from its files.

The first two may run in another process, which keeps the base for its next cell: arguments and results can be pickled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.comparison import FORGETTING, Result
from prefixtune_cli.compare.finished_run import result_of
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


@dataclass(frozen=True)
class Sheet:
    """What every finished run is judged on.

    Attributes:
        data: data set → file of rows.
        text: what forgetting is measured on; None measures none.
        window: tokens of a stretch of `text`.
        rows: as many rows of each data set are scored.
        cache: the folder of answers that were generated before.
        base: whether the base is judged as well.
    """

    data: Mapping[str, Path]
    text: str | None
    window: int | None
    rows: int
    cache: Path
    base: bool


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


def judge_cell(run: str, sheet: Sheet, *, reporter: Reporter | None = None) -> Failure:
    """Have a finished run answer the test rows, and the base where the sheet says so.

    The results are written to the run's eval/.

    Raises:
        Interrupted: a signal came.
    """
    settings = Settings(
        who=(point(run),),
        base=sheet.base,
        data=tuple(map(str, sheet.data.values())),
        benches=(FORGETTING,) if sheet.text else (),
        text=sheet.text,
        window=sheet.window,
        limit=sheet.rows,
        cache=sheet.cache,
    )
    run_dir = RunDir(run)
    stop = StopRequest(run_dir)
    for bench in _benches(sheet).values():
        run_dir.eval_result(bench).unlink(missing_ok=True)
    try:
        with stop.listening(), told_in_words(run_dir, stop):
            found = evaluate(settings, reporter or Silent(), bases=BASES)
    except Interrupted:
        raise
    except Exception as error:
        return reason(error)
    return "; ".join(f"{name}: {why}" for name, why in found.failures.items()) or None


def _benches(sheet: Sheet) -> dict[str, str]:
    """Data set → the name of its file in eval/."""
    found = {name: f"data-{file.stem}" for name, file in sheet.data.items()}
    return {**found, FORGETTING: FORGETTING} if sheet.text else found


def results_of(run: str, sheet: Sheet, who: str) -> dict[str, Result]:
    """What `judge_cell` has found of `who`, which is the adapter or the base, by data set."""
    return {name: result_of(found["items"], who) for name, found in _judged(run, sheet).items()}


def why_unmatched(run: str, sheet: Sheet) -> dict[str, str]:
    """Data set → why no answer was matched there; data sets with matched answers are left out."""
    judged = _judged(run, sheet).items()
    return {name: why for name, found in judged if (why := found.get("why_no_exact_match"))}


def _judged(run: str, sheet: Sheet) -> dict[str, Any]:
    """The files that `judge_cell` has written, by data set."""
    files = {name: RunDir(run).eval_result(bench) for name, bench in _benches(sheet).items()}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


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
        and about["data"].get(name, {}).get("sha256") == load_rows(source, recipe.data).fingerprint
        for name, source in sources.items()
    )

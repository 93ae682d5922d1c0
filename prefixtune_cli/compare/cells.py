"""One cell of a comparison, where it is computed: trained, judged and read back, on a base that its process keeps.

Everything that goes in and out can be pickled, so that a cell may run in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.comparison import FORGETTING, Result
from prefixtune_cli.compare.workers import Ended
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
    """What a finished run is judged on: data set → file of rows; `text` is for forgetting, in windows of `window`."""

    data: Mapping[str, Path]
    text: str | None
    window: int | None
    rows: int
    cache: Path
    base: bool  # the base is judged as well


def train_cell(recipe: Recipe, *, reporter: Reporter | None = None) -> Ended:
    """Train one cell, or go on with it; what is finished with the same recipe and data is left as it is.

    Raises:
        Interrupted: a signal came; what was done is kept.
    """
    run_dir = RunDir(recipe.folder)
    try:
        anew = run_dir.recipe.exists() and not _is_of(run_dir, recipe)
        if run_dir.finished and not anew:
            return Ended()
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
        return Ended(_said(error))
    return Ended()


def is_done(recipe: Recipe) -> bool:
    """Whether the cell is finished already, with this recipe and this data."""
    run_dir = RunDir(recipe.folder)
    return run_dir.finished and _is_of(run_dir, recipe)


def judge_cell(run: str, sheet: Sheet, *, reporter: Reporter | None = None) -> Ended:
    """Have a finished run answer the test rows, and the base where the sheet says so; eval/ of the run gets it all."""
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
        return Ended(_said(error))
    failures = [f"{name}: {why}" for name, why in found.failures.items()]
    return Ended("; ".join(failures) or None)


def _benches(sheet: Sheet) -> dict[str, str]:
    """Data set → the name of its result."""
    found = {name: f"data-{file.stem}" for name, file in sheet.data.items()}
    return {**found, FORGETTING: FORGETTING} if sheet.text else found


def results_of(run: str, sheet: Sheet, who: str) -> dict[str, Result]:
    """What `judge_cell` has written, by data set, of `who`: the adapter or the base."""
    return {name: _result(found["items"], who) for name, found in _judged(run, sheet).items()}


def why_unmatched(run: str, sheet: Sheet) -> dict[str, str]:
    """Data set → why no answer was matched there; without those in which answers were."""
    judged = _judged(run, sheet).items()
    return {name: why for name, found in judged if (why := found.get("why_no_exact_match"))}


def _judged(run: str, sheet: Sheet) -> dict[str, Any]:
    """What `judge_cell` has written, by data set."""
    files = {name: RunDir(run).eval_result(bench) for name, bench in _benches(sheet).items()}
    return {
        name: json.loads(file.read_text(encoding="utf-8"))
        for name, file in files.items()
        if file.exists()
    }


def _result(items: Sequence[Mapping[str, Any]], who: str) -> Result:
    right = [bool(item["right"][who]) for item in items if "right" in item]
    return Result(
        nats=[item["nats"][who] for item in items],
        tokens=[item["tokens"] for item in items],
        right=right or None,
    )


def _is_of(run_dir: RunDir, recipe: Recipe) -> bool:
    """Whether the run in the folder has this recipe, this base and this data, wherever their files lie."""
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


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, PtpError) else f"{type(error).__name__}: {error}"

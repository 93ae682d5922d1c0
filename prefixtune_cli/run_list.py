"""The runs below a folder, as `ptp runs` lists them, and the newest finished one, which commands use by default."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import RecipeError
from prefixtune_cli.lock import in_use
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.run_dir import RunDir, step_of

RUNS = Path("runs")  # where `ptp train` puts them


@dataclass(frozen=True)
class Listed:
    """One run.

    Attributes:
        run: its folder.
        model, method: from its recipe; None if the recipe cannot be read.
        state: `finished`, `running`, `unfinished`, or why the run cannot be read.
        loss: the adapter's loss on the held-out rows, in nats per token, or per pair of answers; None if there is
            none yet, or it is no number.
        date: when the run was last written.
    """

    run: str
    model: str | None
    method: str | None
    state: str
    loss: float | None
    date: datetime

    def to_json(self) -> dict[str, Any]:
        return {**self.__dict__, "date": self.date.isoformat(timespec="seconds")}


def runs_below(folder: Path = RUNS) -> list[RunDir]:
    """The run directories at any depth below `folder`, or `folder` itself."""
    found = []
    for where, inside, _ in os.walk(folder):
        run = RunDir(where)
        if run.recipe.is_file():
            found.append(run)
            inside.clear()
        inside[:] = [name for name in inside if not name.startswith(".")]
    return found


def newest_finished(folder: Path = RUNS) -> RunDir | None:
    """The run below `folder` that finished last."""
    finished = (run for run in runs_below(folder) if run.finished)
    return max(finished, key=lambda run: run.summary.stat().st_mtime, default=None)


def list_runs(folder: Path = RUNS) -> list[Listed]:
    """All runs below `folder`, the newest first."""
    return sorted(map(_listed, runs_below(folder)), key=lambda one: one.date, reverse=True)


def _listed(run: RunDir) -> Listed:
    last = run.summary if run.finished else run.metrics if run.metrics.exists() else run.recipe
    date = datetime.fromtimestamp(last.stat().st_mtime).astimezone()
    try:
        recipe = resolve(str(run.recipe))
        loss = _loss(json.loads(run.summary.read_text())) if run.finished else None
    except RecipeError:
        return Listed(str(run.path), None, None, "its recipe cannot be read", None, date)
    except (OSError, ValueError, KeyError, TypeError):
        return Listed(str(run.path), None, None, "its summary cannot be read", None, date)
    saved = run.checkpoints()
    step = f", saved at step {step_of(saved[-1])}" if saved else ""
    going = "running" if in_use(run.path) else "unfinished"
    state = "finished" if run.finished else f"{going}{step}"
    return Listed(str(run.path), recipe.model.name, recipe.adapter.method, state, loss, date)


def _loss(summary: Any) -> float | None:
    """The adapter's held-out loss, by the run's own objective."""
    loss: float | None = (summary.get("preferences") or summary["adapter"])["loss"]
    return loss

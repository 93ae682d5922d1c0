"""The run directory: the only place that knows the names in it.

Every file is written beside itself and renamed into place, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import RunDirError


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write `path` whole or not at all.

    Args:
        path: the file to write; its folder is made.
        content: the text, the bytes, or a function that writes a file of its own at the path that it is given.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")
    try:
        if callable(content):
            content(beside)
        else:
            with open(beside, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            beside.unlink()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_atomically(path, to_json(value) + "\n")


def to_json(value: Any) -> str:
    """`value` as indented JSON; numbers that are not finite, which JSON does not know, become null."""
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


class RunDir:
    """One run's folder.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def recipe(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def loss_plot(self) -> Path:
        return self.path / "loss.png"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def chat_template(self) -> Path:
        """A copy of the template that the run was trained with, where the recipe names one."""
        return self.path / "chat_template.jinja"

    @property
    def answers(self) -> Path:
        return self.path / "eval" / "held-out.jsonl"

    @property
    def tracker_logs(self) -> Path:
        return self.path / "tracker"

    @property
    def summary(self) -> Path:
        """Written last: its presence means that the run finished."""
        return self.path / "summary.json"

    def eval_result(self, bench: str) -> Path:
        return self.path / "eval" / f"{bench}.json"

    @property
    def finished(self) -> bool:
        return self.summary.exists()

    @property
    def resume_command(self) -> str:
        """What the user types to go on with the run: its recipe names this folder as `out`."""
        return f"ptp train --recipe {shlex.quote(str(self.recipe))} --resume"

    def checkpoints(self) -> list[Path]:
        """The complete checkpoints, oldest first; a half-written one has no trainer_state.json."""
        found = [p for p in self.path.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
        return sorted(
            (p for p in found if p.name.split("-")[1].isdigit()),
            key=lambda p: int(p.name.split("-")[1]),
        )

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that is taken.

        Raises:
            RunDirError: it holds something, and `overwrite` is off; or it is not a folder of ours.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError(f"The output directory {self.path} is a file. Give another --out.")
        if not self.path.exists() or not any(self.path.iterdir()):
            return
        if not overwrite:
            resumable = self.recipe.exists() and not self.finished
            hint = "--resume to go on with the run in it, " if resumable else ""
            raise RunDirError(
                f"The output directory {self.path} is not empty. Type {hint}--overwrite to delete what is in it, "
                "or --out with another name."
            )
        if not self.recipe.exists():
            raise RunDirError(
                f"{self.path} is not empty and not a run directory (it has no recipe.yaml), so it is not "
                "overwritten. Give another --out."
            )

    def check_adapter(self) -> None:
        """Raise RunDirError where this is no run, or one without an adapter yet."""
        if not self.recipe.exists():
            raise RunDirError(
                f"{self.path} is not a run directory (it has no recipe.yaml). The runs are under runs/."
            )
        if not self.adapter.exists():
            raise RunDirError(
                f"The run in {self.path} has no adapter yet. To go on with it: {self.resume_command}"
            )

    def create(self, *, overwrite: bool) -> None:
        """Make the folder for a new run, empty; raises what `check_free` does."""
        self.check_free(overwrite=overwrite)
        if self.path.exists():
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl (one write call, so that a crash leaves whole lines)."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        return list(self._metric_rows())

    def _metric_rows(self) -> Iterator[dict[str, Any]]:
        if not self.metrics.exists():
            return
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                yield json.loads(line)

    def truncate_metrics(self, step: int) -> None:
        """Forget what was logged after `step`, before a run goes on from that step."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

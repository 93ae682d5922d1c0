"""The run directory. Only this module knows the names of its files.

Every file is written under a temporary name and then renamed, so a reader never sees half of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import RunDirError
from prefixtune_cli.lock import LOCK

HASHES = "sha256.json"


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write `path` whole or not at all.

    Args:
        path: the file to write; its folder is created.
        content: the text, the bytes, or a function that takes a path and writes a file there.
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
    """`value` as indented JSON. NaN and infinity, which JSON lacks, become null."""
    return _encodable(_finite(value), indent=2, allow_nan=False)


def json_line(row: Any) -> str:
    """`row` as a line of JSON Lines. Types that JSON lacks, such as dates, become text."""
    return _encodable(_finite(row), default=str, allow_nan=False) + "\n"


def _encodable(value: Any, **settings: Any) -> str:
    """JSON in plain characters, or in escapes if a text holds half a surrogate pair, which no file can hold."""
    text = json.dumps(value, ensure_ascii=False, **settings)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(value, **settings)
    return text


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def step_of(checkpoint: Path) -> int:
    """The optimizer step at which a checkpoint was saved."""
    return int(checkpoint.name.split("-")[1])


def _aside(folder: Path) -> Path:
    """A free path, to which a folder is moved before it is deleted."""
    aside = folder.with_name(f".{folder.name}.old.part")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def _sha256(file: Path, *, to_disk: bool = False) -> str:
    with open(file, "rb") as opened:
        if to_disk:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint; None if nothing is."""
    try:
        hashes = json.loads((folder / HASHES).read_text(encoding="utf-8"))
        for name, digest in hashes.items():
            if not (folder / name).is_file():
                return f"{name} is missing"
            if _sha256(folder / name) != digest:
                return f"{name} has changed since it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{HASHES} cannot be read ({error})"
    return None


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
        """A copy of the template that the run was trained with, if the recipe names one."""
        return self.path / "chat_template.jinja"

    @property
    def answers(self) -> Path:
        return self.path / "eval" / "held-out.jsonl"

    @property
    def reference(self) -> Path:
        """What the answers of a run on pairs are compared with: log-probabilities."""
        return self.path / "reference.json"

    @property
    def merge_info(self) -> Path:
        """The pictures of `ptp merge-info`."""
        return self.path / "merge-info"

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
        """The command that continues the run. Its recipe names this folder as `out`."""
        return f"ptp train --recipe {shlex.quote(str(self.recipe))} --resume"

    @property
    def how_to_go_on(self) -> str:
        """How much of a run that has died is saved, and the command that continues it."""
        if saved := self.checkpoints():
            return f"The run is saved up to step {step_of(saved[-1])}. To go on, type: {self.resume_command}"
        again = f" To begin again, type: {self.resume_command}" if self.recipe.exists() else ""
        return f"No checkpoint was saved yet.{again}"

    def checkpoint(self, step: int) -> Path:
        return self.path / f"checkpoint-{step}"

    @property
    def checkpoint_part(self) -> Path:
        """Where a checkpoint is written before it is sealed."""
        return self.path / ".checkpoint.part"

    def checkpoints(self) -> list[Path]:
        """The finished checkpoints, oldest first. A half-written one has no list of hashes."""
        found = [p for p in self.path.glob("checkpoint-*") if (p / HASHES).exists()]
        return sorted((p for p in found if p.name.split("-")[1].isdigit()), key=step_of)

    def seal(self, part: Path, step: int) -> None:
        """Flush a finished checkpoint to disk, add the hashes of its files, and move it to its final place."""
        hashes = {
            str(file.relative_to(part)): _sha256(file, to_disk=True)
            for file in sorted(part.rglob("*"))
            if file.is_file()
        }
        write_json(part / HASHES, hashes)
        self.place(part, self.checkpoint(step))

    def place(self, part: Path, final: Path) -> None:
        """Move a finished folder to its final place. An old folder there is renamed first, then deleted."""
        aside = _aside(final)
        if final.exists():
            os.replace(final, aside)
        os.replace(part, final)
        shutil.rmtree(aside, ignore_errors=True)

    def newest_whole_checkpoint(self) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is not damaged.

        Returns:
            its folder, or None if there is none; and a sentence about each newer one, which is damaged.
        """
        said: list[str] = []
        for folder in reversed(self.checkpoints()):
            if (damage := _damage(folder)) is None:
                return folder, said
            said.append(f"{folder} is damaged and left out: {damage}.")
        return None, said

    def check_free(self, *, overwrite: bool) -> None:
        """Refuse a folder that is taken.

        Raises:
            RunDirError: the folder is not empty and `overwrite` is off; or it is not a run directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunDirError(f"The output directory {self.path} is a file. Give another --out.")
        if not self.path.exists() or not self._taken():
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

    def _taken(self) -> bool:
        """Whether the folder holds more than a run leaves if it is killed before it writes its recipe."""
        first = {self.environment, self.chat_template, self.path / LOCK}
        return any(
            path not in first and not (path.name.startswith(".") and ".part" in path.name)
            for path in self.path.iterdir()
        )

    def check_resumable(self) -> None:
        """Raise RunDirError if there is no run to go on with."""
        if not self.recipe.exists():
            raise RunDirError(
                f"There is no run in {self.path} to resume (no recipe.yaml). Leave --resume out."
            )
        if self.finished:
            raise RunDirError(
                f"The run in {self.path} is finished (it has a summary.json). Type --overwrite to train it again."
            )

    def create(self, *, overwrite: bool) -> None:
        """Create the folder for a new run, or empty it; raises what `check_free` raises."""
        self.check_free(overwrite=overwrite)
        self.path.mkdir(parents=True, exist_ok=True)
        # The recipe is deleted last: it marks the folder as a run's.
        for inside in sorted(self.path.iterdir(), key=lambda path: path == self.recipe):
            if inside.name == LOCK:  # this command's own
                continue
            if inside.is_dir() and not inside.is_symlink():
                shutil.rmtree(inside)
            else:
                inside.unlink()

    def drop_old_checkpoints(self, kept: int) -> None:
        """Delete all but the newest `kept` checkpoints, and what is left of those that a killed run was deleting."""
        for old in self.checkpoints()[:-kept]:
            with contextlib.suppress(OSError):
                os.replace(old, _aside(old))
        for aside in self.path.glob(".checkpoint-*.part"):
            shutil.rmtree(aside, ignore_errors=True)

    def drop_checkpoints(self) -> None:
        """Delete all checkpoints of a finished run."""
        assert self.finished
        for folder in self.checkpoints():
            shutil.rmtree(folder, ignore_errors=True)

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl (one write call, so that a crash leaves whole lines)."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """All whole lines of metrics.jsonl."""
        if not self.metrics.exists():
            return []
        rows = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                rows.append(json.loads(line))
        return rows

    def truncate_metrics(self, step: int) -> None:
        """Delete the rows that were logged after `step`, before a run continues from that step."""
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        write_atomically(self.metrics, "".join(json.dumps(row) + "\n" for row in rows))

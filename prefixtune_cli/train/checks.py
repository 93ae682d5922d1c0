"""What can be refused before the base model loads, and what is said of a full disk."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch

from prefixtune_cli.errors import PtpError, ResourceError, RunDirError
from prefixtune_cli.recipe.load import difference, resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.prepare import Data


def check_tracker(name: str) -> None:
    """Raise ResourceError where the experiment tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise ResourceError(
            f"train.track is {name}, which is not installed. Type: pip install 'prefixtune-cli[{name}]'"
        )


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ResourceError where the disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"The run needs {needed_bytes / 2**20:,.1f} MiB for checkpoints and the adapter, and {folder} has "
            f"{free / 2**20:,.1f} MiB free. Free some, give --out on another disk, or --set train.keep_checkpoints=1."
        )


@contextmanager
def told_in_words(run_dir: RunDir) -> Iterator[None]:
    """Within the block a full memory and a full disk raise ResourceError, whatever a library makes of them."""
    try:
        yield
    except PtpError:
        raise
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            "The GPU's memory does not suffice. What helps most comes first: --gradient-checkpointing, a smaller "
            "--batch-size with more --gradient-accumulation, a smaller --max-length, --bits 4."
        ) from error
    except Exception as error:
        said = "No space left" in str(error) or "Disk quota" in str(error)
        if run_dir.path.exists() and (said or shutil.disk_usage(run_dir.path).free < 2**16):
            raise ResourceError(
                f"No space is left for {run_dir.path}. Whole checkpoints are kept: free some space and type "
                f"{run_dir.resume_command}"
            ) from error
        raise


def check_resumable(run_dir: RunDir, recipe: Recipe) -> None:
    """Raise RunDirError where there is no run to go on with, or one of another recipe."""
    if not run_dir.recipe.exists():
        raise RunDirError(
            f"There is no run in {run_dir.path} to resume (no recipe.yaml). Leave --resume out."
        )
    if run_dir.finished:
        raise RunDirError(
            f"The run in {run_dir.path} is finished (it has a summary.json). Type --overwrite to train it anew."
        )
    saved = resolve(str(run_dir.recipe)).model_copy(update={"out": recipe.out})
    if changed := difference(saved, recipe):
        raise RunDirError(
            f"The run in {run_dir.path} was started with another recipe, so it cannot be resumed with this one:\n"
            + "\n".join(f"  {line}" for line in changed)
            + f"\nType {run_dir.resume_command} alone, or give the changed run another --out."
        )


def check_same_data(run_dir: RunDir, data: Data) -> None:
    """Raise RunDirError where the run was started with other data."""
    started = json.loads(run_dir.environment.read_text(encoding="utf-8"))["data"]
    changed = [
        f"  {name}: {now['source']}, {started.get(name, {}).get('rows', '?')} rows then and {now.get('rows', '?')} now"
        for name, now in data.fingerprints.items()
        if started.get(name, {}).get("sha256") != now["sha256"]
    ]
    if changed:
        raise RunDirError(
            f"The data of the run in {run_dir.path} has changed since it was started, so it cannot be resumed:\n"
            + "\n".join(changed)
            + "\nBring the old content back, or start anew with another --out."
        )

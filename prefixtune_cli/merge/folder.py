"""The folder that a merge writes, whole or not at all, with `merge.json`, which tells how it was made."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import ResourceError, RunDirError
from prefixtune_cli.lock import LOCK, locked
from prefixtune_cli.pointed import Pointed
from prefixtune_cli.run_dir import RunDir, write_json

if TYPE_CHECKING:
    from prefixtune_cli.merge.source import Source

RECORD = "merge.json"
_PACKAGES = ("prefixtune-cli", "peft", "transformers", "torch")


@dataclass(frozen=True)
class Merged:
    """What a merge wrote.

    Attributes:
        record: the content of merge.json.
        next_command: a command that uses the result.
    """

    folder: Path
    record: dict[str, Any]
    weights_bytes: int
    next_command: str

    def to_json(self) -> dict[str, Any]:
        return {
            "folder": str(self.folder),
            "weights_bytes": self.weights_bytes,
            "next": self.next_command,
            **self.record,
        }


@contextlib.contextmanager
def claimed(out: Path, sources: Sequence[Pointed], *, overwrite: bool) -> Iterator[None]:
    """Within the block no other command writes to `out`.

    Raises:
        RunDirError: see `check_out`; or another command writes there already.
        ResourceError: it cannot be written to.
    """
    check_out(out, sources, overwrite=overwrite)
    with locked(out):
        yield


def check_out(out: Path, sources: Sequence[Pointed], *, overwrite: bool) -> None:
    """Refuse a folder that is taken.

    Raises:
        RunDirError: it is a file, or one of the sources; or it is not empty, and a merge has not written it or
            `overwrite` is false.
    """
    if Path.cwd().is_relative_to(out.resolve()):
        raise RunDirError(
            f"--out {out} is where you are, so it cannot be replaced. Give another name."
        )
    if os.path.isfile(out):
        raise RunDirError(f"--out {out} is a file. Give another name.")
    if not os.path.exists(out) or all(path.name == LOCK for path in out.iterdir()):
        return
    if any(
        out.resolve() in (Path(s.given).resolve(), s.folder and s.folder.resolve()) for s in sources
    ):
        raise RunDirError(f"--out {out} is one of the adapters that are merged. Give another name.")
    if not (out / RECORD).exists():
        raise RunDirError(
            f"--out {out} is not empty and was not written by `ptp merge` (it has no {RECORD}), so it is not "
            "overwritten. Give another name."
        )
    if not overwrite:
        raise RunDirError(
            f"--out {out} is not empty. Type --overwrite to replace it, or give another name."
        )


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A folder beside `out` to write into. It replaces `out` when the block ends without an error.

    Raises:
        ResourceError: the disk is full, or cannot be written to.
    """
    part = out.with_name(f".{out.name}.part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        RunDir(out).place(part, out)
    except OSError as error:
        raise ResourceError(
            f"{out} cannot be written: {error.strerror or error}. Free some disk, or give another --out."
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_record(folder: Path, sources: Sequence[Source], **settings: Any) -> dict[str, Any]:
    """Write merge.json: the sources with the hashes of their weights, the settings, and the libraries' versions."""
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "base": sources[0].base.name,
        "revision": sources[0].base.revision,
        **settings,
        "sources": [
            {"folder": str(one.folder), "method": one.method, "sha256": one.sha256}
            for one in sources
        ],
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    write_json(folder / RECORD, record)
    return record


def weights_bytes(folder: Path) -> int:
    """Bytes of the safetensors files in `folder`."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))

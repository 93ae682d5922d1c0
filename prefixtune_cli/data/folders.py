"""A folder of data: which of its files are read, and what is said about the others.

As with `datasets.load_dataset`, files named after a split belong to it, and `train` is read if no split is asked for.
To train on test data without a word would make every figure of a run worthless.
"""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from prefixtune_cli.data.read import READERS
from prefixtune_cli.data.stored import is_saved
from prefixtune_cli.errors import DataError

# The splits, and the words for them in file names, as in `datasets`.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
UNNAMED = ""  # files that are not named after a split
UNREAD = (".txt", ".arrow", ".xlsx", ".xls", ".gz", ".zst", ".bz2", ".xz", ".zip")  # may be data
# Files that describe the data beside them, for `datasets` and LLaMA-Factory.
ABOUT = ("config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")


@dataclass(frozen=True)
class LocalFiles:
    """The files to read.

    Attributes:
        files: data files, or folders of saved data sets.
        notice: what else a folder holds, and how to name it; None if it holds nothing else.
    """

    files: list[Path]
    notice: str | None = None


def in_folder(folder: Path, split: str | None) -> LocalFiles:
    """The files of one split of a folder; without a name, those of `train`, or those not named after a split.

    Raises:
        DataError: there is no data or no such split, several splits but no `train`, or a link that leads nowhere.
    """
    try:
        splits, others = _contents(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror or error}.") from error
    if not splits:
        inside = [name for name in others if name.endswith("/")]
        have = ", ".join(f"{folder}/{name}" for name in inside)
        hint = f" These folders have some: {have}." if inside else ""
        raise DataError(
            f"The folder {folder} has no data file.{hint} The types are {', '.join(READERS)}."
        )
    if split is not None:
        return LocalFiles(splits[_canonical(folder, split, splits)])
    named = [name for name in splits if name != UNNAMED]
    wanted = next(name for name in ("train", UNNAMED, *named) if name in splits)
    if wanted not in ("train", UNNAMED) and len(named) > 1:
        ways = " or ".join(_way(folder, name) for name in named)
        raise DataError(f"The folder {folder} has no split train. Name the one to read: {ways}.")
    left = [
        _short(splits[name]) + (f" ({_way(folder, name)})" if name != UNNAMED else "")
        for name in splits
        if name != wanted
    ] + others
    if not left:
        return LocalFiles(splits[wanted])
    notice = f"Read from {folder}: {_short(splits[wanted])}. Not read: {', '.join(left)}."
    held_out = [name for name in ("validation", *named) if name in named and name != wanted]
    if held_out:
        notice += f" To hold out {held_out[0]}: --eval-data {_way(folder, held_out[0])}."
    return LocalFiles(splits[wanted], notice)


def _canonical(folder: Path, split: str, splits: dict[str, list[Path]]) -> str:
    """The split that `val`, `dev` and the like stand for."""
    if split in splits:
        return split
    meant = next((name for name, words in SPLITS.items() if split in words), split)
    if meant in splits:
        return meant
    named = [name for name in splits if name != UNNAMED]
    known = f"the splits are {', '.join(named)}" if named else "no file is named after one"
    raise DataError(f"The folder {folder} has no split {split!r}; {known}.")


def _contents(folder: Path) -> tuple[dict[str, list[Path]], list[str]]:
    """(files by split, names of what may be data but is not read). The name of a subfolder ends with a slash."""
    if is_saved(folder):
        return {UNNAMED: [folder]}, []
    entries = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    saved = [path for path in entries if is_saved(path)]
    if saved:  # DatasetDict.save_to_disk
        return {path.name: [path] for path in saved}, []
    splits: dict[str, list[Path]] = {}
    others = []
    for path in entries:
        suffix = path.suffix.lower()
        if suffix in READERS:
            refuse_dangling(path)
        if path.is_dir():
            if any(p.suffix.lower() in READERS for p in path.iterdir()):
                others.append(f"{path.name}/")
        elif path.name in ABOUT:
            continue
        elif suffix in READERS and path.is_file():
            splits.setdefault(_split_of(path), []).append(path)
        elif suffix in UNREAD:
            others.append(path.name)
    return splits, others


def _split_of(file: Path) -> str:
    for split, words in SPLITS.items():
        if re.search(rf"(^|[-._ 0-9])({'|'.join(words)})[-._ 0-9]", file.name.lower()):
            return split
    return UNNAMED


def _way(folder: Path, split: str) -> str:
    """What to type for a split of a folder, in a shell."""
    return shlex.quote(f"{folder}:{split}")


def _short(files: list[Path]) -> str:
    names = [path.name for path in files]
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"


def refuse_dangling(path: Path) -> None:
    """Raise DataError for a link that leads nowhere: to skip it would lose its rows without a word."""
    if path.is_symlink() and not path.exists():
        raise DataError(
            f"{path} is a link to {os.readlink(path)}, which does not exist. Fix the link, or remove it."
        )

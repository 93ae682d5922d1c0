"""A benchmark's data set from the user's own files, for machines that do not reach the hub.

In a folder, files are found by what its README declares (in a clone of the hub's repository), then by the
names in OWN and SHARED. MMLU is also read in its authors' form (mmlu.py); its rows always leave in the hub's
form. `datasets.load_dataset` is not used: it keeps a cache, and `evaluate` replaces it.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune_cli.data import mmlu
from prefixtune_cli.data.lines import Row
from prefixtune_cli.data.locate import SUFFIXES, near_names
from prefixtune_cli.data.read import READERS, read
from prefixtune_cli.data.table import Line, check, refuse_bare_numbers, to_dataset
from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

# Where a split may be, in the folder or in its `data/`: files of one subset, then files of all subsets,
# in which the column `subject` tells the subset of a row.
OWN = ("{subset}/{split}", "{split}/{subset}_{split}", "{split}/{subset}", "{subset}_{split}")
SHARED = ("{split}", "all/{split}", "default/{split}")
WHOLE = (None, "all", "default", "main")  # subsets that are not subjects
VALIDATION = ("validation", "val", "valid")
SPLITS = ("train", "test", "dev", *VALIDATION)
SHARD = re.compile(r"-\d{5}-of-(\d{5})(-[0-9a-f]{8,})?$")
LFS = b"version https://git-lfs"


@dataclass(frozen=True)
class Wanted:
    """What a task reads, by the hub's names.

    Attributes:
        bench: what the user typed before `=`: `mmlu`.
        dataset: the hub's id: `cais/mmlu`.
        subset: its config: `anatomy`.
        splits: the hub's names of the splits that the task reads.
        columns: the columns that every row must have; empty if unknown.
    """

    bench: str
    dataset: str
    subset: str | None
    splits: tuple[str, ...]
    columns: tuple[str, ...] = ()

    @property
    def is_mmlu(self) -> bool:
        """Whether it is MMLU itself: cmmlu, KMMLU and others have other columns."""
        return self.dataset.rpartition("/")[2] in mmlu.NAMES

    @property
    def may_have_letters(self) -> bool:
        return self.is_mmlu or {*mmlu.COLUMNS} <= {*self.columns}

    def names(self, split: str) -> tuple[str, ...]:
        """The names to look for a split by, the best first."""
        if split not in VALIDATION:
            return (split,)
        dev = () if "dev" in self.splits else ("dev",)
        return (split, *(name for name in VALIDATION if name != split), *dev)

    def stems(self, forms: Iterable[str], name: str) -> Iterator[str]:
        for form in forms:
            if self.subset is not None or "{subset}" not in form:
                yield form.format(subset=self.subset, split=name)


def load_benchmark(path: Path, wanted: Wanted) -> DatasetDict:
    """The rows that the hub would give, from a folder, a clone, or, if only one split is read, a file.

    Returns:
        Only the wanted splits, in memory. MMLU has the hub's features, and Parquet has its own. Cells of
        other CSV files stay text; a column that may be meant as numbers is refused.

    Raises:
        DataError: a file, a split or a subset is missing, or a row is wrong; the message names it.
    """
    from datasets import DatasetDict

    path = path.expanduser()
    try:
        if not path.exists():
            raise DataError(f"The data of {wanted.bench}, {path}, do not exist. {near_names(path)}")
        snapshots = [*path.glob("snapshots/*/")]  # a folder of the hub's cache
        place = snapshots[0] if len(snapshots) == 1 else path
        return DatasetDict({split: _load(place, wanted, split) for split in wanted.splits})
    except OSError as error:
        name = error.filename or path
        raise DataError(f"{name} cannot be read: {error.strerror or error}.") from error


def _load(path: Path, wanted: Wanted, split: str) -> Dataset:
    files, shared = (_find if path.is_dir() else _single)(path, wanted, split)
    _refuse_missing_shards(files)
    lines = [
        Line(file, number, row)
        for file in files
        for number, row in _parse(file, _stamp(file), wanted.may_have_letters)
    ]
    if shared and wanted.subset not in WHOLE:
        lines = _of_subset(lines, wanted, split)
    as_mmlu = wanted.is_mmlu or (wanted.may_have_letters and "choices" not in lines[0].row)
    if as_mmlu:
        own_subjects = wanted.is_mmlu and (shared or wanted.subset is None)
        subject = None if own_subjects else wanted.subset or wanted.bench
        lines = [line._replace(row=mmlu.hub_row(line, subject)) for line in lines]
    for line in lines:
        check(line, wanted.columns)
    if not as_mmlu:
        refuse_bare_numbers(lines, wanted.columns)
    return to_dataset(lines, mmlu.hub_features() if as_mmlu else None)


def _single(path: Path, wanted: Wanted, split: str) -> tuple[list[Path], bool]:
    """(the file, whether it may hold other subsets too)."""
    if len(wanted.splits) > 1:
        shared = " and ".join(f"{name}.jsonl" for name in wanted.splits)
        own = " and ".join(f"{wanted.subset}/{name}.jsonl" for name in wanted.splits)
        raise DataError(
            f"{wanted.bench} reads the splits {' and '.join(wanted.splits)}, and {path} is one file. Give a folder "
            f"with a file for each: {shared}" + (f", or {own}." if wanted.subset else ".")
        )
    stem = SHARD.sub("", path.stem)
    named = re.split(r"[-_.]", stem)[-1].lower()
    if named in SPLITS and named not in wanted.names(split):
        raise DataError(
            f"{wanted.bench} reads the split {split!r}, and {path} is named as the split {named!r}. Give the file of "
            f"{split!r}, or rename this one if it is the right one: {split}{path.suffix}"
        )
    place = path.absolute().with_name(stem).as_posix()
    own_stems = [own for name in wanted.names(split) for own in wanted.stems(OWN, name)]
    own_file = stem == wanted.subset or any(place.endswith(f"/{own}") for own in own_stems)
    return [path], not own_file


def _find(path: Path, wanted: Wanted, split: str) -> tuple[list[Path], bool]:
    """(the files of a split in a folder, whether they may hold other subsets too)."""
    readme = path / "README.md"
    configs = _configs(readme, _stamp(readme)) if readme.is_file() else {}
    declared = configs.get(wanted.subset or "", {})
    for name in wanted.names(split):
        names = (
            sorted(glob.glob(p, root_dir=path, recursive=True)) for p in declared.get(name, ())
        )
        found = [path / file for file in itertools.chain(*names) if not (path / file).is_dir()]
        if found:
            return found, False
        for forms in (OWN, SHARED):
            for folder, stem in itertools.product((path, path / "data"), wanted.stems(forms, name)):
                if found := _stored(folder / stem):
                    return found, forms is SHARED
    raise DataError(_missing(path, wanted, split, {name for name in configs if name}))


def _stored(stem: Path) -> list[Path]:
    """The file with this path before its suffix, or its shards."""
    found = sorted(
        file
        for file in (stem.parent.iterdir() if stem.parent.is_dir() else ())
        if file.suffix.lower() in READERS and SHARD.sub("", file.stem) == stem.name
    )
    kinds = {(file.suffix.lower(), _shards(file)): file.name for file in found}
    if len(kinds) > 1:
        raise DataError(
            f"{stem.parent} holds {' and '.join(sorted(kinds.values()))}, which may be the same rows. Keep one of them."
        )
    return found


def _shards(file: Path) -> int:
    """The number of shards that a shard's name gives; 0 for other files."""
    match = SHARD.search(file.stem)
    return int(match[1]) if match else 0


def _refuse_missing_shards(files: list[Path]) -> None:
    series = [(file.parent, SHARD.sub("", file.stem), _shards(file)) for file in files]
    for file, one in zip(files, series, strict=True):
        shards, there = one[2], series.count(one)
        if shards and there != shards:
            raise DataError(
                f"{file} is one of {shards} shards by its name, and {there} were found. Give a folder with exactly "
                f"these {shards} files."
            )


@lru_cache(maxsize=4)  # MMLU's README has thousands of lines, and 57 subjects read it
def _configs(readme: Path, stamp: tuple[int, ...]) -> dict[str, dict[str, list[str]]]:
    """{config: {split: patterns of files}} from a README's front matter; "" is the default."""
    from huggingface_hub import metadata_load

    configs: dict[str, dict[str, list[str]]] = {}
    try:
        for entry in (metadata_load(readme) or {}).get("configs") or ():
            name, parts = str(entry.get("config_name", "default")), entry.get("data_files")
            if isinstance(parts, dict):
                parts = [{"split": split, "path": paths} for split, paths in parts.items()]
            configs[name] = {}
            for part in parts if isinstance(parts, list) else ():
                if isinstance(part, dict):
                    paths = part["path"] if isinstance(part["path"], list) else [part["path"]]
                    within = [p for p in paths if not p.startswith("/") and "://" not in p]
                    folder = entry.get("data_dir", ".")
                    configs[name][str(part["split"])] = [
                        f"{folder}/{pattern}" for pattern in within
                    ]
            if name == "default" or entry.get("default"):
                configs[""] = configs[name]
    except Exception:  # not YAML, or another form, with one of many errors: then file names decide
        return {}
    if len(configs) == 1:
        configs[""] = next(iter(configs.values()))
    return configs


def _stamp(file: Path) -> tuple[int, ...]:
    """A value that changes with the file, even if a copy keeps its time and size."""
    stat = file.stat()
    return (stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_ino)


@lru_cache(maxsize=4)  # one file may hold the rows of all of MMLU's 57 subjects
def _parse(file: Path, stamp: tuple[int, ...], may_have_letters: bool) -> list[tuple[int, Row]]:
    suffix = file.suffix.lower()
    if suffix not in READERS:
        raise DataError(
            f"{file}: the type {suffix or '(no suffix)'!r} is not known; the types are {SUFFIXES}."
        )
    with open(file, "rb") as start:
        if start.read(len(LFS)) == LFS:
            raise DataError(f"{file} is a git-lfs pointer, not the data. Type: git lfs pull")
    rows = mmlu.original_rows(file) if may_have_letters and suffix == ".csv" else []
    return rows or list(read(file))


def _of_subset(lines: list[Line], wanted: Wanted, split: str) -> list[Line]:
    """The lines of the wanted subject; all lines if no row has a subject and the data set is not MMLU."""
    untold = next((line for line in lines if not isinstance(line.row.get("subject"), str)), None)
    if untold:
        if not wanted.is_mmlu and not any("subject" in line.row for line in lines):
            return lines
        raise DataError(
            f"{untold.where}: the row has no 'subject', so nothing says whether it is of {wanted.subset!r}. Add the "
            f"column, or name the file {wanted.subset}_{split}{untold.file.suffix} if all rows are."
        )
    chosen = [line for line in lines if line.row["subject"] == wanted.subset]
    if not chosen:
        raise DataError(
            f"{wanted.bench}: {lines[0].file} has no row with the 'subject' {wanted.subset!r}. "
            f"{_nearest(str(wanted.subset), {line.row['subject'] for line in lines})}"
        )
    return chosen


def _nearest(subset: str, known: Iterable[str]) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(subset, names, n=3)
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    nearest = f"The nearest is {' or '.join(map(repr, near))}. " if near else ""
    return f"{nearest}There are: {', '.join(names[:8])}{more}."


def _missing(path: Path, wanted: Wanted, split: str, subsets: set[str]) -> str:
    """The error for a split or a subset for which no file is found."""
    found = itertools.chain(*(path.glob(depth) for depth in ("*", "*/*", "*/*/*")))
    data = [
        file.relative_to(path)
        for file in itertools.islice(found, 10_000)
        if file.suffix.lower() in READERS and not file.name.startswith(".")
    ]
    splits = "|".join(name for split in wanted.splits for name in wanted.names(split))
    for file in data:
        stem = SHARD.sub("", file.with_suffix("").as_posix()).removeprefix("data/")
        forms = (form.format(subset="([^/]+)", split=f"(?:{splits})") for form in OWN)
        match = next(filter(None, (re.fullmatch(form, stem) for form in forms)), None)
        subsets |= {match[1]} - {"all", "default"} if match else set()
    if wanted.subset and subsets and wanted.subset not in subsets:
        hint = f"There is no subset {wanted.subset!r}. {_nearest(wanted.subset, subsets)}"
    else:
        hint = f"Its data files are: {', '.join(map(str, sorted(data)[:5])) or 'none'}."
    others = wanted.names(split)[1:]
    return (
        f"{wanted.bench}: {path} has no file of the split {split!r}"
        + (f" of the subset {wanted.subset!r}" if wanted.subset else "")
        + f". Looked there, and in data/, for {', '.join(wanted.stems((*OWN, *SHARED), split))}"
        + (f" (for {split} also {', '.join(others)})" if others else "")
        + f", each as {SUFFIXES}. {hint}"
    )

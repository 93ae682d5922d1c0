"""Files become checked rows of one layout, on disk.

The rows are written once to an Arrow file in the cache of `datasets`, named after their content, and
memory-mapped: a million rows take no more memory than a thousand. The folder is written under a temporary
name and renamed, so two runs can load the same data at the same time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.data import locate
from prefixtune_cli.data.columns import check_map, missing, notices, recognise, rename
from prefixtune_cli.data.format import READ, WITH_MESSAGES_IN_PROMPTS, Layout, convert, unpaired
from prefixtune_cli.data.lines import Row, is_by_line, origin
from prefixtune_cli.data.message import weight_notices, weights_said
from prefixtune_cli.data.read import read
from prefixtune_cli.data.stored import saved_files, without_fillers
from prefixtune_cli.errors import DataError, ResourceError
from prefixtune_cli.recipe.schema import DataSection, Kind

if TYPE_CHECKING:
    from datasets import Dataset

# Part of the cache's key: raise it whenever the same files give other rows than before.
VERSION = 5
IN_TWO = (
    "Each pair is taken for two answers: the chosen one is desirable, and the rejected one is not."
)
ROWS_A_BATCH = 1000
CHARACTERS_A_BATCH = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class LoadedData:
    """Checked rows.

    Attributes:
        dataset: columns of one layout (see `format`), of pairs also `rejected`, of labelled answers `desirable`, and
            `file` and `line`, the row's origin as numbers; memory-mapped.
        format: the recognised or forced format of the files.
        layout: the layout of `dataset`.
        fingerprint: sha256 of the files' content and of the settings that read it, but not of names and times.
        source: what the user typed.
        files: the names of the files, in the order of the numbers in `file`.
        notices: what the user should know.
    """

    dataset: Dataset
    format: str
    layout: Layout
    fingerprint: str
    source: str
    files: tuple[str, ...]
    notices: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.dataset)

    def row_origin(self, i: int) -> str:
        """Where row `i` came from: `my.jsonl, line 18`."""
        row = self.dataset[i]
        return origin(self.files[row["file"]], row["line"])

    @property
    def of_pairs(self) -> bool:
        """Whether each row is a pair of answers."""
        return "rejected" in self.dataset.column_names

    @property
    def labelled(self) -> bool:
        """Whether each row says if its answer is desirable."""
        return "desirable" in self.dataset.column_names

    @property
    def answers(self) -> str:
        """The column of the answers; of pairs, of the chosen ones."""
        return "messages" if self.layout == "messages" else "completion"

    def rejected(self) -> LoadedData:
        """The rejected answers of pairs, as rows of their own."""
        rows = self.dataset.remove_columns([self.answers]).rename_column("rejected", self.answers)
        name = _sha256(f"{self.fingerprint} rejected".encode())
        return dataclasses.replace(self, dataset=rows, fingerprint=name)

    def select(self, indices: Sequence[int]) -> LoadedData:
        """The rows with these numbers, in this order."""
        name = _sha256(f"{self.fingerprint} {list(map(int, indices))}".encode())
        return dataclasses.replace(self, dataset=self.dataset.select(indices), fingerprint=name)

    def spread(self, most: int) -> LoadedData:
        """At most so many rows, evenly spread and in order; of labelled answers, at least one of each label."""
        if not self.labelled:
            return self.select(evenly_spread(len(self), most))
        import numpy as np

        lines, kinds = _lines(self.dataset)
        share, kept = min(1.0, most / len(self)), np.zeros(len(kinds), bool)
        for kind in np.unique(kinds):
            of_kind = np.flatnonzero(kinds == kind)
            kept[of_kind[evenly_spread(len(of_kind), max(1, int(share * len(of_kind))))]] = True
        return self.select(np.flatnonzero(kept[lines]).tolist())

    def split(self, fraction: float, seed: int) -> tuple[LoadedData, LoadedData]:
        """(train, held out), as from `split`."""
        parts = split(self.dataset, fraction, seed)
        names = (f"train-{fraction}-{seed}", f"held-out-{fraction}-{seed}")
        train, held_out = (
            dataclasses.replace(
                self, dataset=part, fingerprint=_sha256(f"{self.fingerprint} {name}".encode())
            )
            for part, name in zip(parts, names, strict=True)
        )
        return train, held_out


def evenly_spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` rows of `count`, evenly spread and in order."""
    import numpy as np

    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]


def split(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(train, held out): `fraction` of the rows held out at random, the same ones for the same seed.

    Each part has at least one row, and keeps the order of the rows. Of labelled answers each part has all labels; the
    two answers of a pair stay together.

    Raises:
        DataError: there is only one row, or one with a label.
    """
    import numpy as np

    held_out = np.zeros(len(dataset), bool)
    if "desirable" in dataset.column_names:
        lines, kinds = _lines(dataset)
        for kind in np.unique(kinds):
            of_kind = np.flatnonzero(kinds == kind)
            held_out |= np.isin(lines, of_kind[_drawn(len(of_kind), fraction, seed, labelled=True)])
    else:
        held_out[_drawn(len(dataset), fraction, seed)] = True
    return dataset.select(np.flatnonzero(~held_out)), dataset.select(np.flatnonzero(held_out))


def _drawn(rows: int, fraction: float, seed: int, *, labelled: bool = False) -> Any:
    """The numbers of the rows that are held out (int array)."""
    import numpy as np

    if rows < 2:
        what = f"{rows} row" + (" with one of its labels" if labelled else "")
        raise DataError(
            f"The data has {what}, which cannot be split into training and held-out rows. Add rows, or give held-out "
            "data with --eval-data."
        )
    held_out = min(max(1, round(rows * fraction)), rows - 1)
    return np.random.default_rng(seed).permutation(rows)[:held_out]


def _lines(dataset: Dataset) -> tuple[Any, Any]:
    """For each labelled answer the number of its line (int array), and for each line its labels as a number."""
    import numpy as np

    file, line, desirable = (np.array(dataset[name]) for name in ("file", "line", "desirable"))
    of_rows = np.unique(np.column_stack([file, line]), axis=0, return_inverse=True)[1].ravel()
    kinds = np.bincount(of_rows) * 2 + np.bincount(of_rows, weights=desirable).astype(int)
    return of_rows, kinds


def load_rows(source: str, section: DataSection, kind: Kind = "answers") -> LoadedData:
    """Read and check the rows of a source, and bring them to one layout.

    Args:
        source: a file, a folder, `sample:NAME` or a hub data set id.
        section: the recipe's data section: format, map and train_on are used.
        kind: of the rows that are read; others are refused. Of pairs, labelled answers are made.

    Raises:
        DataError: the data is missing or wrong; the message has the file and the line.
        ResourceError: the hub cannot be reached, or the disk cannot be written to.
    """
    from datasets import Dataset, config

    check_map(section.map)
    found = locate.local_files(source)
    files = found.files if found is not None else None
    names = (source,) if files is None else tuple(map(str, files))
    # Name a sample by what the user typed, not by its path inside the package.
    if source.startswith("sample:"):
        names = (f"{source}.jsonl",)
    key = _key(files, section, kind) if files is not None else None
    cache = Path(config.HF_DATASETS_CACHE) / "prefixtune"
    folder = cache / key[:32] if key else None
    if folder is None or not (folder / "about.json").exists():
        try:
            cache.mkdir(parents=True, exist_ok=True)
            beside = Path(tempfile.mkdtemp(prefix=".part-", dir=cache))
            try:
                written = _write(beside, files, source, names, section, kind)
                key = key or written
                folder = cache / key[:32]
                _publish(beside, folder)
            finally:
                shutil.rmtree(beside, ignore_errors=True)
        except OSError as error:
            raise ResourceError(
                f"The rows cannot be written to {cache} ({error.strerror or error}). Free space there, or set "
                "HF_DATASETS_CACHE to another folder."
            ) from error
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    format = READ[about["format"]]
    return LoadedData(
        dataset=Dataset.from_file(str(folder / "rows.arrow")),
        format=format.name,
        layout=format.layout,
        fingerprint=str(key),
        source=source,
        files=names,
        notices=(
            *([found.notice] if found is not None and found.notice else ()),
            *notices(format, about["columns"], about["numbers"], section),
            *([IN_TWO] if kind == "labelled" and format.is_of_pairs else ()),
            *weight_notices(
                about["weights"],
                in_prompts=format in WITH_MESSAGES_IN_PROMPTS or format.is_labelled,
                train_on=section.train_on,
            ),
        ),
    )


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _settings(section: DataSection, kind: Kind) -> str:
    kinds = [] if kind == "answers" else [kind]
    return json.dumps(
        [VERSION, section.format, section.map, section.train_on, *kinds], sort_keys=True
    )


def _key(files: list[Path], section: DataSection, kind: Kind) -> str:
    try:
        digests = [_digest(path) for path in files]
    except OSError as error:
        raise DataError(
            f"{error.filename or files[0]} cannot be read: {error.strerror or error}."
        ) from error
    return _sha256(" ".join([_settings(section, kind), *digests]).encode())


def _digest(path: Path) -> str:
    if path.is_dir():
        return " ".join(map(_digest, saved_files(path)))
    with open(path, "rb") as file:
        return path.suffix.lower() + hashlib.file_digest(file, "sha256").hexdigest()


def _publish(beside: Path, folder: Path) -> None:
    try:
        os.rename(beside, folder)
    except OSError:
        # Another process may have been first, with the same rows.
        if not (folder / "about.json").exists():
            raise


def _origins(
    files: list[Path] | None, source: str, names: tuple[str, ...]
) -> Iterator[tuple[int, int, str, Row]]:
    for i, name in enumerate(names):
        for line, row in locate.hub_rows(source) if files is None else read(files[i]):
            yield i, line, origin(name, line), row if is_by_line(name) else without_fillers(row)


def _write(
    folder: Path,
    files: list[Path] | None,
    source: str,
    names: tuple[str, ...],
    section: DataSection,
    kind: Kind,
) -> str:
    """Write rows.arrow and about.json; return the sha256 of the rows."""
    import pyarrow as pa

    origins = _origins(files, source, names)
    first = next(origins, None)
    if first is None:
        raise DataError(f"{source} is empty: it has no row.")
    format = recognise(
        rename(first[3], section.map, first[2]),
        section.map,
        section.format,
        first[2],
        kind=kind,
    )
    columns: Row = {}  # of all rows, each with its first value
    numbers: set[str] = set()
    schema = _schema(format.layout, kind)
    needs_assistant = section.train_on == "completion"
    digest = hashlib.sha256(_settings(section, kind).encode())
    batch: list[Row] = []
    characters = 0
    weights: Counter[str] = Counter()
    with pa.RecordBatchStreamWriter(str(folder / "rows.arrow"), schema) as writer:
        for file, line, where, raw in itertools.chain([first], origins):
            if not raw.keys() <= columns.keys():
                columns = columns | {k: v for k, v in raw.items() if k not in columns}
            row = rename(raw, section.map, where)
            for name in format.columns:
                if isinstance(row.get(name), (int, float)) and name != "label":
                    numbers.add(name)
            row = convert(row, format, where, needs_assistant=needs_assistant)
            if files is None:
                digest.update(json.dumps(row).encode())
            if "messages" in row:
                weights.update(weights_said(row["messages"]))
            characters += _characters(row)
            converted = unpaired(row) if kind == "labelled" else [row]
            batch += [one | {"file": file, "line": line} for one in converted]
            if len(batch) >= ROWS_A_BATCH or characters >= CHARACTERS_A_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
                batch, characters = [], 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, schema=schema))
    for field, column in section.map.items():
        if column not in columns:
            raise missing(field, column, columns, source)
    if format.name == "text":
        recognise(rename(columns, section.map, source), section.map, section.format, source)
    about = {
        "format": format.name,
        "columns": list(columns),
        "numbers": [name for name in format.columns if name in numbers],
        "weights": weights,
    }
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")
    return digest.hexdigest()


def _characters(row: Row) -> int:
    turns = row.get("messages") or row.get("before") or ()
    texts = (*row.values(), *(text for turn in turns for text in turn.values()))
    return sum(len(text) for text in texts if isinstance(text, str))


def _schema(layout: Layout, kind: Kind) -> Any:
    import pyarrow as pa

    text = pa.string()
    turn = {"role": text, "content": text, "trained": pa.bool_(), "more": text}
    turns = pa.list_(pa.struct(turn))
    columns: dict[Layout, dict[str, Any]] = {
        "messages": {"messages": turns, "tools": text},
        "prompt-completion": {"prompt": text, "completion": text, "before": turns, "tools": text},
        "text": {"text": text},
    }
    of_kind: dict[Kind, dict[str, Any]] = {
        "answers": {},
        "pairs": {"rejected": turns if layout == "messages" else text},
        "labelled": {"desirable": pa.bool_()},
    }
    return pa.schema(columns[layout] | of_kind[kind] | {"file": pa.int32(), "line": pa.int64()})

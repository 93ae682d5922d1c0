"""Rows of files, each with its place in its file, and the data set that they become."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from prefixtune_cli.data.lines import SEPARATED, Row, origin
from prefixtune_cli.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, Features


class Line(NamedTuple):
    """A row, and its place in a file."""

    file: Path
    number: int
    row: Row

    @property
    def where(self) -> str:
        return origin(str(self.file), self.number)


def check(line: Line, columns: Iterable[str]) -> None:
    """Raise DataError for a row that lacks one of the columns, or a value in it."""
    if not line.row:
        raise DataError(f"{line.where}: the row has no columns.")
    for name in columns:
        if name not in line.row:
            raise DataError(
                f"{line.where}: the row has no column {name!r}, which the benchmark reads; it has "
                f"{', '.join(line.row)}."
            )
        value = line.row[name]
        if value is None or (value == "" and line.file.suffix.lower() in SEPARATED):
            raise DataError(
                f"{line.where}: the column {name!r} is {'null' if value is None else 'empty'}. Give it a value, or "
                "remove the row."
            )


def refuse_bare_numbers(lines: list[Line], columns: tuple[str, ...]) -> None:
    """Refuse CSV columns of numbers: CSV has no types, and a label that is the text "1" would count as wrong."""
    rows = [line.row for line in lines if line.file.suffix.lower() in SEPARATED]
    for name in (columns or rows[0]) if rows else ():
        if all(re.fullmatch(r"-?\d+(\.\d+)?", str(row.get(name))) for row in rows):
            raise DataError(
                f"{lines[0].file}: the column {name!r} holds only numbers, and CSV does not say whether the benchmark "
                "has them as numbers or as text. Give the file as .jsonl or .parquet."
            )


def to_dataset(lines: list[Line], features: Features | None) -> Dataset:
    """The rows as a data set in memory, with these types. None uses the types of a Parquet file, or else infers them.

    Raises:
        DataError: a column has values of several types.
    """
    import pyarrow as pa
    from datasets import Dataset, Features
    from pyarrow import parquet

    names = dict.fromkeys(name for line in lines for name in line.row)
    columns = {name: [line.row.get(name) for line in lines] for name in names}
    file = lines[0].file
    try:
        if features is None and file.suffix.lower() == ".parquet":
            features = Features.from_arrow_schema(parquet.read_schema(file))
        return Dataset.from_dict(columns, features=features)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        for name, values in columns.items():
            kinds = {type(value).__name__: i for i, value in reversed([*enumerate(values)])}
            kinds.pop("NoneType", None)
            if len(kinds) > 1:
                (i, kind), (j, other) = sorted((i, kind) for kind, i in kinds.items())[:2]
                raise DataError(
                    f"{lines[j].where}: the column {name!r} has the type {other} here, and {kind} in "
                    f"{lines[i].where}. Give it one type."
                ) from None
        raise DataError(f"{file}: the rows do not form a table ({first_line(error)}).") from error

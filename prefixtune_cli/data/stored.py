"""Rows that are stored as Arrow columns: Parquet files, saved data sets, and data sets of the hub.

They have types, and may have classes: numbers, with names stored apart. A model is to learn the names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import DataError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, Features

    from prefixtune_cli.data.lines import Rows


def parquet_rows(path: Path) -> Rows:
    """The rows of a Parquet file, from 1.

    Raises:
        DataError: it is broken, or has a column twice.
    """
    import pyarrow as pa
    from datasets import Features
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            repeated = {name for name in schema.names if schema.names.count(name) > 1}
            if repeated:
                raise DataError(
                    f"{path}: the column {sorted(repeated)[0]!r} occurs twice. Rename one."
                )
            described = b"huggingface" in (schema.metadata or {})
            classes = _classes(Features.from_arrow_schema(schema)) if described else {}
            yield from _numbered(file.iter_batches(batch_size=1000), classes)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({first_line(error)}). Write the file again."
        ) from error


def is_saved(folder: Path) -> bool:
    """Whether `Dataset.save_to_disk` wrote the folder."""
    return (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()


def saved_files(folder: Path) -> list[Path]:
    """The files of a saved data set that determine its rows, in their order."""
    return [folder / "dataset_info.json", *sorted(folder.glob("*.arrow"))]


def saved_rows(folder: Path) -> Rows:
    """The rows of a saved data set, from 1.

    Raises:
        DataError: a part of it is missing or broken.
    """
    import pyarrow as pa
    from datasets import load_from_disk

    try:
        yield from dataset_rows(load_from_disk(str(folder)))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise DataError(
            f"{folder} cannot be read as a data set of save_to_disk ({first_line(error)}). Save it again."
        ) from error


def dataset_rows(data: Dataset) -> Rows:
    """The rows of a data set as they are stored, from 1, with the names of classes in place of their numbers."""
    yield from _numbered(data.with_format("arrow").iter(batch_size=1000), _classes(data.features))


def _classes(features: Features) -> dict[str, dict[int, str]]:
    """The names of the classes of each column that holds classes, or lists of them."""
    kinds = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {
        name: dict(enumerate(kind.names)) for name, kind in kinds.items() if hasattr(kind, "names")
    }


def without_fillers(value: Any, *, nested: bool = False) -> Any:
    """A row without the nulls inside its columns. A table has every key in every struct, and fills gaps with nulls.

    A template would take such a key for a parameter of each tool, or an argument of each call.
    """
    if isinstance(value, dict):
        return {
            key: without_fillers(each, nested=True)
            for key, each in value.items()
            if each is not None or not nested
        }
    if isinstance(value, list):
        return [without_fillers(each, nested=True) for each in value]
    return value


def _numbered(
    batches: Iterable[Any], classes: dict[str, dict[int, str]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows of batches (pyarrow tables), counted from 1. A class without a name, such as -1, is null."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            for column, names in classes.items():
                row[column] = _class(row[column], names)
            yield number, row


def _class(value: Any, names: dict[int, str]) -> Any:
    return [names.get(v) for v in value] if isinstance(value, list) else names.get(value)

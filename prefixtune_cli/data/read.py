"""Readers of the four file types: checked rows, each with the line that it came from.

Why not pandas or `datasets` readers: they name no line, take a duplicate key's last value in
silence, and hold a one-gigabyte line whole. These stream, and stop with one clear error.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset, Features

MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_ARRAY_BYTES = 2**30
BOM = b"\xef\xbb\xbf"

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]


def origin(file: str, line: int) -> str:
    """Where a row came from, in words: `my.jsonl, line 18`; Parquet and hub rows have no lines."""
    return f"{file}, {'line' if file.endswith(('.jsonl', '.json', '.csv')) else 'row'} {line}"


def start_of(text: str, length: int = 60) -> str:
    """The beginning of a text, quoted, for an error message."""
    return repr(text if len(text) <= length else text[:length] + "…")


def read(path: Path) -> Rows:
    """Yield (line, row) of a file, by its suffix; a line counts from 1, and so do Parquet rows.

    Raises:
        DataError: the file is empty, unreadable, or wrong in a line, which is named.
    """
    rows = READERS[path.suffix.lower()](path)
    try:
        first = next(rows, None)
        if first is None:
            size = path.stat().st_size
            raise DataError(
                f"{path} is empty: it has {size} bytes and no row. Give a file with at least one row."
            )
        yield first
        yield from rows
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Decoded lines with their ends, never more than MAX_LINE_BYTES of one in memory."""
    with open(path, "rb") as file:
        number = 0
        while raw := file.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    f"{origin(str(path), number)}: the line is longer than {MAX_LINE_BYTES // 2**20} MiB, and "
                    f"begins with {start_of(raw[:60].decode('utf-8', 'replace'))}. Put one row on each line; "
                    "for a JSON array spread over one line, name the file .json."
                )
            if number == 1:
                raw = raw.removeprefix(BOM)
            yield number, _decode(raw, path, number)


def _decode(raw: bytes, path: Path, line: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        column = error.start - raw.rfind(b"\n", 0, error.start)
        guess = "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
        raise DataError(
            f"{origin(str(path), line)}: not UTF-8, byte 0x{raw[error.start]:02x} at position {column} of the line. "
            f"Convert the file first: iconv -f {guess} -t utf-8 {path} > {path.stem}-utf8{path.suffix}"
        ) from None


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)


def _parse(parse: Callable[[], Any], where: str, text: str) -> Any:
    try:
        return parse()
    except _DuplicateKey as error:
        raise DataError(
            f"{where}: the key {str(error)!r} stands twice in one object. Keep one of the two. The line begins "
            f"with {start_of(text)}."
        ) from None
    except (ValueError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if error.lineno > 1 else ""
            reason = f"{error.msg} at {line}column {error.colno}"
        raise DataError(
            f"{where}: broken JSON ({reason}). The line begins with {start_of(text)}. Each row must be one whole "
            'JSON object, such as {"prompt": "…", "completion": "…"}.'
        ) from None


def _checked(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise DataError(
            f"{where}: a row must be a JSON object with named columns, got {start_of(json.dumps(row))}. Write it as "
            '{"text": …} or {"prompt": …, "completion": …}.'
        )
    return row


def _read_jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        text = line.rstrip(" \t\r\n")
        if text.strip():
            where = origin(str(path), number)
            yield number, _checked(_parse(lambda t=text: _decoder.decode(t), where, text), where)  # type: ignore[misc]


def _read_json(path: Path) -> Rows:
    """An array of objects; a .json file that begins with an object is read as one object a line."""
    with open(path, "rb") as file:
        head = file.read(4096).removeprefix(BOM).lstrip()
    if head[:1] != b"[":
        yield from _read_jsonl(path)
        return
    if path.stat().st_size > MAX_JSON_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of {path.stat().st_size / 2**30:.1f} GiB must be read whole, and the limit is "
            f"{MAX_JSON_ARRAY_BYTES // 2**30} GiB. Write it as JSON Lines, which stream: "
            f"jq -c '.[]' {path} > {path.stem}.jsonl"
        )
    text = _decode(path.read_bytes().removeprefix(BOM), path, 1)
    blank = re.compile(r"[ \t\r\n]*")
    position, line, counted = text.index("[") + 1, 1, 0
    more = True
    while more:
        start = blank.match(text, position).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]" and position == text.index("[") + 1:
            return
        where = origin(str(path), line)
        row, end = _parse(lambda s=start: _decode_at(text, s), where, text[start : start + 61])  # type: ignore[misc]
        yield line, _checked(row, where)
        end = blank.match(text, end).end()  # type: ignore[union-attr]
        more, position = text[end : end + 1] == ",", end + 1
        if not more and text[end:].strip() != "]":
            line += text.count("\n", counted, end)
            raise DataError(
                f"{origin(str(path), line)}: broken JSON, expected ',' or the closing ']' of the array, got "
                f"{start_of(text[end : end + 61]) if text[end:] else 'the end of the file'}."
            )


def _decode_at(text: str, start: int) -> tuple[Any, int]:
    try:
        return _decoder.raw_decode(text, start)
    except StopIteration as error:  # the scanner's way to say so below Python 3.13
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _read_csv(path: Path) -> Rows:
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    line = 1
    try:
        reader = csv.reader((text for _, text in _lines(path)), strict=True)
        header = next(reader, None)
        if header is None:
            return
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise DataError(
                f"{origin(str(path), 1)}: the column {sorted(repeated)[0]!r} stands twice in the header. Rename one."
            )
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{origin(str(path), line)}: {len(cells)} cells, but the header names {len(header)} columns "
                    f"({', '.join(header)}). The row begins with {start_of(','.join(cells))}. Quote text that holds "
                    'a comma or a line break: "…"; double a quote within it: "".'
                )
            if cells:
                yield line, dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{origin(str(path), line)}: broken CSV in the row that begins here ({error}). Most often a quote "
            "that is opened and not closed."
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(path: Path) -> Rows:
    import datasets
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            repeated = {name for name in names if names.count(name) > 1}
            if repeated:
                raise DataError(
                    f"{path}: the column {sorted(repeated)[0]!r} stands twice. Rename one."
                )
            schema = file.schema_arrow
            described = b"huggingface" in (schema.metadata or {})
            classes = _classes(datasets.Features.from_arrow_schema(schema)) if described else {}
            yield from _numbered(file.iter_batches(batch_size=1000), classes)
    except pa.ArrowException as error:
        raise DataError(
            f"{path} cannot be read as Parquet ({str(error).splitlines()[0]}). Write the file anew."
        ) from error


def dataset_rows(data: Dataset) -> Rows:
    """The rows of a data set as they are stored, with the names of classes in place of their numbers."""
    yield from _numbered(data.with_format("arrow").iter(batch_size=1000), _classes(data.features))


def _classes(features: Features) -> dict[str, dict[int, str]]:
    """The names of the classes of each column that holds classes, or lists of them."""
    kinds = {name: getattr(feature, "feature", feature) for name, feature in features.items()}
    return {
        name: dict(enumerate(kind.names)) for name, kind in kinds.items() if hasattr(kind, "names")
    }


def _numbered(batches: Iterable[Any], classes: dict[str, dict[int, str]]) -> Rows:
    """Rows of batches (pyarrow's tables), counted from 1; a class without a name, such as -1, is null."""
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            number += 1
            for column, names in classes.items():
                row[column] = _class(row[column], names)
            yield number, row


def _class(value: Any, names: dict[int, str]) -> Any:
    return [names.get(v) for v in value] if isinstance(value, list) else names.get(value)


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}

"""Readers of the file types: checked rows, each with the line that it came from.

Why not pandas or `datasets` readers: they name no line, take a duplicate key's last value in
silence, and hold a one-gigabyte line whole. These stream, and stop with one clear error.
"""

from __future__ import annotations

import csv
import itertools
import json
import re
import shlex
from collections.abc import Callable, Generator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from prefixtune_cli.data.stored import parquet_rows, saved_rows
from prefixtune_cli.errors import DataError

MAX_LINE_BYTES = 64 * 2**20
MAX_JSON_ARRAY_BYTES = 2**30
BOM = b"\xef\xbb\xbf"
BLANK = re.compile(r"[ \t\r\n]*")
# The keys of an object around the rows.
AROUND = {
    "data", "dataset", "dev", "entries", "examples", "instances", "items", "records", "rows", "samples", "test",
    "train", "validation",
}  # fmt: skip
SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
SEPARATED = (".csv", ".tsv")  # their cells have no types
BY_LINE = (".jsonl", ".ndjson", ".json", *SEPARATED)

Row = dict[str, Any]
Rows = Iterator[tuple[int, Row]]


def origin(file: str, line: int) -> str:
    """Where a row came from, in words: `my.jsonl, line 18`; Parquet's and a data set's rows have no lines."""
    return f"{file}, {_unit(file)} {line}"


def is_by_line(file: str) -> bool:
    """Whether a file is of a type that has lines, and no table."""
    return file.lower().endswith(BY_LINE)


@lru_cache
def _unit(file: str) -> str:
    return "line" if is_by_line(file) else "row"


def start_of(text: str, length: int = 60) -> str:
    """The beginning of a text, quoted, for an error message."""
    return repr(text if len(text) <= length else text[:length] + "…")


def read(path: Path) -> Rows:
    """Yield (line, row) of a file, by its suffix, or of a saved data set; lines count from 1, and so do stored rows.

    Raises:
        DataError: the file is empty, unreadable, or wrong in a line, which is named.
    """
    rows = saved_rows(path) if path.is_dir() else READERS[path.suffix.lower()](path)
    try:
        first = next(rows, None)
        if first is None:
            size = "" if path.is_dir() else f"{path.stat().st_size} bytes and "
            raise DataError(
                f"{path} is empty: it has {size}no row. Give a file with at least one row."
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
            f"Convert the file first: {iconv(path, guess)}"
        ) from None


def iconv(path: Path, encoding: str = "latin1") -> str:
    """The command that makes a file UTF-8, as it can be pasted."""
    converted = shlex.quote(f"{path.stem}-utf8{path.suffix}")
    return f"iconv -f {encoding} -t utf-8 {shlex.quote(str(path))} > {converted}"


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
        array = (
            " Where the whole file is one array, name it .json." if isinstance(row, list) else ""
        )
        raise DataError(
            f"{where}: a row must be a JSON object with named columns, got {start_of(json.dumps(row))}. Write it as "
            f'{{"text": …}} or {{"prompt": …, "completion": …}}.{array}'
        )
    return row


def _read_jsonl(path: Path) -> Rows:
    for number, line in _lines(path):
        text = line.rstrip(" \t\r\n")
        if text.strip():
            where = origin(str(path), number)
            yield number, _checked(_parse(lambda t=text: _decoder.decode(t), where, text), where)  # type: ignore[misc]


def _read_json(path: Path) -> Rows:
    """An array of objects, one object a line, or one object around the array, as in {"data": […]}."""
    if _is_by_line(path):
        yield from _read_jsonl(path)
        return
    if path.stat().st_size > MAX_JSON_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of {path.stat().st_size / 2**30:.1f} GiB must be read whole, and the limit is "
            f"{MAX_JSON_ARRAY_BYTES // 2**30} GiB. Write it as JSON Lines, which stream: "
            f"jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}.jsonl')}"
        )
    text = _decode(path.read_bytes().removeprefix(BOM), path, 1)
    start = _after_blank(text, 0)
    if text[start : start + 1] == "[":
        end = yield from _array(text, start, path)
    else:
        end = yield from _object_or_its_rows(text, start, path)
    if text[end:].strip():
        behind = _after_blank(text, end)
        raise DataError(
            f"{origin(str(path), text.count(chr(10), 0, behind) + 1)}: broken JSON, got "
            f"{start_of(text[behind : behind + 61])} behind the end of the whole."
        )


def _is_by_line(path: Path) -> bool:
    """Whether a file has an object on its first line, and more lines."""
    with open(path, "rb") as file:
        first = file.readline(MAX_LINE_BYTES).removeprefix(BOM)
        while first and not first.strip():
            first = file.readline(MAX_LINE_BYTES)
        more = any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))
    first = first.strip()
    return not first or (more and first[:1] == b"{" and first[-1:] == b"}")


def _array(text: str, opening: int, path: Path) -> Generator[tuple[int, Row], None, int]:
    """The rows of the array that opens there; returns where it ends."""
    position, line, counted = opening + 1, text.count("\n", 0, opening) + 1, opening
    more, end = True, opening
    while more:
        start = _after_blank(text, position)
        line, counted = line + text.count("\n", counted, start), start
        if text[start : start + 1] == "]" and position == opening + 1:
            return start + 1
        where = origin(str(path), line)
        row, behind = _parse(lambda s=start: _decode_at(text, s), where, text[start : start + 61])  # type: ignore[misc]
        yield line, _checked(row, where)
        end = _after_blank(text, behind)
        more, position = text[end : end + 1] == ",", end + 1
    if text[end : end + 1] != "]":
        line += text.count("\n", counted, end)
        raise DataError(
            f"{origin(str(path), line)}: broken JSON, expected ',' or the closing ']' of the array, got "
            f"{start_of(text[end : end + 61]) if text[end:] else 'the end of the file'}."
        )
    return end + 1


def _object_or_its_rows(text: str, start: int, path: Path) -> Generator[tuple[int, Row], None, int]:
    """One object: a row, or what stands around the rows; returns where it ends."""
    line = text.count("\n", 0, start) + 1
    where = origin(str(path), line)
    whole, end = _parse(lambda: _decode_at(text, start), where, text[start : start + 61])
    whole = _checked(whole, where)
    lists = [name for name, value in whole.items() if _are_rows(value)]
    around = [name for name in lists if name.lower() in AROUND or len(whole) == 1]
    if len(around) > 1:
        raise DataError(
            f"{path}: one object with the lists {' and '.join(around)}. Give each a file of its own: "
            f"jq .{around[0]} {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-{around[0]}.json')}"
        )
    if not around:
        yield line, whole
        return int(end)
    position = _value_of(around[0], text, start)
    yield from _array(text, position, path)
    return int(end)


def _value_of(name: str, text: str, opening: int) -> int:
    """Where the value of a key begins, in an object that opens there and is known to have it."""
    position, key = opening, None
    while key != name:
        if key is not None:
            position = _decode_at(text, position)[1]
        comma = _after_blank(text, position)  # or the opening brace
        key, position = _decode_at(text, _after_blank(text, comma + 1))
        position = _after_blank(text, _after_blank(text, position) + 1)  # behind the colon
    return position


def _are_rows(value: Any) -> bool:
    """A list of objects that are no messages, as a row may hold a list of these."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not {"role", "from"} & value[0].keys()
    )


def _after_blank(text: str, position: int) -> int:
    found = BLANK.match(text, position)
    assert found is not None, "it matches nothing at all, too"
    return found.end()


def _decode_at(text: str, start: int) -> tuple[Any, int]:
    try:
        return _decoder.raw_decode(text, start)
    except StopIteration as error:  # the scanner's way to say so below Python 3.13
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _read_csv(path: Path) -> Rows:
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    line, above = 1, 0
    try:
        lines = (text for _, text in _lines(path))
        first = next(lines, "")
        separator = "\t" if path.suffix.lower() == ".tsv" else _separator(first)
        if told := re.fullmatch(r"sep=(\S)\s*", first):  # Excel's own way to say so
            separator, first, above = told[1], next(lines, ""), 1
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
        header = next(reader) if first else []
        if not header:
            return
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise DataError(
                f"{origin(str(path), 1)}: the column {sorted(repeated)[0]!r} stands twice in the header. Rename one."
            )
        line = above + reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                raise DataError(
                    f"{origin(str(path), line)}: {len(cells)} cells, but the header names {len(header)} columns "
                    f"({', '.join(header)}). The row begins with {start_of(separator.join(cells))}. Quote text that "
                    f"holds {SEPARATORS.get(separator, repr(separator))} or a line break: "
                    '"…"; double a quote within it: "".'
                )
            if cells:
                yield line, dict(zip(header, cells, strict=True))
            line = above + reader.line_num + 1
    except csv.Error as error:
        raise DataError(
            f"{origin(str(path), line)}: broken CSV in the row that begins here ({error}). Most often a quote "
            "that is opened and not closed."
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _separator(header: str) -> str:
    """What parts the cells: of the usual signs the one that makes the most columns, a comma where all make one."""
    return max(SEPARATORS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))


READERS: dict[str, Callable[[Path], Rows]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": parquet_rows,
    ".tsv": _read_csv,
    ".ndjson": _read_jsonl,
}

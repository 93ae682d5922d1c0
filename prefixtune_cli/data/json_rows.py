"""The rows of JSON Lines and of JSON, each with its line."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from prefixtune_cli.data.lines import (
    BOM,
    MAX_LINE_BYTES,
    Row,
    Rows,
    decode,
    origin,
    read_lines,
    start_of,
)
from prefixtune_cli.errors import DataError

MAX_JSON_ARRAY_BYTES = 2**30
BLANK = re.compile(r"[ \t\r\n]*")
# Keys whose value may be the list of rows, if a file is one object.
AROUND = {
    "data", "dataset", "dev", "entries", "examples", "instances", "items", "records", "rows", "samples", "test",
    "train", "validation",
}  # fmt: skip


def jsonl_rows(path: Path) -> Rows:
    """One object per line."""
    for number, line in read_lines(path):
        text = line.rstrip(" \t\r\n")
        if text.strip():
            where = origin(str(path), number)
            yield number, _checked(_parse(lambda t=text: _decoder.decode(t), where, text), where)  # type: ignore[misc]


def json_rows(path: Path) -> Rows:
    """An array of objects, one object per line, or one object around the array, as in {"data": […]}."""
    if _has_one_row_a_line(path):
        yield from jsonl_rows(path)
        return
    if path.stat().st_size > MAX_JSON_ARRAY_BYTES:
        raise DataError(
            f"{path}: a JSON array of {path.stat().st_size / 2**30:.1f} GiB must be read whole, and the limit is "
            f"{MAX_JSON_ARRAY_BYTES // 2**30} GiB. Write it as JSON Lines, which stream: "
            f"jq -c '.[]' {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}.jsonl')}"
        )
    text = decode(path.read_bytes().removeprefix(BOM), path, 1)
    start = _after_blank(text, 0)
    if text[start : start + 1] == "[":
        end = yield from _array(text, start, path)
    else:
        end = yield from _object_or_its_rows(text, start, path)
    if text[end:].strip():
        behind = _after_blank(text, end)
        raise DataError(
            f"{origin(str(path), text.count(chr(10), 0, behind) + 1)}: broken JSON, got "
            f"{start_of(text[behind : behind + 61])} after its end."
        )


def _has_one_row_a_line(path: Path) -> bool:
    """Whether a file has an object on its first line, and more lines."""
    with open(path, "rb") as file:
        first = file.readline(MAX_LINE_BYTES).removeprefix(BOM)
        while first and not first.strip():
            first = file.readline(MAX_LINE_BYTES)
        more = any(chunk.strip() for chunk in iter(lambda: file.read(2**16), b""))
    first = first.strip()
    return not first or (more and first[:1] == b"{" and first[-1:] == b"}")


def _array(text: str, opening: int, path: Path) -> Generator[tuple[int, Row], None, int]:
    """Yield the rows of the array that opens there; return where it ends."""
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
    """Yield the object, if it is a row, or the rows in it; return where it ends."""
    line = text.count("\n", 0, start) + 1
    where = origin(str(path), line)
    whole, end = _parse(lambda: _decode_at(text, start), where, text[start : start + 61])
    whole = _checked(whole, where)
    lists = [name for name, value in whole.items() if _are_rows(value)]
    around = [name for name in lists if name.lower() in AROUND or len(whole) == 1]
    if len(around) > 1:
        raise DataError(
            f"{path}: one object with the lists {' and '.join(around)}. Write each to its own file: "
            f"jq .{around[0]} {shlex.quote(str(path))} > {shlex.quote(f'{path.stem}-{around[0]}.json')}"
        )
    if not around:
        yield line, whole
        return int(end)
    position = _value_of(around[0], text, start)
    yield from _array(text, position, path)
    return int(end)


def _value_of(name: str, text: str, opening: int) -> int:
    """Where the value of a key begins, in the object that opens there and has the key."""
    position, key = opening, None
    while key != name:
        if key is not None:
            position = _decode_at(text, position)[1]
        comma = _after_blank(text, position)  # or the opening brace
        key, position = _decode_at(text, _after_blank(text, comma + 1))
        position = _after_blank(text, _after_blank(text, position) + 1)  # behind the colon
    return position


def _are_rows(value: Any) -> bool:
    """Whether a value is a list of objects other than messages: a single row may hold a list of messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and isinstance(value[0], dict)
        and not {"role", "from"} & value[0].keys()
    )


def _after_blank(text: str, position: int) -> int:
    found = BLANK.match(text, position)
    assert found is not None, "the pattern matches the empty text as well"
    return found.end()


def _decode_at(text: str, start: int) -> tuple[Any, int]:
    try:
        return _decoder.raw_decode(text, start)
    except StopIteration as error:  # what the scanner raises below Python 3.13
        raise json.JSONDecodeError("Expecting value", text, error.value) from None


def _parse(parse: Callable[[], Any], where: str, text: str) -> Any:
    try:
        return parse()
    except _DuplicateKey as error:
        raise DataError(
            f"{where}: the key {str(error)!r} occurs twice in one object. Keep one of the two. The line begins "
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
        array = " If the whole file is one array, name it .json." if isinstance(row, list) else ""
        raise DataError(
            f"{where}: a row must be a JSON object with named columns, got {start_of(json.dumps(row))}. Write it as "
            f'{{"text": …}} or {{"prompt": …, "completion": …}}.{array}'
        )
    return row


class _DuplicateKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) != len(pairs):
        names = [name for name, _ in pairs]
        raise _DuplicateKey(next(name for name in names if names.count(name) > 1))
    return row


_decoder = json.JSONDecoder(object_pairs_hook=_object)

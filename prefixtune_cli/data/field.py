"""One value of a row that must be text, and the error if it is something else."""

from __future__ import annotations

import json
import math

from prefixtune_cli.data.lines import Row, start_of
from prefixtune_cli.errors import DataError


def text(row: Row, column: str, where: str) -> str:
    """The column's value, a text that can be encoded.

    Raises:
        DataError: it is not a text, or holds half of a surrogate pair.
    """
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the column {column!r} must be text, got {named(value)}. {_instead(column, value)}"
        )
    if not value.isascii():
        _check_unicode(value, column, where)
    return value


def written(row: Row, column: str, where: str) -> str:
    """The column's value as text: a text, or a number as it is written, because classes are often numbers.

    Raises:
        DataError: it is neither a text nor a number.
    """
    value = row[column]
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return text(row, column, where)


def _check_unicode(value: str, column: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the column {column!r} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which "
            "is not a character. Write the character itself, or both halves."
        ) from None


def named(value: object) -> str:
    """A value with its kind, for an error: `a number: 3`."""
    if value is None:
        return "null"
    kind = {
        dict: "an object",
        list: "a list",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    return f"{kind.get(type(value), type(value).__name__)}: {start_of(repr(value))}"


def _instead(column: str, value: object) -> str:
    if value is None:
        return 'Remove the row, or write "" for an empty text.'
    if isinstance(value, list) and value and not isinstance(value[0], dict):
        return 'Write it as one text, such as "a, b".'
    if isinstance(value, list) and column in ("prompt", "completion"):
        return (
            "Write both prompt and completion as texts, or both as lists of messages, in every row."
        )
    if isinstance(value, list):
        return "A list of messages belongs in a column named messages: --map messages=COLUMN."
    if isinstance(value, dict):
        return "Write only its text."
    return f'Write it as text: "{column}": "{value}".'

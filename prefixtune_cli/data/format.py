"""The column layouts that a data set may have, and their one common form.

Whatever comes in leaves as one of three layouts: `messages` (a list of {role, content}),
`prompt` + `completion`, or `text`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

from prefixtune_cli.data.read import Row, start_of
from prefixtune_cli.errors import DataError

Layout = Literal["messages", "prompt-completion", "text"]

# ShareGPT's names for the speakers, beside the roles themselves.
ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}


@dataclass(frozen=True)
class Format:
    """A layout that files come in: its columns, what it becomes, and how."""

    name: str
    columns: tuple[str, ...]
    layout: Layout
    convert: Callable[[Row, str], Row]
    optional: tuple[str, ...] = ()


def _text(row: Row, column: str, where: str) -> str:
    value = row[column]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: the column {column!r} must be text, got {_named(value)}. {_instead(column, value)}"
        )
    if not value.isascii():
        _check_unicode(value, column, where)
    return value


def _written(row: Row, column: str, where: str) -> str:
    """A text, or a number as it is written: classes are often numbers.

    Raises:
        DataError: it is neither.
    """
    value = row[column]
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    return _text(row, column, where)


def _check_unicode(value: str, column: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: the column {column!r} holds half of a surrogate pair (\\u{ord(value[error.start]):04x}), which "
            "is no character. Write the character itself, or both halves."
        ) from None


def _named(value: object) -> str:
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
    if isinstance(value, list):
        return "A list of messages belongs in a column named messages: --map messages=COLUMN."
    if isinstance(value, dict):
        return "Write its text alone."
    return f'Write it as text: "{column}": "{value}".'


def _messages(column: str) -> Callable[[Row, str], Row]:
    def convert(row: Row, where: str) -> Row:
        turns = row[column]
        if not isinstance(turns, list) or not turns:
            got = "an empty list" if turns == [] else _named(turns)
            raise DataError(
                f"{where}: the column {column!r} must be a list of messages, got {got}. Write "
                '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
            )
        return {
            "messages": [
                _message(turn, f"{where}, message {i + 1}") for i, turn in enumerate(turns)
            ]
        }

    return convert


def _message(turn: Any, where: str) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise DataError(
            f'{where}: a message must be an object, got {_named(turn)}. Write {{"role": "user", "content": "…"}}.'
        )
    who, what = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    for key in (who, what):
        if key not in turn:
            raise DataError(
                f"{where}: {key!r} is missing; the keys are {', '.join(map(repr, turn)) or 'none'}. Write "
                '{"role": "user", "content": "…"}, or ShareGPT\'s {"from": "human", "value": "…"}.'
            )
    if turn.get("tool_calls"):
        raise DataError(
            f"{where}: tool_calls are not supported. Write the call as text in 'content'."
        )
    role = ROLES.get(turn[who]) if isinstance(turn[who], str) else None
    if role is None:
        raise DataError(f"{where}: {who!r} must be one of {', '.join(ROLES)}, got {turn[who]!r}.")
    return {"role": role, "content": _text(turn, what, where)}


def _pair(prompt: str, completion: str) -> Callable[[Row, str], Row]:
    def convert(row: Row, where: str) -> Row:
        return {
            "prompt": _written(row, prompt, where),
            "completion": _written(row, completion, where),
        }

    return convert


def _alpaca(row: Row, where: str) -> Row:
    instruction = _text(row, "instruction", where)
    context = _text(row, "input", where) if row.get("input") is not None else ""
    return {
        "prompt": f"{instruction}\n\n{context}" if context else instruction,
        "completion": _written(row, "output", where),
    }


# In order of preference, for columns that fit more than one.
FORMATS = {
    format.name: format
    for format in (
        Format("messages", ("messages",), "messages", _messages("messages")),
        Format("conversations", ("conversations",), "messages", _messages("conversations")),
        Format(
            "prompt-completion",
            ("prompt", "completion"),
            "prompt-completion",
            _pair("prompt", "completion"),
        ),
        Format("alpaca", ("instruction", "output"), "prompt-completion", _alpaca, ("input",)),
        Format(
            "question-answer",
            ("question", "answer"),
            "prompt-completion",
            _pair("question", "answer"),
        ),
        Format("text", ("text",), "text", lambda row, where: {"text": _text(row, "text", where)}),
    )
}


def fitting(columns: Collection[str]) -> list[Format]:
    """The formats whose columns are all there, the preferred one first."""
    return [format for format in FORMATS.values() if set(format.columns) <= set(columns)]


def convert(row: Row, format: Format, where: str, *, needs_assistant: bool) -> Row:
    """One row, renamed before, in its common layout.

    Raises:
        DataError: a column is missing, the row is of another format, or a field is not what it must be.
    """
    missing = [column for column in format.columns if column not in row]
    if missing:
        other = fitting(row)
        if other:
            raise DataError(
                f"{where}: mixed formats. The rows before are {format.name} ({' + '.join(format.columns)}), and this "
                f"one is {other[0].name} ({', '.join(row)}). Give each format a file and a run of its own."
            )
        raise DataError(
            f"{where}: the column {missing[0]!r} is missing; the columns are {', '.join(row) or 'none'}. "
            f"Every row of the format {format.name} needs {' and '.join(format.columns)}."
        )
    converted = format.convert(row, where)
    if needs_assistant and format.layout == "messages":
        roles = [message["role"] for message in converted["messages"]]
        if "assistant" not in roles:
            raise DataError(
                f"{where}: no message has the role assistant (the roles are {', '.join(roles)}), so there is nothing "
                "to train on. Add an answer, remove the row, or use --train-on all."
            )
    return converted

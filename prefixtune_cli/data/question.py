"""Prompts without answers: the rows that `ptp generate --data` reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prefixtune_cli.data import locate
from prefixtune_cli.data.columns import check_map, rename
from prefixtune_cli.data.conversation import ANSWERS, Conversation
from prefixtune_cli.data.format import FORMATS
from prefixtune_cli.data.lines import Row, is_by_line, origin
from prefixtune_cli.data.read import read
from prefixtune_cli.data.stored import without_fillers
from prefixtune_cli.errors import DataError

ASKED = {format.columns[0] for format in FORMATS.values()}


def questions(
    source: str, mapping: Mapping[str, str], *, usual: Mapping[str, str] | None = None
) -> Iterator[tuple[Row, Conversation]]:
    """Each row of a local source, as it is in the file, and as a conversation that waits for an answer.

    The formats are those of training, but the answer may be missing. If it is there, it is left out.

    Args:
        source: a file or a folder.
        mapping: {field: column}, as typed.
        usual: {field: column} of the run's own data, used if nothing was typed and the row has the column.

    Raises:
        DataError: the source is not a local file, or a row has no prompt.
    """
    check_map(mapping)
    found = locate.local_files(source)
    if found is None:
        raise DataError(
            f"{source} is not a file on this machine. Give a local file of prompts with --data."
        )
    if found.notice is not None:
        raise DataError(f"{source} has more than one part. {found.notice} Name one file or part.")
    for path in found.files:
        for line, raw in read(path):
            where = origin(str(path), line)
            # The columns of questions must be there; those of answers may be missing.
            there = {f: c for f, c in mapping.items() if c in raw or f in ASKED}
            known = {field: column for field, column in (usual or {}).items() if column in raw}
            row = raw if is_by_line(str(path)) else without_fillers(raw)
            yield raw, _question(rename(row, there if mapping else known, where), where)


def _question(row: Row, where: str) -> Conversation:
    if isinstance(row.get("prompt"), list):  # TRL's conversational pairs
        row = row | {"messages": row["prompt"]}
    for format in FORMATS.values():
        if format.name == "text" or format.columns[0] not in row:
            continue
        unanswered = row | {column: "" for column in format.columns[1:]}
        conversation = Conversation.of(format.convert(unanswered, where))
        messages = conversation.messages
        asked = max((i for i, m in enumerate(messages) if m["role"] not in ANSWERS), default=-1)
        if asked >= 0:
            return conversation.until(asked + 1)
        raise DataError(f"{where}: the conversation has no question, only answers.")
    names = ", ".join(format.columns[0] for format in FORMATS.values() if format.name != "text")
    column = "text" if "text" in row else "COLUMN"
    raise DataError(
        f"{where}: no prompt; the columns are {', '.join(row) or 'none'}, and a prompt is one of {names}. "
        f"Name it with --map prompt={column}."
    )

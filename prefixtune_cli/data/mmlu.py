"""MMLU's rows, in the form of its authors and in the form of the hub (`cais/mmlu`).

The authors' form is CSV without a header, with a letter for the answer (github.com/hendrycks/test).
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune_cli.data.lines import Row, iconv, origin, start_of
from prefixtune_cli.data.table import Line, check
from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from datasets import Features

NAMES = ("mmlu", "mmlu_no_train")
COLUMNS = ("question", "choices", "answer")
CELLS = ("question", "A", "B", "C", "D", "answer")
ANSWERS = {name: i for names in ("ABCD", "0123") for i, name in enumerate(names)}


def original_rows(file: Path) -> list[tuple[int, Row]]:
    """The rows of MMLU's CSV without a header; none if there is a header."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        where = origin(str(file), error.object.count(b"\n", 0, error.start) + 1)
        raise DataError(
            f"{where}: not UTF-8 ({error.reason}). Put a converted file in its place: {iconv(file)}"
        ) from None
    reader = csv.reader(io.StringIO(text, newline="\n"), strict=True)
    rows: list[tuple[int, Row]] = []
    line = 1
    try:
        for cells in reader:
            if not rows and {"question", "answer"} <= {*cells}:
                return []
            if cells and len(cells) != len(CELLS):
                raise DataError(
                    f"{origin(str(file), line)}: {len(cells)} cells, and MMLU's rows have {len(CELLS)}: question, "
                    f"A, B, C, D, the answer's letter. The row begins with {start_of(','.join(cells))}. Quote text "
                    'that holds a comma: "…".'
                )
            if cells:
                rows.append((line, dict(zip(CELLS, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as error:
        where = origin(str(file), line)
        raise DataError(f"{where}: broken CSV in the row that begins here ({error}).") from None
    return rows


def hub_row(line: Line, subject: str | None) -> Row:
    """A row in the hub's columns: the choices in one list, the answer as a number, texts untouched.

    Args:
        line: a row in any of MMLU's forms.
        subject: the subject of a row that has none; None if every row must have its own.

    Raises:
        DataError: the row is wrong.
    """
    row = dict(line.row)
    if "choices" not in row and {*"ABCD"} <= row.keys():
        row["choices"] = [row[letter] for letter in "ABCD"]
    if subject is not None:
        row.setdefault("subject", subject)
    check(line._replace(row=row), (*COLUMNS, "subject"))
    question, choices, answer = (row[name] for name in COLUMNS)
    if not isinstance(question, str) or not question.strip():
        must, got = "'question' must be a text that is not empty", repr(question)
    elif not isinstance(choices, list) or [*map(type, choices)] != [str] * 4:
        got = f"{len(choices)}: {choices}" if isinstance(choices, list) else repr(choices)
        must = "'choices' must be a list of 4 texts"
    elif not all(choice.strip() for choice in choices):
        must, got = "'choices' must be 4 texts that are not empty", repr(choices)
    elif str(answer) not in ANSWERS:
        must, got = "'answer' must be A, B, C or D, or their number 0, 1, 2 or 3", repr(answer)
    else:
        texts = {"question": question, "subject": row["subject"]}
        return texts | {"choices": choices, "answer": ANSWERS[str(answer)]}
    raise DataError(f"{line.where}: {must}, got {got[:80]}")


def hub_features() -> Features:
    """The types that the hub's data set has."""
    from datasets import ClassLabel, Features, List, Value

    texts = {"question": Value("string"), "subject": Value("string")}
    others = {"choices": List(Value("string")), "answer": ClassLabel(names=[*"ABCD"])}
    return Features(texts | others)

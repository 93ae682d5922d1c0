"""The rows of CSV and TSV, each with the line on which it begins."""

from __future__ import annotations

import csv
import itertools
import re
from pathlib import Path

from prefixtune_cli.data.lines import MAX_LINE_BYTES, Rows, origin, read_lines, start_of
from prefixtune_cli.errors import DataError

SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}


def csv_rows(path: Path) -> Rows:
    """One row per line, or over several lines if a cell is quoted. The first line names the columns."""
    previous_limit = csv.field_size_limit(MAX_LINE_BYTES)
    line, above = 1, 0
    try:
        lines = (text for _, text in read_lines(path))
        first = next(lines, "")
        separator = "\t" if path.suffix.lower() == ".tsv" else _separator(first)
        if told := re.fullmatch(r"sep=(\S)\s*", first):  # Excel's first line
            separator, first, above = told[1], next(lines, ""), 1
        reader = csv.reader(itertools.chain([first], lines), delimiter=separator, strict=True)
        header = next(reader) if first else []
        if not header:
            return
        repeated = {name for name in header if header.count(name) > 1}
        if repeated:
            raise DataError(
                f"{origin(str(path), 1)}: the column {sorted(repeated)[0]!r} occurs twice in the header. Rename one."
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
            f"{origin(str(path), line)}: broken CSV in the row that begins here ({error}). Most often, a quote "
            "is opened and not closed."
        ) from None
    finally:
        csv.field_size_limit(previous_limit)


def _separator(header: str) -> str:
    """The usual sign that splits the header into the most columns; a comma if none splits it."""
    return max(SEPARATORS, key=lambda sign: len(next(csv.reader([header], delimiter=sign), [])))

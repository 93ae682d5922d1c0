"""Fits a table to the terminal: figures stay whole, words are not cut, and every cell keeps its head.

If a table is too wide, we try these in order: wrap heads; transpose the table; drop optional columns; wrap cells of
text; print each row, or each column, by itself. A table is a list of lines; the first line is the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

GAP = 2  # between two columns
TEXT = 30  # characters; a longer cell is text, and may wrap to this width

Lines = Sequence[Sequence[str]]


def lay_out(
    lines: Lines, width: int, *, optional: Sequence[str] = (), by_column: bool = False
) -> tuple[list[tuple[str, Table]], list[str]]:
    """A table, laid out for a terminal.

    Args:
        lines: the head and the rows, all with as many cells; the first cell names the row.
        width: of the terminal, in characters.
        optional: columns that may be left out, the first one first.
        by_column: whether a column, not a row, describes one thing; if nothing else fits, it is printed by itself.

    Returns:
        Tables with their titles, which are empty if there is one table; and the columns that are left out.
    """
    turned = [list(line) for line in zip(*lines, strict=True)]
    for text_wraps in (False, True):
        for tried in (lines, turned):
            if widths := _fitted(tried, width, text_wraps=text_wraps):
                return [("", _table(tried, widths, names_are_bold=tried is turned))], []
        for gone in (optional[:count] for count in range(1, len(optional) + 1)):
            fewer = [
                [cell for cell, name in zip(line, lines[0], strict=True) if name not in gone]
                for line in lines
            ]
            if widths := _fitted(fewer, width, text_wraps=text_wraps):
                return [("", _table(fewer, widths))], [n for n in lines[0] if n in gone]
    return _one_by_one(turned if by_column else lines, width), []


def _one_by_one(lines: Lines, width: int) -> list[tuple[str, Table]]:
    """One table a row: the heads beside the row's cells, without empty cells."""
    head, *rows = lines
    names = min(max(map(_length, head[1:])), width // 2 - GAP)
    found = []
    for row in rows:
        pairs = [pair for pair in zip(head[1:], row[1:], strict=True) if pair[1]]
        found.append((row[0], _table([("", ""), *pairs], [names, width - names - GAP])))
    return found


def _fitted(lines: Lines, width: int, *, text_wraps: bool) -> list[int]:
    """The width of each column; an empty list if they do not fit."""
    columns = list(zip(*lines, strict=True))
    room = width - GAP * (len(columns) - 1)
    natural = [max(map(_length, column)) for column in columns]
    if sum(natural) <= room:
        return natural
    widths = [_least(column, text_wraps, is_name=not i) for i, column in enumerate(columns)]
    if sum(widths) > room:
        return []
    for _ in range(room - sum(widths)):  # each free character goes to the column that lacks most
        lacking = max(range(len(widths)), key=lambda i: natural[i] - widths[i])
        widths[lacking] = min(widths[lacking] + 1, natural[lacking])
    return widths


def _least(column: Sequence[str], text_wraps: bool, is_name: bool) -> int:
    """The least width of a column: its head wraps at spaces, and so do names and text if `text_wraps`."""
    head, *cells = column
    words = max(map(_length, head.split()), default=0)
    cell = max(map(_length, cells), default=0)
    if not text_wraps:
        return max(words, cell)
    if is_name:
        cell = max((_length(word) for text in cells for word in text.split()), default=0)
    return max(min(words, TEXT), min(cell, TEXT))


def _table(lines: Lines, widths: Sequence[int], *, names_are_bold: bool = False) -> Table:
    from rich.table import Table
    from rich.text import Text

    head, *rows = lines
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, GAP, 0, 0),
        header_style="bold",
        show_header=any(head),
    )
    for i, (name, width) in enumerate(zip(head, widths, strict=True)):
        bold = "bold" if names_are_bold and not i else ""
        table.add_column(Text(name), width=width, overflow="fold", style=bold)
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def _length(text: str) -> int:
    from rich.cells import cell_len

    return cell_len(text)

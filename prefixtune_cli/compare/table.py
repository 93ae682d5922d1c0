"""The table of a comparison: one row a contestant, figures with their units in the head. Needs no torch.

`columns` is for a terminal, where the best figure is marked by a star; `markdown` is for table.md, where it is bold.
What the marks mean, what was tested and why a cell failed stands under the table: see `legend`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeVar

from prefixtune_cli.compare.comparison import (
    FORGETTING,
    OOD,
    TEST,
    Comparison,
    Contestant,
    Group,
)
from prefixtune_cli.compare.legend import BEST, LARGER, legend
from prefixtune_cli.compare.metrics import (
    COSTS,
    FORGOTTEN,
    LEARNING_RATE,
    ON_DISK,
    PARAMETERS,
    Cost,
    Metric,
    shown,
)
from prefixtune_cli.compare.standing import Difference, Standing, Standings, standings

T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """One cell; `best` is shown in bold, or by a star."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """A head with its unit, and a cell for each row."""

    head: str
    entries: Sequence[Entry]

    @property
    def empty(self) -> bool:
        return not any(entry.text for entry in self.entries)


def columns(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Head and rows for a terminal: the base where it was measured, then the contestants; so for each group of them.

    Columns without any figure are left out.
    """
    return laid_out(comparison, lambda e: f"{e.text} {BEST}" if e.best else e.text)


def markdown(comparison: Comparison) -> str:
    """The table with its legend, as in table.md."""
    head, rows = laid_out(comparison, lambda e: f"**{e.text}**" if e.best else e.text)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)
    said = "".join(f"- {line}\n" for line in legend(comparison, bold=True))
    return f"{table}\n{said}"


def _escaped(cell: str) -> str:
    """A cell that does not end at a bar of its own."""
    return cell.replace("|", r"\|")


def laid_out(comparison: Comparison, show: Callable[[Entry], T]) -> tuple[list[str], list[list[T]]]:
    """Head and rows of what `show` makes of each cell."""
    found = [column for column in _columns(comparison) if not column.empty]
    rows = zip(*(column.entries for column in found), strict=True)
    return [column.head for column in found], [[show(entry) for entry in row] for row in rows]


def _columns(comparison: Comparison) -> Iterator[Column]:
    """In the order of the table; the base has a row where there is something to say of it."""
    groups, contestants = comparison.measured_together, comparison.contestants
    has_base = bool(comparison.base or comparison.groups or comparison.base_cost)

    def column(head: str, base: Base, cells: Sequence[str | Entry]) -> Column:
        left = iter([cell if isinstance(cell, Entry) else Entry(cell) for cell in cells])
        entries: list[Entry] = []
        for group in groups:
            entries += [Entry(base if isinstance(base, str) else base(group))] if has_base else []
            entries += islice(left, len(group.contestants))
        return Column(head, entries)

    every = [] if comparison.kind == "speed" else standings(comparison)
    yield column("method", lambda group: group.base, [_name(c) for c in contestants])
    for found in every:
        if found.data not in (OOD, FORGETTING):
            yield _quality(found, column)
            yield column(
                _titled(
                    found, f"difference from {contestants[0].label}, {found.metric.difference}"
                ),
                "",
                [_shown_difference(found, s.difference) for s in found.each],
            )
    yield from _costs(comparison, column)
    for found in every:
        if found.data in (OOD, FORGETTING):
            yield _quality(found, column, marks_differences=True)


Base = str | Callable[[Group], str]  # what stands in the row of a group's base
Make = Callable[[str, Base, Sequence[str | Entry]], Column]


def _name(contestant: Contestant) -> str:
    failed, cells = len(contestant.failures), len(contestant.cells)
    return f"{contestant.label} ({cells - failed} of {cells} seeds)" if failed else contestant.label


def _titled(found: Standings, what: str) -> str:
    """The head of a column, with the data set where it is not the test data."""
    if found.data in (TEST, FORGETTING):
        return what
    return f"{'OOD' if found.data == OOD else found.data}: {what}"


def _quality(found: Standings, column: Make, *, marks_differences: bool = False) -> Column:
    base = (
        "" if found.base is None or found.metric is FORGOTTEN else found.metric.figure(found.base)
    )
    cells = [_standing(found, s, marks_differences=marks_differences) for s in found.each]
    return column(_titled(found, found.metric.heading), base, cells)


def _standing(found: Standings, standing: Standing, *, marks_differences: bool) -> Entry:
    """`84.2 ± 1.3`; where the difference has no column of its own, it is marked here."""
    if standing.mean is None:
        return Entry("failed" if standing.failed else "")
    metric = found.metric
    text = metric.figure(standing.mean, standing.deviation, signed=metric is FORGOTTEN)
    difference = standing.difference
    if marks_differences and difference is not None and difference.larger_than_noise:
        text += f" {LARGER}"
    return Entry(text, standing.best)


def _shown_difference(found: Standings, difference: Difference | None) -> str:
    """`+3.1 [+0.4, +5.8] †`."""
    if difference is None:
        return ""
    metric = found.metric
    text = metric.figure(difference.value, signed=True)
    if difference.low is not None and difference.high is not None:
        low, high = (metric.figure(v, signed=True) for v in (difference.low, difference.high))
        text += f" [{low}, {high}]"
    return f"{text} {LARGER}" if difference.larger_than_noise else text


def _costs(comparison: Comparison, column: Make) -> Iterator[Column]:
    """Sizes, speeds and memory; with ratios where speed is what was measured."""
    contestants, speed_alone = comparison.contestants, comparison.kind == "speed"

    def costs(metric: Metric) -> Column:
        cells = [metric.cell(c) for c in contestants]
        return column(metric.heading, lambda group: metric.cell(group.base_cost), cells)

    yield costs(_in_thousands([c.trainable_parameters for c in contestants]))
    yield costs(ON_DISK)
    if not speed_alone:
        yield costs(LEARNING_RATE)
    for metric in COSTS:
        yield costs(metric)
        if metric.ratio and speed_alone:
            yield from _ratios(comparison, column, metric)


def _ratios(comparison: Comparison, column: Make, metric: Metric) -> Iterator[Column]:
    """To the group's base, and to its first LoRA where that takes part, with the rounds' range."""
    contestants = comparison.contestants
    to_base = [_ratio(c.cost, metric.over_base) for c in contestants]
    one = "1" if any(to_base) else ""
    yield column(f"{metric.name} × base", lambda group: one if group.base_cost else "", to_base)
    loras = [lora for group in comparison.measured_together if (lora := comparison.lora_of(group))]
    if not loras:
        return
    cells = [
        "1" if c in loras and c.cost else _ratio(c.cost, metric.over_lora) for c in contestants
    ]
    name = loras[0].label if len(loras) == 1 else loras[0].method
    yield column(
        f"{metric.name} × {name}", lambda group: _ratio(group.base_cost, metric.over_lora), cells
    )


def _ratio(cost: Cost | None, key: str) -> str:
    return shown(getattr(cost, key, None))


def _in_thousands(parameters: Sequence[int | None]) -> Metric:
    """Parameters in a unit that goes with all of them."""
    known = [count for count in parameters if count]
    large = bool(known) and min(known) >= 1e6
    return replace(PARAMETERS, unit="M" if large else "k", size=1e6 if large else 1e3)

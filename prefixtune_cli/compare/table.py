"""The table of a comparison: one row for each contestant, with the units in the head. It needs no torch.

`columns` is for a terminal, where a star marks the best figure. `markdown` is for table.md, where it is bold. `legend`
explains the marks under the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Comparison, Contestant
from prefixtune_cli.compare.legend import legend
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
from prefixtune_cli.compare.wording import BEST, LARGER


@dataclass(frozen=True)
class Entry:
    """One cell of the table; `best` marks the best figure of its column."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        head: its name with its unit.
        cells: one for each contestant.
        bases: a text for each group's base; empty where none has any.
    """

    head: str
    cells: Sequence[Entry]
    bases: Sequence[str] = ()


def columns(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """The head and the rows for a terminal."""
    head, rows = entries(comparison)
    return head, [[f"{e.text} {BEST}" if e.best else e.text for e in row] for row in rows]


def markdown(comparison: Comparison) -> str:
    """The table with its legend, as in table.md."""
    head, rows = entries(comparison)
    cells = [[f"**{e.text}**" if e.best else e.text for e in row] for row in rows]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *cells]
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    table = "".join(f"| {' | '.join(line)} |\n" for line in escaped)
    said = "".join(f"- {line}\n" for line in legend(comparison, bold=True))
    return f"{table}\n{said}"


def entries(comparison: Comparison) -> tuple[list[str], list[list[Entry]]]:
    """The head, and the rows: of each group its base, where it was measured, and then its contestants.

    Columns without any text are left out.
    """
    found = [(column.head, _of_rows(comparison, column)) for column in _columns(comparison)]
    filled = [(head, cells) for head, cells in found if any(cell.text for cell in cells)]
    rows = zip(*(cells for _, cells in filled), strict=True)
    return [head for head, _ in filled], [list(row) for row in rows]


def _of_rows(comparison: Comparison, column: Column) -> list[Entry]:
    """The column's cells from top to bottom."""
    has_base = bool(comparison.base or comparison.groups or comparison.base_cost)
    groups = comparison.measured_together
    left = iter(column.cells)
    found: list[Entry] = []
    for group, base in zip(groups, column.bases or [""] * len(groups), strict=True):
        found += [Entry(base)] if has_base else []
        found += islice(left, len(group.contestants))
    return found


def _columns(comparison: Comparison) -> Iterator[Column]:
    """All columns, from left to right."""
    every = standings(comparison)
    names = [Entry(_name(contestant)) for contestant in comparison.contestants]
    yield Column("method", names, [group.base for group in comparison.measured_together])
    for found in every:
        if found.data not in (OOD, FORGETTING):
            yield _quality(found)
            yield _differences(found)
    yield from _costs(comparison)
    for found in every:
        if found.data in (OOD, FORGETTING):
            yield _quality(found, marks_differences=True)


def _name(contestant: Contestant) -> str:
    failed, cells = len(contestant.failures), len(contestant.cells)
    return f"{contestant.label} ({cells - failed} of {cells} seeds)" if failed else contestant.label


def _titled(found: Standings, what: str) -> str:
    """The head of a column, with the data set's name unless it is the test data."""
    if found.data in (TEST, FORGETTING):
        return what
    return f"{'OOD' if found.data == OOD else found.data}: {what}"


def _quality(found: Standings, *, marks_differences: bool = False) -> Column:
    """The means; with `marks_differences` they carry the mark that a column of differences would show."""
    base = "" if found.base_beside is None else found.metric.figure(found.base_beside)
    cells = [_mean(found.metric, s, marks_difference=marks_differences) for s in found.each]
    return Column(_titled(found, found.metric.heading), cells, [base])


def _mean(metric: Metric, standing: Standing, *, marks_difference: bool) -> Entry:
    """`84.2 ± 1.3`."""
    if standing.mean is None:
        return Entry("failed" if standing.failed else "")
    text = metric.figure(standing.mean, standing.deviation, signed=metric is FORGOTTEN)
    difference = standing.difference
    if marks_difference and difference is not None and difference.larger_than_noise:
        text += f" {LARGER}"
    return Entry(text, standing.best)


def _differences(found: Standings) -> Column:
    head = f"difference from {found.each[0].contestant}, {found.metric.difference}"
    cells = [Entry(_difference(found.metric, s.difference)) for s in found.each]
    return Column(_titled(found, head), cells)


def _difference(metric: Metric, difference: Difference | None) -> str:
    """`+3.1 [+0.4, +5.8] †`."""
    if difference is None:
        return ""
    text = metric.figure(difference.value, signed=True)
    if difference.low is not None and difference.high is not None:
        low, high = (metric.figure(v, signed=True) for v in (difference.low, difference.high))
        text += f" [{low}, {high}]"
    return f"{text} {LARGER}" if difference.larger_than_noise else text


def _costs(comparison: Comparison) -> Iterator[Column]:
    """Sizes, learning rates, speeds and memory; a comparison of costs alone has ratios as well."""
    speed_alone = comparison.kind == "speed"
    yield _cost(comparison, _in_thousands([c.trainable_parameters for c in comparison.contestants]))
    yield _cost(comparison, ON_DISK)
    if not speed_alone:
        yield _cost(comparison, LEARNING_RATE)
    for metric in COSTS:
        yield _cost(comparison, metric)
        if metric.ratio and speed_alone:
            yield from _ratios(comparison, metric)


def _cost(comparison: Comparison, metric: Metric) -> Column:
    cells = [Entry(metric.cell(contestant)) for contestant in comparison.contestants]
    bases = [metric.cell(group.base_cost) for group in comparison.measured_together]
    return Column(metric.heading, cells, bases)


def _ratios(comparison: Comparison, metric: Metric) -> Iterator[Column]:
    """The ratios to the group's base, and to the group's first LoRA where it has one, with the rounds' range."""
    groups, contestants = comparison.measured_together, comparison.contestants
    to_base = [_ratio(c.cost, metric.over_base) for c in contestants]
    own = ["1" if any(to_base) and group.base_cost else "" for group in groups]
    yield Column(f"{metric.name} × base", [Entry(text) for text in to_base], own)
    loras = [lora for group in groups if (lora := comparison.lora_of(group))]
    if not loras:
        return
    to_lora = [
        "1" if c in loras and c.cost else _ratio(c.cost, metric.over_lora) for c in contestants
    ]
    name = loras[0].label if len(loras) == 1 else loras[0].method
    bases = [_ratio(group.base_cost, metric.over_lora) for group in groups]
    yield Column(f"{metric.name} × {name}", [Entry(text) for text in to_lora], bases)


def _ratio(cost: Cost | None, key: str) -> str:
    return shown(getattr(cost, key, None))


def _in_thousands(parameters: Sequence[int | None]) -> Metric:
    """The parameters in millions if every contestant has a million, else in thousands."""
    known = [count for count in parameters if count]
    large = bool(known) and min(known) >= 1e6
    return replace(PARAMETERS, unit="M" if large else "k", size=1e6 if large else 1e3)

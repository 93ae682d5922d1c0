"""The table of a comparison: one row a contestant, figures with their units in the head. Needs no torch.

`columns` is for a terminal, where the best figure is marked by a star; `markdown` is for table.md, where it is bold.
What the marks mean, what was tested and why a cell failed stands under the table: see `legend`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

from prefixtune_cli.compare.comparison import (
    FORGETTING,
    OOD,
    TEST,
    Comparison,
    Contestant,
    Cost,
    Group,
    Measured,
)
from prefixtune_cli.compare.legend import BEST, LARGER, legend
from prefixtune_cli.compare.standing import Difference, Standing, Standings, standings


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
    return _shown(comparison, lambda e: f"{e.text} {BEST}" if e.best else e.text)


def markdown(comparison: Comparison) -> str:
    """The table with its legend, as in table.md."""
    head, rows = _shown(comparison, lambda e: f"**{e.text}**" if e.best else e.text)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    table = "".join(f"| {' | '.join(map(_escaped, line))} |\n" for line in lines)
    said = "".join(f"- {line}\n" for line in legend(comparison, bold=True))
    return f"{table}\n{said}"


def _escaped(cell: str) -> str:
    """A cell that does not end at a bar of its own."""
    return cell.replace("|", r"\|")


def _shown(
    comparison: Comparison, show: Callable[[Entry], str]
) -> tuple[list[str], list[list[str]]]:
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
                _titled(found, f"difference from {contestants[0].label}, {_unit(found)}"),
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
    if found.data == TEST:
        return what
    return f"{'OOD' if found.data == OOD else found.data}: {what}"


def _unit(found: Standings) -> str:
    return "points" if found.metric == "exact match" else "nats"


def _quality(found: Standings, column: Make, *, marks_differences: bool = False) -> Column:
    base = "" if found.base is None else _figure(found, found.base)
    if found.metric == "forgetting":
        head = "forgetting, nats" if found.base is not None else "loss on other text, nats"
        base = ""  # what is shown is the increase over it
    else:
        head = _titled(found, "exact match, %" if found.metric == "exact match" else "loss, nats")
    cells = [_standing(found, s, marks_differences=marks_differences) for s in found.each]
    return column(head, base, cells)


def _standing(found: Standings, standing: Standing, *, marks_differences: bool) -> Entry:
    """`84.2 ± 1.3`; where the difference has no column of its own, it is marked here."""
    if standing.mean is None:
        return Entry("failed" if standing.failed else "")
    signed = found.metric == "forgetting" and found.base is not None
    text = _figure(found, standing.mean, signed=signed)
    if standing.deviation is not None:
        text += f" ± {_figure(found, standing.deviation)}"
    difference = standing.difference
    if marks_differences and difference is not None and difference.larger_than_noise:
        text += f" {LARGER}"
    return Entry(text, standing.best)


def _shown_difference(found: Standings, difference: Difference | None) -> str:
    """`+3.1 [+0.4, +5.8] †`."""
    if difference is None:
        return ""
    text = _figure(found, difference.value, signed=True)
    if difference.low is not None and difference.high is not None:
        low, high = (_figure(found, v, signed=True) for v in (difference.low, difference.high))
        text += f" [{low}, {high}]"
    return f"{text} {LARGER}" if difference.larger_than_noise else text


def _figure(found: Standings, value: float, *, signed: bool = False) -> str:
    """Fractions in percent with one digit, nats with three."""
    sign = "+" if signed else ""
    return f"{100 * value:{sign}.1f}" if found.metric == "exact match" else f"{value:{sign}.3f}"


def _costs(comparison: Comparison, column: Make) -> Iterator[Column]:
    """Sizes, speeds and memory; with ratios where speed is what was measured."""
    contestants = comparison.contestants
    parameters = [c.trainable_parameters for c in contestants]
    unit, size = _parameters_unit([p for p in parameters if p])
    yield column(f"trained parameters, {unit}", "", [_number(p, size) for p in parameters])
    stored = [c.adapter_bytes for c in contestants]
    yield column("adapter on disk, MB", "", [_number(b, 1e6) for b in stored])
    rates = [c.learning_rate for c in contestants]
    if comparison.kind != "speed":
        yield column("learning rate", "", ["" if r is None else f"{r:g}" for r in rates])

    def costs(head: str, show: Callable[[Cost | None], str]) -> Column:
        return column(
            head, lambda group: show(group.base_cost), [show(c.cost) for c in contestants]
        )

    for speed in SPEEDS:
        yield costs(speed.head, partial(_range, figure=speed.figure, scale=speed.scale))
        if comparison.kind == "speed":
            yield from _ratios(comparison, column, speed)
        if speed.what == "training":
            yield costs("peak memory, GiB", _memory)
    yield costs("KV cache a sequence, MB", _cache)


@dataclass(frozen=True)
class Speed:
    """A speed's column: what of it is shown, and how one compares two of them, above 1 being faster."""

    what: str
    head: str
    figure: Callable[[Cost], Measured | None]
    ratio: Callable[[Cost], Measured | None]
    over_lora: Callable[[Cost], Measured | None]
    scale: float = 1.0
    is_time: bool = False


SPEEDS = (
    Speed(
        "training",
        "training, tokens/s",
        lambda cost: cost.training_tokens_per_second,
        lambda cost: cost.training_ratio,
        lambda cost: cost.training_over_lora,
    ),
    Speed(
        "decode",
        "decode, tokens/s",
        lambda cost: cost.decode_tokens_per_second,
        lambda cost: cost.decode_ratio,
        lambda cost: cost.decode_over_lora,
    ),
    Speed(
        "first token",
        "first token, ms",
        lambda cost: cost.time_to_first_token_seconds,
        lambda cost: cost.first_token_ratio,
        lambda cost: cost.first_token_over_lora,
        scale=1e-3,
        is_time=True,
    ),
)


def _ratios(comparison: Comparison, column: Make, speed: Speed) -> Iterator[Column]:
    """To the group's base, and to its first LoRA where that takes part, with the rounds' range."""
    contestants = comparison.contestants
    to_base = [_range(c.cost, speed.ratio, 1.0) for c in contestants]
    one = "1" if any(to_base) else ""
    yield column(f"{speed.what} × base", lambda group: one if group.base_cost else "", to_base)
    loras = [lora for group in comparison.measured_together if (lora := comparison.lora_of(group))]
    if not loras:
        return
    cells = [
        "1" if c in loras and c.cost else _range(c.cost, speed.over_lora, 1.0) for c in contestants
    ]
    name = loras[0].label if len(loras) == 1 else loras[0].method
    yield column(
        f"{speed.what} × {name}",
        lambda group: _range(group.base_cost, speed.over_lora, 1.0),
        cells,
    )


def _memory(cost: Cost | None) -> str:
    return "" if cost is None else _number(cost.peak_memory_gib, 1.0)


def _cache(cost: Cost | None) -> str:
    return "" if cost is None else _number(cost.kv_cache_bytes, 1e6, digits=4)


def _range(cost: Cost | None, figure: Callable[[Cost], Measured | None], scale: float) -> str:
    """`5,200 (4,940–5,460)`: the median, and the range where there is one."""
    measured = None if cost is None else figure(cost)
    if measured is None:
        return ""
    median, low, high = (
        _significant(value / scale) for value in (measured.median, measured.low, measured.high)
    )
    return median if low == high else f"{median} ({low}–{high})"


def _parameters_unit(found: Sequence[int]) -> tuple[str, float]:
    return ("M", 1e6) if found and min(found) >= 1e6 else ("k", 1e3)


def _number(value: float | None, unit: float, *, digits: int = 3) -> str:
    return "" if value is None else _significant(value / unit, digits)


def _significant(value: float, digits: int = 3) -> str:
    """To so many significant digits, never fewer than stand before the point: 0.0983, 49.2, 6,013."""
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"

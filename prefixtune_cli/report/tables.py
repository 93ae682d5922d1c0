"""The tables of the report, as text. The first cell of a row is the row's name."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune_cli.compare import wording
from prefixtune_cli.compare.comparison import OOD, TEST, Cell, Comparison, Contestant, Point, Result
from prefixtune_cli.compare.legend import legend
from prefixtune_cli.compare.metrics import EXACT_MATCH, LOSS, OF_LABELLED, OF_PAIRS, Metric
from prefixtune_cli.compare.standing import standings
from prefixtune_cli.compare.table import entries


@dataclass(frozen=True)
class Text:
    """A table's cell.

    Attributes:
        kind: `number` and `best` are aligned to the right, and `best` is bold; `path` is monospaced; `reason` is long.
    """

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Text]]
    notes: Sequence[str] = ()

    @property
    def numbers(self) -> set[int]:
        """The indices of the columns that are aligned to the right."""
        columns = range(len(self.head))
        return {i for i in columns if any(row[i].kind in ("number", "best") for row in self.rows)}


def result(comparison: Comparison) -> Table:
    """The table of the comparison, as in table.md."""
    head, rows = entries(comparison)
    said = {*comparison.notices, f"Command: {comparison.command}"}  # the page has them elsewhere
    return Table(
        "Quality and cost",
        head,
        [
            [Text(name.text), *(Text(e.text or "–", "best" if e.best else "number") for e in row)]
            for name, *row in rows
        ],
        [line for line in legend(comparison, bold=True) if line not in said],
    )


def sweep(comparison: Comparison) -> Table | None:
    """Every learning rate that was tried; None where only one was."""
    rows = [
        [
            Text(contestant.label),
            Text(f"{point.learning_rate:g}", "number"),
            Text(_loss(point.loss), "number"),
            Text(_share(point.exact_match), "number"),
            _state(contestant, point),
            Text(point.run, "path"),
        ]
        for contestant in comparison.contestants
        for point in contestant.sweep
    ]
    if not rows:
        return None
    head = (
        "Contestant",
        "Learning rate",
        f"Loss ({wording.UNITS_OF_LOSS[comparison.learned_from]})",
        "Right answers",
        "Outcome",
        "Run",
    )
    return Table("Every learning rate that was tried, judged on the validation rows", head, rows)


def _state(contestant: Contestant, point: Point) -> Text:
    if point.failure is not None:
        return Text(f"failed: {point.failure}", "reason")
    return Text("chosen" if point.learning_rate == contestant.learning_rate else "not chosen")


def runs(comparison: Comparison) -> Table | None:
    """Every cell with its run directory, or why it failed; None where nothing was trained."""
    every = {name for c in comparison.contestants for cell in c.cells for name in cell.results}
    judged = [name for name in (TEST, OOD) if name in every]
    compared = {(found.data, found.metric) for found in standings(comparison)}
    head = [f"{_title(name)} data" for name in judged]
    rows = [
        [
            Text(contestant.label),
            Text(str(cell.seed), "number"),
            Text("–" if cell.steps is None else f"{cell.steps:,}", "number"),
            *(
                Text(
                    _result(cell.results.get(name), by=[m for d, m in compared if d == name]),
                    "number",
                )
                for name in judged
            ),
            _outcome(cell),
            Text(cell.run, "path"),
        ]
        for contestant in comparison.contestants
        for cell in contestant.cells
    ]
    columns = ("Contestant", "Seed", "Steps", *head, "Outcome", "Run")
    return Table("Every run, with its directory", columns, rows) if rows else None


def _outcome(cell: Cell) -> Text:
    return Text("finished") if cell.failure is None else Text(f"failed: {cell.failure}", "reason")


def _result(found: Result | None, by: Collection[Metric]) -> str:
    """The figures of a run; of preferences, those `by` which the contestants are compared."""
    if found is None:
        return "–"
    if found.kind != "answers":
        metrics = (*OF_PAIRS, *OF_LABELLED)
        figures = [f"{m.name} {m.with_unit(m.value(found))}" for m in metrics if m in by]
        return ", ".join(figures)
    loss = _loss(found.loss)
    return loss if found.exact_match is None else f"{_share(found.exact_match)}, loss {loss}"


def protocol(comparison: Comparison) -> Table:
    """The base model, and the settings that all contestants shared."""
    model = {f"base model {key}": value for key, value in _flat(comparison.model)}
    found = {**model, **dict(_flat(comparison.protocol))}
    rows = [[Text(key.replace("_", " ")), Text(_said(value))] for key, value in found.items()]
    return Table("What was the same for every contestant", ("Setting", "Value"), rows)


def data(comparison: Comparison) -> Table | None:
    """The data sets with their hashes."""
    rows = [
        [
            Text(_title(name)),
            Text(_said(found.get("source")), "path"),
            Text(_said(found.get("rows")), "number"),
            Text(_said(found.get("sha256")), "path"),
        ]
        for name, found in comparison.data.items()
    ]
    return Table("The data sets", ("Data", "Source", "Rows", "SHA-256"), rows) if rows else None


def environment(comparison: Comparison) -> Table | None:
    """Versions and hardware."""
    rows = [[Text(key), Text(_said(value))] for key, value in _flat(comparison.environment)]
    return Table("Versions and hardware", ("What", "Value"), rows) if rows else None


def _flat(found: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings with dotted keys."""
    for key, value in found.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _said(value: Any) -> str:
    if value is None or value == []:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(map(_said, value)) if isinstance(value, list | tuple) else str(value)


def _title(data: str) -> str:
    return "Out-of-distribution" if data == OOD else data.replace("_", " ").capitalize()


def _loss(loss: float | None) -> str:
    return "–" if loss is None else LOSS.figure(loss)


def _share(share: float | None) -> str:
    return "–" if share is None else EXACT_MATCH.with_unit(share)

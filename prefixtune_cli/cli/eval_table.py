"""Prints the output of `ptp eval`: the list of benchmarks, and the table of results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from prefixtune_cli.cli import console

BASE = "base"  # a copy of evaluate.outcome's, so that --list does not import torch

OPTIONAL = ("McNemar p", "items", "metric")  # columns that a narrow terminal may leave out

if TYPE_CHECKING:
    from prefixtune_cli.evaluate.outcome import Line, Outcome
    from prefixtune_cli.evaluate.paired import Interval, PairedDifference
    from prefixtune_cli.evaluate.run import Found


def print_benchmarks(pattern: str, *, show_all: bool, as_json: bool) -> None:
    """Print the benchmarks whose name matches, lm-eval's and ours, without importing torch."""
    from prefixtune_cli.evaluate.catalogue import Catalogue, Listed, load_catalogue

    own = (
        Listed("quickstart", "task", output_type="own data", dataset="the samples of ptp"),
        Listed("forgetting", "task", output_type="text loss", dataset="--text FILE"),
    )
    catalogue = Catalogue({**load_catalogue().entries, **{listed.name: listed for listed in own}})
    found = catalogue.find(pattern)
    if not found:
        catalogue.check([pattern], ())  # raises, and names the nearest
    if as_json:
        keys = ("name", "kind", "output_type", "dataset", "subset")
        console.print_json([{key: getattr(listed, key) for key in keys} for listed in found])
        return
    shown = found if show_all else catalogue.outermost(found, pattern)
    rows = [
        [
            listed.name,
            listed.kind,
            listed.output_type or f"{len(listed.members)} members",
            listed.dataset or "",
        ]
        for listed in shown
    ]
    console.print_table(
        ["name", "kind", "what", "data set"], rows, optional=("kind", "what", "data set")
    )
    if folded := len(found) - len(shown):
        console.notice(f"{folded} more belong to the groups and tags above; --all shows them.")


def print_found(found: Found, *, show_all: bool, markdown: bool, as_json: bool) -> None:
    """Print the results on stdout, and the files written on stderr."""
    if as_json:
        results = [
            {k: v for k, v in outcome.to_json().items() if k not in ("items", "parts")}
            for outcome in found.outcomes
        ]
        written = [str(path) for path in found.written]
        console.print_json({"results": results, "written": written, "failures": found.failures})
        return
    if found.outcomes:
        head, rows = table(found.outcomes, show_all=show_all)
        adapters = [name for name in _models(found.outcomes) if name != BASE]
        if markdown:
            for cells in (head, ["---", "---", *["---:"] * (len(head) - 2)], *rows):
                escaped = (_markdown(cell) for cell in cells)
                print(f"| {' | '.join(escaped)} |")
        elif len(adapters) > 1 and _width(head, rows) > console.stdout().width:
            for name in adapters:
                part = table(found.outcomes, show_all=show_all, only=(BASE, name))
                console.print_table(*part, optional=OPTIONAL)
                console.say("")
        else:
            console.print_table(head, rows, optional=OPTIONAL)
    for outcome in found.outcomes:
        for notice in outcome.notices:
            console.notice(notice)
    folded = sum(line.folded for outcome in found.outcomes for line in outcome.lines)
    if folded and not show_all:
        console.notice(f"{folded} lines of single tasks are folded; --all shows them.")
    for path in found.written:
        console.notice(f"Written: {path}")


def _models(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(name for o in outcomes for line in o.lines for name in line.values))


def _width(head: list[str], rows: list[list[str]]) -> int:
    return sum(max(map(len, column)) + 2 for column in zip(head, *rows, strict=True))


def table(
    outcomes: Sequence[Outcome], *, show_all: bool, only: Sequence[str] | None = None
) -> tuple[list[str], list[list[str]]]:
    """The head and the rows: every model's figure, and each adapter's paired difference from the base.

    Args:
        outcomes: the results of the benchmarks.
        show_all: whether to show folded lines, too.
        only: the models to show; None shows all.
    """
    lines = [line for o in outcomes for line in o.lines if show_all or not line.folded]
    models = [name for name in _models(outcomes) if only is None or name in only]
    adapters = [name for name in models if any(name in line.differences for line in lines)]
    tested = any(d.p_value is not None for line in lines for d in line.differences.values())
    head = ["benchmark", "metric", "items"]
    for name in models:
        head.append(name)
        if name in adapters:
            head += ["difference", "95 % interval", *(["McNemar p"] if tested else [])]
        elif not adapters:
            head.append("95 % interval")
    return head, [_row(line, models, adapters, tested) for line in lines]


def _markdown(cell: str) -> str:
    """A cell for Markdown: keeps its indentation, and escapes its own bars."""
    text = cell.strip().replace("|", r"\|")
    return "&nbsp;" * (len(cell) - len(cell.lstrip())) + text


def _row(line: Line, models: list[str], adapters: list[str], tested: bool) -> list[str]:
    cells = ["  " * line.depth + line.name, line.metric, f"{line.items:,}"]
    for name in models:
        cells.append(_figure(line, line.values[name]) if name in line.values else "")
        if name in adapters:
            cells += _difference(line, line.differences.get(name), tested)
        elif not adapters:
            cells.append(_interval(line, line.intervals.get(name)))
    return cells


def _difference(line: Line, found: PairedDifference | None, tested: bool) -> Iterator[str]:
    if found is None:
        yield from ["", "", ""] if tested else ["", ""]
        return
    yield _figure(line, found.value, signed=True)
    yield f"[{_figure(line, found.low, signed=True)}, {_figure(line, found.high, signed=True)}]"
    if tested:
        p = found.p_value
        yield "" if p is None else "<0.001" if p < 0.001 else f"{p:.3f}"


def _interval(line: Line, found: Interval | None) -> str:
    if found is None:
        return ""
    return f"[{_figure(line, found.low)}, {_figure(line, found.high)}]"


def _figure(line: Line, value: float, *, signed: bool = False) -> str:
    """A figure as text: a fraction in percent, so that differences are percentage points; others in about 5 digits."""
    sign = "+" if signed else ""
    if line.percent:
        return f"{100 * value:{sign}.1f}" + ("" if signed else " %")
    digits = 0 if abs(value) >= 1000 else 2 if abs(value) >= 100 else 4
    return f"{value:{sign},.{digits}f}"

"""How the pictures of a comparison are painted.

A contestant has the same colour, marker and line style in all pictures. Okabe and Ito chose the colours so that the
colour-blind can tell them apart. The marker and the legend tell the contestants apart without any colour.
"""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prefixtune_cli.compare.axes import Axis, spread
from prefixtune_cli.compare.metrics import PARAMETERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")
LINES = ("-", "--", "-.", ":")


@dataclass(frozen=True)
class Style:
    """How a contestant looks."""

    colour: str
    marker: str
    line: str


def styles(labels: Sequence[str]) -> dict[str, Style]:
    """The style of every contestant of the comparison."""
    return {
        label: Style(*(kind[i % len(kind)] for kind in (COLOURS, MARKERS, LINES)))
        for i, label in enumerate(labels)
    }


def paint_quality(figure: Figure, *, axis: Axis, styles: Mapping[str, Style]) -> None:
    """One row for each contestant, with its mean, standard deviation and single seeds."""
    axes = figure.subplots()
    for row, (label, style) in enumerate(styles.items()):
        _paint_row(axes, row, axis, label, style)
    if axis.base is not None:
        axes.axvline(axis.base, color="0.35", linestyle=":", label="base")
        _legend(figure, axes, columns=1)
    axes.set_yticks(range(len(styles)), [_wrapped(label) for label in styles])
    axes.set(ylim=(len(styles) - 0.4, -0.6), xlabel=axis.name)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)


def _paint_row(axes: Axes, row: int, axis: Axis, label: str, style: Style) -> None:
    values = axis.values.get(label)
    if values is None:
        axes.text(
            0.5, row, "no result", transform=axes.get_yaxis_transform(), ha="center", va="center"
        )
        return
    mean = statistics.mean(values)
    axes.errorbar(
        mean, row, xerr=spread(values), capsize=4,
        color=style.colour, marker=style.marker, markersize=8,
    )  # fmt: skip
    if len(values) > 1:
        axes.plot(values, [row + 0.2] * len(values), "o", color="0.4", markersize=3, alpha=0.8)
    axes.annotate(
        axis.said(label), (mean, row), xytext=(0, 6), textcoords="offset points",
        ha="center", va="bottom", fontsize=10,
    )  # fmt: skip


def paint_scatter(
    figure: Figure,
    *,
    x: Axis,
    y: Axis,
    points: Mapping[str, tuple[float, float]],
    best: Sequence[str],
    styles: Mapping[str, Style],
) -> None:
    """The points with their standard deviations, and a line through those of the Pareto front, which are `best`."""
    axes = figure.subplots()
    if x.metric is PARAMETERS:
        _count_in_thousands(axes, [count for each in x.values.values() for count in each])
    for label in points:
        _paint_point(axes, x, y, label, styles[label], on_front=label in best)
    # Between two points of the front, the quality is that of the point that costs no more.
    steps = "steps-pre" if x.metric.up else "steps-post"
    line = [points[label] for label in best]
    axes.plot(*zip(*line, strict=True), color="0.5", drawstyle=steps, zorder=1)
    if x.base is not None:
        axes.axvline(x.base, color="0.35", linestyle=":", zorder=1)
    if y.base is not None:
        axes.axhline(y.base, color="0.35", linestyle=":", zorder=1, label="base")
    axes.plot([], [], color="0.5", marker="o", markerfacecolor="none", markeredgecolor="black",
              markersize=12, label="Pareto front")  # fmt: skip
    axes.set(xlabel=x.name, ylabel=y.name)
    axes.margins(x=0.1, y=0.1)
    axes.grid(alpha=0.3)
    if x.metric is not PARAMETERS:
        axes.locator_params(axis="x", nbins=6)
    _legend(figure, axes)


def _paint_point(axes: Axes, x: Axis, y: Axis, label: str, style: Style, *, on_front: bool) -> None:
    xs, ys = x.values[label], y.values[label]
    at = (statistics.mean(xs), statistics.mean(ys))
    axes.errorbar(*at, spread(ys), spread(xs), fmt="none", ecolor=style.colour, capsize=3)
    axes.plot(*at, style.marker, color=style.colour, markersize=7, label=_wrapped(label), zorder=3)
    if on_front:
        axes.plot(*at, "o", markerfacecolor="none", markeredgecolor="black", markersize=14)


def _count_in_thousands(axes: Axes, counts: Sequence[float]) -> None:
    """A log axis with ticks such as 10 k, 100 k, 1 M; where the counts are near each other, it has more ticks."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    if min(counts) == max(counts):
        axes.set_xlim(min(counts) / 2, 2 * max(counts))
    ratio = max(counts) / min(counts)
    by_decades = LogLocator(subs=(1, 2, 5) if ratio < 30 else (1,))
    axes.xaxis.set_major_locator(MaxNLocator(4) if ratio < 5 else by_decades)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def paint_losses(
    figure: Figure,
    *,
    curves: Mapping[str, Sequence[tuple[int, float, float, float]]],
    styles: Mapping[str, Style],
    unit: str,
) -> None:
    """A line for each contestant through (step, mean, lowest, highest loss), with the range as a shade."""
    axes = figure.subplots()
    for label, curve in curves.items():
        steps, means, lows, highs = zip(*curve, strict=True)
        style, every = styles[label], max(1, len(steps) // 8)
        axes.plot(
            steps, means, style.line, color=style.colour, marker=style.marker,
            markersize=5, markevery=every, label=_wrapped(label),
        )  # fmt: skip
        if lows != highs:
            axes.fill_between(steps, lows, highs, color=style.colour, alpha=0.15, lw=0)
    every_loss = [loss for curve in curves.values() for _, *of in curve for loss in of]
    _scale_losses(axes, every_loss, unit)
    axes.set_xlabel("optimizer step")
    axes.grid(alpha=0.3)
    _legend(figure, axes)


def _scale_losses(axes: Axes, losses: Sequence[float], unit: str) -> None:
    """A log axis where the losses differ much; losses below a thousandth of a nat are cut off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = max(min(losses), 1e-3), max(losses)
    axes.set_ylabel(f"loss ({unit})")
    if high < 3 * low:
        return
    axes.set(yscale="log", ylabel=f"loss ({unit}, log scale)", ylim=(low / 1.1, high * 1.1))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns or _columns(labels),
        fontsize=10, frameon=False,
    )  # fmt: skip


def _columns(labels: Sequence[str]) -> int:
    return 3 if max(len(line) for label in labels for line in label.split("\n")) <= 12 else 2


def legend_height(labels: Sequence[str]) -> float:
    """Inches that the legend takes."""
    wrapped = [_wrapped(label) for label in labels]
    rows = math.ceil(len(wrapped) / _columns(wrapped))
    return 0.22 * rows * max(label.count("\n") + 1 for label in wrapped)


def _wrapped(label: str) -> str:
    """A label in at most three lines of 24 characters."""
    label = f" {label}" if label.startswith("_") else label  # else matplotlib hides it
    lines = textwrap.wrap(label, 24, max_lines=3, placeholder="…")
    return "\n".join(lines)

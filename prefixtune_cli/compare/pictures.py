"""The pictures of a comparison: quality, quality against cost, in- against out-of-distribution, training losses.

A contestant has one colour, marker and line style in all of them. The colours are those of Okabe and Ito, which the
colour-blind can tell apart, and none of them is needed: the marker and the legend say the same. What cannot be
drawn, as a front of one contestant, is left out.
"""

from __future__ import annotations

import math
import os
import statistics
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune_cli.compare.axes import Axis, cost, front, quality, spread
from prefixtune_cli.compare.comparison import OOD, Comparison, Contestant
from prefixtune_cli.compare.metrics import PARAMETERS, TRAINING
from prefixtune_cli.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", "h")
LINES = ("-", "--", "-.", ":")
WIDTH, DPI = 5.6, 200  # inches: the text is readable at 700 px and, just, at the 330 px of a phone
FILES = (
    "quality.png",
    "quality-against-parameters.png",
    "quality-against-speed.png",
    "in-against-out-of-distribution.png",
    "training-loss.png",
)


@dataclass(frozen=True)
class Picture:
    """One picture.

    Attributes:
        file: its name in the comparison's folder.
        title: what it shows.
        text: the same in words and figures, for those who do not see it.
        height: in inches.
        paint: draws it into a figure.
    """

    file: str
    title: str
    text: str
    height: float
    paint: Callable[[Figure], None]

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height."""
        return round(WIDTH * DPI), round(self.height * DPI)


@dataclass(frozen=True)
class Style:
    """How a contestant looks."""

    colour: str
    marker: str
    line: str


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw what can be drawn into PNG files; one of an earlier time that cannot be drawn any more is deleted.

    Args:
        folder: compare/<name>/.

    Returns:
        the files, in the order in which a reader wants them.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = []
    for picture in pictures(comparison):
        with matplotlib.rc_context({"font.size": 11.5, "text.parse_math": False}):
            figure = Figure(
                figsize=(WIDTH, picture.height),
                dpi=DPI,
                layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
            )
            picture.paint(figure)
            _write(figure, folder / picture.file)
        drawn.append(folder / picture.file)
    for old in {folder / file for file in FILES} - set(drawn):
        old.unlink(missing_ok=True)
    return drawn


def _write(figure: Figure, file: Path) -> None:
    write_atomically(file, lambda path: figure.savefig(path))


def pictures(comparison: Comparison) -> list[Picture]:
    """Those that the comparison has the data for; they are not drawn yet."""
    found = [
        _quality(comparison),
        _against(comparison, FILES[1], cost(comparison, PARAMETERS), quality(comparison)),
        _against(comparison, FILES[2], cost(comparison, TRAINING), quality(comparison)),
        _against(comparison, FILES[3], quality(comparison), quality(comparison, OOD)),
        _losses(comparison),
    ]
    return [picture for picture in found if picture is not None]


def _quality(comparison: Comparison) -> Picture | None:
    axis = quality(comparison)
    labels = [contestant.label for contestant in comparison.contestants]
    if not axis.values:
        return None
    seeds = max(len(values) for values in axis.values.values())
    title = "Quality" + (f": mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    said = [
        f"{label} {axis.said(label) if label in axis.values else 'no result'}" for label in labels
    ]
    text = f"Dot plot of the {axis.name}: {'; '.join(said + axis.said_of_base)}."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for row, (contestant, style) in enumerate(_styled(comparison)):
            _paint_row(axes, row, axis, contestant.label, style)
        if axis.base is not None:
            axes.axvline(axis.base, color="0.35", linestyle=":", label="base")
            _legend(figure, axes, columns=1)
        axes.set_yticks(range(len(labels)), [_wrapped(label) for label in labels])
        axes.set(ylim=(len(labels) - 0.4, -0.6), xlabel=axis.name)
        axes.margins(x=0.15)
        axes.grid(axis="x", alpha=0.3)
        figure.suptitle(title, fontsize="large")

    return Picture(FILES[0], title, text, 1.6 + 0.48 * len(labels), paint)


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


def _against(comparison: Comparison, file: str, x: Axis, y: Axis) -> Picture | None:
    """A scatter of two axes with its Pareto front; None with fewer than two points."""
    points = {
        c.label: (statistics.mean(x.values[c.label]), statistics.mean(y.values[c.label]))
        for c in comparison.contestants
        if c.label in x.values and c.label in y.values
    }
    if len(points) < 2:
        return None
    best = front(points, right=x.metric.up, up=y.metric.up)
    title = {
        FILES[1]: "Quality against trainable parameters",
        FILES[2]: "Quality against training speed",
        FILES[3]: "In- against out-of-distribution quality",
    }[file]
    pairs = "; ".join(f"{label} {x.said(label)}, {y.said(label)}" for label in points)
    text = f"Scatter plot, {x.name} and {y.name}: {pairs}. On the Pareto front: {', '.join(best)}."

    on_log_scale = x.metric is PARAMETERS

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        if on_log_scale:
            _count_in_thousands(axes, [count for each in x.values.values() for count in each])
        for contestant, style in _styled(comparison):
            if contestant.label in points:
                _paint_point(axes, x, y, contestant.label, style, on_front=contestant.label in best)
        # Between two points of the front one has the quality of the one that costs no more.
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
        if not on_log_scale:
            axes.locator_params(axis="x", nbins=6)
        figure.suptitle(title, fontsize="large")
        _legend(figure, axes)

    return Picture(
        file, title, text, 4.0 + _legend_height([*points, "base", "Pareto front"]), paint
    )


def _paint_point(axes: Axes, x: Axis, y: Axis, label: str, style: Style, *, on_front: bool) -> None:
    xs, ys = x.values[label], y.values[label]
    at = (statistics.mean(xs), statistics.mean(ys))
    axes.errorbar(*at, spread(ys), spread(xs), fmt="none", ecolor=style.colour, capsize=3)
    axes.plot(*at, style.marker, color=style.colour, markersize=7, label=_wrapped(label), zorder=3)
    if on_front:
        axes.plot(*at, "o", markerfacecolor="none", markeredgecolor="black", markersize=14)


def _count_in_thousands(axes: Axes, counts: Sequence[float]) -> None:
    """A log axis of 10 k, 100 k, 1 M; with 20 k and 50 k as well, or even steps, where the counts are near."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullFormatter

    axes.set_xscale("log")
    if min(counts) == max(counts):
        axes.set_xlim(min(counts) / 2, 2 * max(counts))
    ratio = max(counts) / min(counts)
    by_decades = LogLocator(subs=(1, 2, 5) if ratio < 30 else (1,))
    axes.xaxis.set_major_locator(MaxNLocator(4) if ratio < 5 else by_decades)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _losses(comparison: Comparison) -> Picture | None:
    curves = {c.label: curve for c in comparison.contestants if (curve := _curve(c))}
    if not curves:
        return None
    title = "Training loss, smoothed: mean and range of the seeds"
    ends = "; ".join(f"{label} {curve[-1][1]:.3g}" for label, curve in curves.items())
    text = f"Line plot of the training loss by step. At the end, in nats a token: {ends}."

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        for contestant, style in _styled(comparison):
            if contestant.label in curves:
                steps, means, lows, highs = zip(*curves[contestant.label], strict=True)
                every = max(1, len(steps) // 8)
                axes.plot(
                    steps, means, style.line, color=style.colour, marker=style.marker,
                    markersize=5, markevery=every, label=_wrapped(contestant.label),
                )  # fmt: skip
                if lows != highs:
                    axes.fill_between(steps, lows, highs, color=style.colour, alpha=0.15, lw=0)
        _scale_losses(axes, [loss for curve in curves.values() for _, *of in curve for loss in of])
        axes.set_xlabel("optimizer step")
        axes.grid(alpha=0.3)
        figure.suptitle(title, fontsize="large")
        _legend(figure, axes)

    return Picture(FILES[4], title, text, 4.0 + _legend_height(list(curves)), paint)


def _curve(contestant: Contestant) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest loss) over the seeds that finished, at the steps that all of them logged."""
    runs = [
        _smoothed([(step, loss) for step, loss in cell.losses if math.isfinite(loss)])
        for cell in contestant.cells
        if cell.failure is None and cell.losses
    ]
    steps = set.intersection(*(set(run) for run in runs)) if runs else set()
    at = [(step, [run[step] for run in runs]) for step in sorted(steps)]
    return [(step, statistics.mean(losses), min(losses), max(losses)) for step, losses in at]


def _smoothed(losses: Sequence[tuple[int, float]]) -> dict[int, float]:
    """The mean of the neighbours, a fiftieth of the run to each side."""
    reach = len(losses) // 50
    windows = [losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses))]
    means = [statistics.mean(loss for _, loss in window) for window in windows]
    return {step: mean for (step, _), mean in zip(losses, means, strict=True)}


def _scale_losses(axes: Axes, losses: Sequence[float]) -> None:
    """A log axis where the losses differ much; what is below a thousandth of a nat is cut off."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = max(min(losses), 1e-3), max(losses)
    axes.set_ylabel("loss (nats a token)")
    if high < 3 * low:
        return
    axes.set(yscale="log", ylabel="loss (nats a token, log scale)", ylim=(low / 1.1, high * 1.1))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 300 * low else (1,)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda loss, _: f"{loss:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _styled(comparison: Comparison) -> list[tuple[Contestant, Style]]:
    """Every contestant with its colour, marker and line; the same in all pictures."""
    return [
        (c, Style(*(kind[i % len(kind)] for kind in (COLOURS, MARKERS, LINES))))
        for i, c in enumerate(comparison.contestants)
    ]


def _legend(figure: Figure, axes: Axes, columns: int | None = None) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=columns or _columns(labels),
        fontsize=10, frameon=False,
    )  # fmt: skip


def _columns(labels: Sequence[str]) -> int:
    return 3 if max(len(line) for label in labels for line in label.split("\n")) <= 12 else 2


def _legend_height(labels: Sequence[str]) -> float:
    """Inches that the legend takes."""
    wrapped = [_wrapped(label) for label in labels]
    rows = math.ceil(len(wrapped) / _columns(wrapped))
    return 0.22 * rows * max(label.count("\n") + 1 for label in wrapped)


def _wrapped(label: str) -> str:
    """A label in lines of 24 characters, at most three of them."""
    label = f" {label}" if label.startswith("_") else label  # matplotlib hides those
    lines = textwrap.wrap(label, 24, max_lines=3, placeholder="…")
    return "\n".join(lines)

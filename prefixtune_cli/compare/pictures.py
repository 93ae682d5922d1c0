"""The pictures of a comparison: quality, quality against cost, in- against out-of-distribution, training losses.

Which pictures there are, and what they show in words, is decided here; `plots` paints them. A picture for which there
are no figures, such as the Pareto front of one contestant, is left out.
"""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from prefixtune_cli.compare import plots, wording
from prefixtune_cli.compare.axes import Axis, cost, front, quality
from prefixtune_cli.compare.comparison import OOD, Comparison, Contestant
from prefixtune_cli.compare.metrics import PARAMETERS, TRAINING
from prefixtune_cli.run_dir import write_atomically
from prefixtune_cli.smoothing import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH, DPI = 5.6, 200  # inches: the text is readable at 700 px and, just, at the 330 px of a phone
LOOK = {"font.size": 11.5, "text.parse_math": False}
FILES = (
    "quality.png",
    "quality-against-parameters.png",
    "quality-against-speed.png",
    "in-against-out-of-distribution.png",
    "training-loss.png",
)


@dataclass(frozen=True)
class Picture:
    """A picture that is not drawn yet.

    Attributes:
        file: its name in the comparison's folder.
        title: what it shows.
        text: the same in words and figures, for readers who do not see it.
        height: in inches.
        paint: paints it into a figure.
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


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw the pictures into PNG files of the folder, and delete earlier ones that are no longer drawn."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    drawn = []
    for picture in pictures(comparison):
        with matplotlib.rc_context(LOOK):
            figure = Figure(
                figsize=(WIDTH, picture.height),
                dpi=DPI,
                layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08),
            )
            picture.paint(figure)
            figure.suptitle(picture.title, fontsize="large")
            write_atomically(folder / picture.file, figure.savefig)
        drawn.append(folder / picture.file)
    for old in {folder / file for file in FILES} - set(drawn):
        old.unlink(missing_ok=True)
    return drawn


def pictures(comparison: Comparison) -> list[Picture]:
    """The pictures that the comparison has figures for."""
    of_test, of_ood = quality(comparison), quality(comparison, OOD)
    parameters, speed = cost(comparison, PARAMETERS), cost(comparison, TRAINING)
    in_and_out = "In- against out-of-distribution quality"
    found = [
        _quality(comparison, of_test),
        _scatter(comparison, 1, "Quality against trainable parameters", parameters, of_test),
        _scatter(comparison, 2, "Quality against training speed", speed, of_test),
        _scatter(comparison, 3, in_and_out, of_test, of_ood),
        _losses(comparison),
    ]
    return [picture for picture in found if picture is not None]


def _quality(comparison: Comparison, axis: Axis) -> Picture | None:
    if not axis.values:
        return None
    labels = [contestant.label for contestant in comparison.contestants]
    seeds = max(len(values) for values in axis.values.values())
    title = "Quality" + (f": mean ± standard deviation of {seeds} seeds" if seeds > 1 else "")
    said = [
        f"{label} {axis.said(label) if label in axis.values else 'no result'}" for label in labels
    ]
    text = f"Dot plot of the {axis.name}: {'; '.join(said + axis.said_of_base)}."
    paint = partial(plots.paint_quality, axis=axis, styles=plots.styles(labels))
    return Picture(FILES[0], title, text, 1.6 + 0.48 * len(labels), paint)


def _scatter(comparison: Comparison, file: int, title: str, x: Axis, y: Axis) -> Picture | None:
    """A scatter of two axes with its Pareto front; None with fewer than two points."""
    labels = [contestant.label for contestant in comparison.contestants]
    points = {
        label: (statistics.mean(x.values[label]), statistics.mean(y.values[label]))
        for label in labels
        if label in x.values and label in y.values
    }
    if len(points) < 2:
        return None
    best = front(points, right=x.metric.up, up=y.metric.up)
    pairs = "; ".join(f"{label} {x.said(label)}, {y.said(label)}" for label in points)
    text = f"Scatter plot, {x.name} and {y.name}: {pairs}. On the Pareto front: {', '.join(best)}."
    styles = plots.styles(labels)
    paint = partial(plots.paint_scatter, x=x, y=y, points=points, best=best, styles=styles)
    height = 4.0 + plots.legend_height([*points, "base", "Pareto front"])
    return Picture(FILES[file], title, text, height, paint)


def _losses(comparison: Comparison) -> Picture | None:
    curves = {c.label: curve for c in comparison.contestants if (curve := _curve(c))}
    if not curves:
        return None
    ends = "; ".join(f"{label} {curve[-1][1]:.3g}" for label, curve in curves.items())
    unit = wording.UNITS_OF_LOSS[comparison.learned_from]
    text = f"Line plot of the training loss by step. At the end ({unit}): {ends}."
    title = "Training loss, smoothed: mean and range of the seeds"
    styles = plots.styles([contestant.label for contestant in comparison.contestants])
    paint = partial(plots.paint_losses, curves=curves, styles=styles, unit=unit)
    return Picture(FILES[4], title, text, 4.0 + plots.legend_height(list(curves)), paint)


def _curve(contestant: Contestant) -> list[tuple[int, float, float, float]]:
    """(step, mean, lowest, highest loss) over the seeds that finished, at the steps that all of them logged."""
    runs = []
    for cell in contestant.cells:
        if cell.failure is None and cell.losses:
            logged = [(step, loss) for step, loss in cell.losses if math.isfinite(loss)]
            losses = smoothed([loss for _, loss in logged], len(logged) // 50)
            runs.append(dict(zip((step for step, _ in logged), losses, strict=True)))
    steps = set.intersection(*(set(run) for run in runs)) if runs else set()
    at = [(step, [run[step] for run in runs]) for step in sorted(steps)]
    return [(step, statistics.mean(losses), min(losses), max(losses)) for step, losses in at]

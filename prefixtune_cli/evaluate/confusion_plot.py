"""confusion.png: which label was answered for which, one panel a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

OTHER = "other"
MOST_COUNTED = 12  # with more labels, cells are too small for numbers
LABEL_CHARACTERS = 40
COLOURS = "Blues"  # lightness alone tells the shares apart, also for those who see fewer colours
POINT = 1 / 72  # inches
CHARACTER_WIDTH = 0.6  # of the font's size


def draw_confusion(
    path: Path, labels: Sequence[str], counts: Mapping[str, NDArray[np.int64]]
) -> None:
    """Draw confusion matrices side by side; a cell's colour is its share of the reference's rows.

    Args:
        path: the file to write; its suffix says the type.
        labels: in the order of the rows.
        counts: model → [labels, labels + 1], by reference and answered label; the last column counts other answers.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure

    cell = min(max(0.17, 7 / (len(labels) + 1)), 0.75)  # inches
    height, width = cell * len(labels), cell * (len(labels) + 1)
    panel_width = max(width, 2.5)
    title = 12 if width < 8 else 16  # points
    figure = Figure(figsize=(panel_width * len(counts), height), dpi=110)
    norm = PowerNorm(0.5, vmin=0, vmax=1)  # so that a few mistakes among many rows are seen
    for i, (model, matrix) in enumerate(counts.items()):
        left = i * (panel_width + 0.35)
        axes = figure.add_axes(_share(figure, left, 0, width, height))
        image = _panel(axes, labels, matrix, norm, cell)
        hits = 100 * matrix.trace() / max(1, matrix.sum())
        characters = int(panel_width / (title * CHARACTER_WIDTH * POINT))
        axes.set_title(f"{_end_of(model, characters)}\naccuracy {hits:.1f} %", fontsize=title)
        axes.set_xlabel("answer")
        if i == 0:
            axes.set_ylabel("reference")
        else:
            axes.tick_params(labelleft=False)
    bar_height = min(height, 5.0)
    bar = figure.colorbar(
        image,
        cax=figure.add_axes(
            _share(figure, left + width + 0.25, (height - bar_height) / 2, 0.18, bar_height)
        ),
    )
    bar.set_label("share of the row")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)  # grows to hold the labels


def _share(
    figure: Figure, left: float, bottom: float, width: float, height: float
) -> tuple[float, float, float, float]:
    """Inches as matplotlib wants them: in shares of the figure."""
    whole_width, whole_height = figure.get_size_inches()
    return left / whole_width, bottom / whole_height, width / whole_width, height / whole_height


def _panel(
    axes: Axes, labels: Sequence[str], matrix: NDArray[np.int64], norm: Normalize, cell: float
) -> Any:
    shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
    image = axes.imshow(shares, cmap=COLOURS, norm=norm, aspect="auto")
    font = min(10.0, 0.72 * cell / POINT)
    short = [_start_of(label) for label in labels]
    longest = max(map(len, [*short, OTHER])) * CHARACTER_WIDTH * font * POINT
    rotation = 0 if longest < cell else 90
    axes.set_xticks(range(len(labels) + 1), [*short, OTHER], rotation=rotation, fontsize=font)
    axes.set_yticks(range(len(labels)), short, fontsize=font)
    axes.get_xticklabels()[-1].set_fontstyle("italic")
    axes.set_xticks(np.arange(len(labels)) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(labels) - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    axes.axvline(len(labels) - 0.5, color="black", linewidth=1)
    if len(labels) <= MOST_COUNTED:
        for (row, column), count in np.ndenumerate(matrix):
            colour = "white" if norm(shares[row, column]) > 0.6 else "black"
            axes.text(column, row, str(count), ha="center", va="center", color=colour)
    return image


def _start_of(label: str) -> str:
    short = label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 1] + "…"
    return _plain(" ".join(short.split()))


def _end_of(model: str, characters: int) -> str:
    return _plain(model if len(model) <= characters else "…" + model[1 - characters :])


def _plain(text: str) -> str:
    """The text as it is: matplotlib would set what stands between two dollar signs as mathematics."""
    return text.replace("$", r"\$")

"""confusion.png: each model's answered labels against the reference labels, one panel a model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

OTHER = "other"
MOST_COUNTED = 12  # with more labels, cells are too small for numbers
LABEL_CHARACTERS = 40
COLOURS = "Blues"  # shares differ by lightness only, which colour-blind readers see too


def draw_confusion(
    path: Path, labels: Sequence[str], counts: Mapping[str, NDArray[np.int64]]
) -> None:
    """Draw confusion matrices side by side; a cell's colour is its share of its row.

    Args:
        path: the file to write; its suffix sets the type.
        labels: in the order of the rows.
        counts: model → [labels, labels + 1], by reference and answered label; the last column counts other answers.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure
    from sklearn.metrics import ConfusionMatrixDisplay

    names = [_start_of(label) for label in [*labels, OTHER]]
    cell = min(max(0.17, 7 / len(names)), 0.75)  # inches
    panel = max(cell * len(names), 2.5)
    width = panel * len(counts)
    figure = Figure(figsize=(width, cell * len(labels)), dpi=110)
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1, wspace=0.08)
    panels = figure.subplots(1, len(counts), squeeze=False)[0]
    for axes, (model, matrix) in zip(panels, counts.items(), strict=True):
        shares = matrix / np.maximum(1, matrix.sum(axis=1, keepdims=True))
        display = ConfusionMatrixDisplay(
            np.pad(shares, ((0, 1), (0, 0))),  # to a square; ylim hides the last row
            display_labels=names,
        ).plot(
            ax=axes,
            include_values=len(labels) <= MOST_COUNTED,
            cmap=COLOURS,
            colorbar=False,
            xticks_rotation="vertical",
            im_kw={"norm": PowerNorm(0.5, vmin=0, vmax=1)},  # makes a few mistakes visible
            text_kw={"clip_on": True},
        )
        if display.text_ is not None:
            for place, count in np.ndenumerate(matrix):
                on_dark = shares[place] ** 0.5 > 0.6  # PowerNorm colours by the root
                display.text_[place].set(text=str(count), color="white" if on_dark else "black")
        hits = 100 * matrix.trace() / max(1, matrix.sum())
        axes.set(
            title=f"{_end_of(model, int(9 * panel))}\naccuracy {hits:.1f} %",
            xlabel="answer",
            ylabel="reference",
            ylim=(len(labels) - 0.5, -0.5),
        )
        axes.tick_params(labelsize=min(10, 52 * cell))
        axes.label_outer()
        axes.axvline(len(labels) - 0.5, color="black", linewidth=1)
    bar = figure.add_axes((1 + 0.25 / width, 0, 0.18 / width, 1))
    figure.colorbar(display.im_, cax=bar, label="share of the row")
    figure.savefig(path, bbox_inches="tight", pad_inches=0.2)  # grows to hold the labels


def _start_of(label: str) -> str:
    short = label if len(label) <= LABEL_CHARACTERS else label[: LABEL_CHARACTERS - 1] + "…"
    return _plain(" ".join(short.split()))


def _end_of(model: str, characters: int) -> str:
    return _plain(model if len(model) <= characters else "…" + model[1 - characters :])


def _plain(text: str) -> str:
    """The text with its dollar signs escaped: matplotlib sets text between two of them as mathematics."""
    return text.replace("$", r"\$")

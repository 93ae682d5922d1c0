"""heat-map.png: how large what an adapter has learned is, and of how many directions, by layer and head."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.merge_info.facts import Facts
from prefixtune_cli.merge_info.learned import Cell, Learned
from prefixtune_cli.merge_info.saved import PREFIX_TUNING_PLUS
from prefixtune_cli.run_dir import write_atomically

_FEW = 16  # labels on an axis that are all written
_MOST_NUMBERED = 10  # with more columns, cells are too small for numbers
_COLOURS = "Blues"  # lightness alone tells the values apart, also for those who see fewer colours


def draw_heat_map(path: Path, facts: Facts) -> None:
    """Draw layers against heads (of LoRA: against modules): the norm on the left, the effective rank on the right.

    Args:
        path: the file to write.
        facts: of an adapter that has trained matrices.
    """
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    found = facts.learned
    assert found is not None
    by_head = facts.adapter.method == PREFIX_TUNING_PLUS
    panels = _panels(found, by_head=by_head)
    rows = max(len(panel[2]) for panel in panels)
    columns = max(len(panel[3]) for panel in panels)
    width = min(max(3.6, 1.6 + (0.45 if by_head else 0.8) * columns), 9)
    height = min(max(2.6, 1.5 + 0.3 * rows), 9)
    figure = Figure(figsize=(2 * width, height * len(panels)), dpi=110, layout="constrained")
    grid = figure.subplots(len(panels), 2, squeeze=False)
    for (site, cells, layers, names), both in zip(panels, grid, strict=True):
        for axes, name in zip(both, ("norm", "effective_rank"), strict=True):
            image = _draw(axes, _matrix(cells, layers, names, name, by_head=by_head), layers, names)
            title = {"norm": "Frobenius norm", "effective_rank": "effective rank"}[name]
            axes.set_title(f"{site}: {title}" if site else title, fontsize=11)
            axes.set_xlabel(("block" if site == "ffn" else "head") if by_head else "")
            axes.set_ylabel("layer")
            figure.colorbar(image, ax=axes)
    of = "M" if by_head else "B·A·scale"
    figure.suptitle(f"{facts.adapter.name}: {of}".replace("$", r"\$"), fontsize=12)
    write_atomically(path, lambda part: figure.savefig(part))


def _panels(
    found: Learned, *, by_head: bool
) -> list[tuple[str, list[Cell], list[int | None], list[str]]]:
    """One a site, or one of all modules: title, cells, layers, columns."""
    panels = []
    for site in found.columns if by_head else [""]:
        cells = [cell for cell in found.cells if not by_head or cell.column == site]
        layers = list(dict.fromkeys(cell.layer for cell in cells))
        names = [str(cell.head) if by_head else cell.column for cell in cells]
        panels.append((site, cells, layers, list(dict.fromkeys(names))))
    return panels


def _matrix(
    cells: list[Cell], layers: list[int | None], names: list[str], value: str, *, by_head: bool
) -> NDArray[np.float64]:
    """[layers, columns]; NaN where there is nothing."""
    matrix = np.full((len(layers), len(names)), np.nan)
    row = {layer: i for i, layer in enumerate(layers)}
    column = {name: i for i, name in enumerate(names)}
    for cell in cells:
        name = str(cell.head) if by_head else cell.column
        matrix[row[cell.layer], column[name]] = getattr(cell, value)
    return matrix


def _draw(
    axes: Any, matrix: NDArray[np.float64], layers: list[int | None], names: list[str]
) -> Any:
    highest = float(np.nanmax(matrix)) if np.isfinite(matrix).any() else 1.0
    image = axes.imshow(matrix, cmap=_COLOURS, vmin=0, vmax=highest or 1.0, aspect="auto")
    axes.set_facecolor("0.85")  # shows through where there is no value
    axes.set_yticks(*_ticks(["other" if layer is None else str(layer) for layer in layers]))
    turned = max(map(len, names)) > 2
    axes.set_xticks(
        *_ticks(names), rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    if len(names) <= _MOST_NUMBERED:
        for (i, j), value in np.ndenumerate(matrix):
            if np.isfinite(value):
                colour = "white" if value > 0.6 * highest else "black"
                axes.text(j, i, f"{value:.3g}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _ticks(labels: list[str]) -> tuple[list[int], list[str]]:
    """Every label where there are few or they are names, else every so many."""
    numbers = all(label.isdigit() for label in labels)
    step = -(-len(labels) // _FEW) if numbers else 1
    shown = list(range(0, len(labels), step))
    return shown, [labels[i] for i in shown]

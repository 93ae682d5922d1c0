"""The pictures of `ptp merge-info`: heat-map.png, bias-spectrum.png and bias-by-position.png."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from prefixtune_cli.merge_info.bias import Biases, Sums, bucket_range, buckets
from prefixtune_cli.merge_info.saved_adapter import PREFIX_TUNING_PLUS
from prefixtune_cli.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from prefixtune_cli.merge_info.matrices import Cell
    from prefixtune_cli.merge_info.one_adapter import Facts

_FEW = 16  # labels at most that are all written on an axis of numbers
_MOST_NUMBERED = 10  # columns at most; with more, cells are too small for numbers
_COLOURS = "Blues"  # a scale of lightness, which colour-blind readers see as well
_LOWEST = 1e-8  # smaller shares are rounding errors
_MOST_NAMED = 12  # layers in the legend; with more, layers at equal steps are named
_STYLES = {"attention": "-", "ffn": "--"}

Grid = Mapping[tuple[int | None, str], "Cell"]  # by layer, and by head (LoRA: by module)


def draw_heat_map(path: Path, facts: Facts) -> None:
    """Draw norms on the left and effective ranks on the right, by layer and by head (LoRA: by module).

    Args:
        path: the file to write.
        facts: those of an adapter that has trained matrices.
    """
    found = facts.learned
    assert found is not None
    by_head = facts.adapter.method == PREFIX_TUNING_PLUS
    grids: dict[str, Grid] = {
        site: {
            (cell.layer, str(cell.head) if by_head else cell.column): cell
            for cell in found.cells
            if not by_head or cell.column == site
        }
        for site in (found.columns if by_head else [""])
    }
    rows, columns = (max(len(_labels(grid)[i]) for grid in grids.values()) for i in (0, 1))
    width = min(max(3.6, 1.6 + (0.45 if by_head else 0.8) * columns), 9)
    height = min(max(2.6, 1.5 + 0.3 * rows), 9)
    figure = _figure(2 * width, height * len(grids), dpi=110)
    panels = figure.subplots(len(grids), 2, squeeze=False)
    titles = {"norm": "Frobenius norm", "effective_rank": "effective rank"}
    for (site, grid), both in zip(grids.items(), panels, strict=True):
        for axes, (value, title) in zip(both, titles.items(), strict=True):
            image = _draw_grid(axes, grid, value)
            axes.set_title(f"{site}: {title}" if site else title, fontsize=11)
            axes.set_xlabel(("block" if site == "ffn" else "head") if by_head else "")
            axes.set_ylabel("layer")
            figure.colorbar(image, ax=axes)
    of = "M" if by_head else "B·A·scale"
    figure.suptitle(_plain(f"{facts.adapter.name}: {of}"), fontsize=12)
    write_atomically(path, lambda part: figure.savefig(part))


def draw_spectra(path: Path, adapters: Sequence[Biases]) -> None:
    """Draw the eigenvalues of the bias's covariance: one panel for each adapter, one line for each layer."""
    figure, panels = _panels(adapters)
    for axes, lines in panels:
        for sums, look in lines:
            seen = [share for share in sums.eigenvalues() if share > _LOWEST]
            axes.plot(range(1, len(seen) + 1), seen, marker=".", markersize=4, **look)
        axes.set(yscale="log", xlabel="eigenvalue", ylim=(_LOWEST, 1.5))
    panels[0][0].set_ylabel("share of the variance")
    _save(figure, path, adapters, "Spectrum of the covariance of the bias, by layer")


def draw_by_position(path: Path, adapters: Sequence[Biases]) -> None:
    """Draw the size of the bias, relative to the output that it is added to, by position in the sequence."""
    figure, panels = _panels(adapters)
    numbers = buckets(adapters)
    for axes, lines in panels:
        for sums, look in lines:
            ratios = {number: sums.ratio(number) for number in numbers if number in sums.squares}
            drawn = {number: ratio for number, ratio in ratios.items() if 0 < ratio < math.inf}
            axes.plot(list(drawn), list(drawn.values()), marker="o", markersize=5, **look)
        axes.set(yscale="log", xlabel="position in the sequence")
        labels = [f"{start}–{end}" for start, end in map(bucket_range, numbers)]
        axes.set_xticks(numbers, labels)
        axes.set_xlim(numbers[0] - 0.3, numbers[-1] + 0.3)
    panels[0][0].set_ylabel("norm of the bias / norm of the output")
    _save(figure, path, adapters, "Size of the bias, by layer and position")


def _figure(width: float, height: float, *, dpi: int) -> Figure:
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=dpi, layout="constrained")


def _labels(grid: Grid) -> tuple[list[int | None], list[str]]:
    """The layers and the columns of a grid, in its order."""
    return list(dict.fromkeys(key[0] for key in grid)), list(dict.fromkeys(key[1] for key in grid))


def _draw_grid(axes: Any, grid: Grid, value: str) -> Any:
    """Draw one value of each cell, `norm` or `effective_rank`, by layer and column."""
    layers, names = _labels(grid)
    matrix = np.full((len(layers), len(names)), np.nan)
    for (layer, name), cell in grid.items():
        matrix[layers.index(layer), names.index(name)] = getattr(cell, value)
    highest = float(np.nanmax(matrix)) if np.isfinite(matrix).any() else 1.0
    image = axes.imshow(matrix, cmap=_COLOURS, vmin=0, vmax=highest or 1.0, aspect="auto")
    axes.set_facecolor("0.85")  # the colour where there is no value
    axes.set_yticks(*_ticks(["other" if layer is None else str(layer) for layer in layers]))
    turned = max(map(len, names)) > 2
    axes.set_xticks(
        *_ticks(names), rotation=45 if turned else 0, ha="right" if turned else "center"
    )
    if len(names) <= _MOST_NUMBERED:
        for (i, j), number in np.ndenumerate(matrix):
            if np.isfinite(number):
                colour = "white" if number > 0.6 * highest else "black"
                axes.text(j, i, f"{number:.3g}", ha="center", va="center", color=colour, fontsize=8)
    return image


def _ticks(labels: list[str]) -> tuple[list[int], list[str]]:
    """The positions and texts of the labels that are written: all names, and at most _FEW numbers."""
    numbers = all(label.isdigit() for label in labels)
    step = -(-len(labels) // _FEW) if numbers else 1
    shown = list(range(0, len(labels), step))
    return shown, [labels[i] for i in shown]


def _panels(
    adapters: Sequence[Biases],
) -> tuple[Figure, list[tuple[Axes, list[tuple[Sums, dict[str, Any]]]]]]:
    """A panel for each adapter, with its layers and the style of each one's line."""
    figure = _figure(2 + 4.2 * len(adapters), 4.2, dpi=120)
    panels = []
    colours = _colours(adapters)
    row = figure.subplots(1, len(adapters), sharey=True, squeeze=False)[0]
    for axes, biases in zip(row, adapters, strict=True):
        name = biases.name if len(biases.name) <= 40 else "…" + biases.name[-39:]
        axes.set_title(_plain(name), fontsize=10)
        axes.grid(alpha=0.3)
        lines = [
            (sums, {"color": colours[sums.layer], "linestyle": _STYLES[sums.site]})
            for sums in biases.layers
        ]
        panels.append((axes, lines))
    return figure, panels


def _colours(adapters: Sequence[Biases]) -> dict[int, Any]:
    """The colour of each layer, from dark for the first to bright for the last; it is the same in all panels."""
    from matplotlib import colormaps

    numbers = sorted({sums.layer for biases in adapters for sums in biases.layers})
    return {n: colormaps["viridis"](0.9 * n / max(1, numbers[-1])) for n in numbers}


def _save(figure: Figure, path: Path, adapters: Sequence[Biases], title: str) -> None:
    """Add the title and a legend of layers and sites, and write the figure."""
    from matplotlib.lines import Line2D

    colours = _colours(adapters)
    step = -(-len(colours) // _MOST_NAMED)
    shown = [n for i, n in enumerate(colours) if i % step == 0 or i == len(colours) - 1]
    names = [Line2D([], [], color=colours[n], label=f"layer {n}") for n in shown]
    if len({sums.site for biases in adapters for sums in biases.layers}) > 1:
        names += [
            Line2D([], [], color="0.4", linestyle=style, label=site)
            for site, style in _STYLES.items()
        ]
    figure.legend(handles=names, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    write_atomically(path, lambda part: figure.savefig(part))


def _plain(text: str) -> str:
    """Escape dollar signs, as matplotlib would set the text between two of them as mathematics."""
    return text.replace("$", r"\$")

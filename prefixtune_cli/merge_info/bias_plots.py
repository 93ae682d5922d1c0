"""bias-spectrum.png and bias-by-position.png: one panel an adapter, one line a layer.

A layer has one colour everywhere, from dark for the first to bright for the last; FFNs are dashed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prefixtune_cli.run_dir import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LOWEST = 1e-8  # shares below are rounding
MOST_NAMED = 12  # layers in the legend; of more, every so many

Place = tuple[int, str]  # layer and site
Of = TypeVar("Of")


def draw_spectra(path: Path, spectra: Mapping[str, Mapping[Place, Sequence[float]]]) -> None:
    """Draw how the eigenvalues of the bias's covariance fall.

    Args:
        path: the file to write.
        spectra: adapter → layer and site → eigenvalues, descending, as shares of their sum.
    """
    figure, panels = _panels(spectra)
    for axes, lines in panels:
        for look, shares in lines:
            seen = [share for share in shares if share > LOWEST]
            axes.plot(range(1, len(seen) + 1), seen, marker=".", markersize=4, **look)
        axes.set(yscale="log", xlabel="eigenvalue", ylim=(LOWEST, 1.5))
    panels[0][0].set_ylabel("share of the variance")
    _save(figure, path, spectra, "Spectrum of the covariance of the bias, by layer")


def draw_by_position(
    path: Path,
    sizes: Mapping[str, Mapping[Place, Mapping[int, float]]],
    ranges: Mapping[int, tuple[int, int]],
) -> None:
    """Draw how large the bias is against the output that it is added to, by position in the sequence.

    Args:
        path: the file to write.
        sizes: adapter → layer and site → bucket → ratio.
        ranges: bucket → its first and last position.
    """
    figure, panels = _panels(sizes)
    numbers = sorted(ranges)
    for axes, lines in panels:
        for look, by_bucket in lines:
            drawn = [n for n in numbers if 0 < by_bucket.get(n, 0) < math.inf]
            axes.plot(drawn, [by_bucket[n] for n in drawn], marker="o", markersize=5, **look)
        axes.set(yscale="log", xlabel="position in the sequence")
        labels = [f"{start}–{end}" for start, end in (ranges[n] for n in numbers)]
        axes.set_xticks(numbers, labels)
        axes.set_xlim(numbers[0] - 0.3, numbers[-1] + 0.3)
    panels[0][0].set_ylabel("norm of the bias / norm of the output")
    _save(figure, path, sizes, "Size of the bias, by layer and position")


def _panels(
    adapters: Mapping[str, Mapping[Place, Of]],
) -> tuple[Figure, list[tuple[Axes, Iterator[tuple[dict[str, Any], Of]]]]]:
    """A panel for each adapter, with its lines: how each looks, and what it shows."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 4.2 * len(adapters), 4.2), dpi=120, layout="constrained")
    panels = []
    colours = _colours(adapters)
    row = figure.subplots(1, len(adapters), sharey=True, squeeze=False)[0]
    for axes, (name, layers) in zip(row, adapters.items(), strict=True):
        axes.set_title(_plain(name if len(name) <= 40 else "…" + name[-39:]), fontsize=10)
        axes.grid(alpha=0.3)
        panels.append((axes, _lines(layers, colours)))
    return figure, panels


def _lines(
    layers: Mapping[Place, Of], colours: Mapping[int, Any]
) -> Iterator[tuple[dict[str, Any], Of]]:
    for (layer, site), content in layers.items():
        yield {"color": colours[layer], "linestyle": "-" if site == "attention" else "--"}, content


def _colours(adapters: Mapping[str, Mapping[Place, Of]]) -> dict[int, Any]:
    from matplotlib import colormaps

    numbers = sorted({layer for layers in adapters.values() for layer, _ in layers})
    return {n: colormaps["viridis"](0.9 * n / max(1, numbers[-1])) for n in numbers}


def _save(
    figure: Figure, path: Path, adapters: Mapping[str, Mapping[Place, Of]], title: str
) -> None:
    from matplotlib.lines import Line2D

    colours = _colours(adapters)
    step = -(-len(colours) // MOST_NAMED)
    shown = [n for i, n in enumerate(colours) if i % step == 0 or i == len(colours) - 1]
    names = [Line2D([], [], color=colours[n], label=f"layer {n}") for n in shown]
    sites = {site for layers in adapters.values() for _, site in layers}
    if len(sites) > 1:
        names += [
            Line2D([], [], color="0.4", linestyle=style, label=site)
            for site, style in (("attention", "-"), ("ffn", "--"))
        ]
    figure.legend(handles=names, loc="outside right upper", fontsize=8)
    figure.suptitle(title)
    write_atomically(path, lambda part: figure.savefig(part))


def _plain(text: str) -> str:
    """The text as it is: matplotlib would set what stands between two dollar signs as mathematics."""
    return text.replace("$", r"\$")

"""What an adapter has learned: how large its trained matrices are, and of how many directions.

The effective rank is Roy and Vetterli's ("The effective rank: a measure of effective dimensionality", EUSIPCO 2007):
the exponential of the entropy of the singular values, divided by their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from prefixtune_cli.merge_info.trained import Trained

HELD = 0.9  # of the squared norm, by the layers that are named
SPARE = 0.01  # of the squared norm, at most, by all heads together that could be dropped


@dataclass(frozen=True)
class Cell:
    """One trained matrix of one head.

    Attributes:
        layer: None is outside of the decoder layers.
        column: `attention` or `ffn`, or a module's name.
        head: the head, or the FFN's block; 0 for LoRA.
        norm: Frobenius; NaN where the matrix is not finite, as are the following.
        effective_rank: 0 of a matrix of zeros.
        spectrum: the singular values, the largest first.
    """

    layer: int | None
    column: str
    head: int
    norm: float
    effective_rank: float
    spectrum: tuple[float, ...]


@dataclass(frozen=True)
class Learned:
    """All cells, and what they say together.

    Attributes:
        by_layer: each layer's share of the squared norm of all.
        main_layers: the fewest layers that hold 90 % of it.
        spare: the cells that hold less than 1 % of it, all together: the smallest of them all.
    """

    cells: tuple[Cell, ...]
    by_layer: dict[int | None, float]
    main_layers: tuple[int | None, ...]
    spare: tuple[Cell, ...]

    @property
    def columns(self) -> list[str]:
        """The sites or modules, each once, in the order of the model."""
        return list(dict.fromkeys(cell.column for cell in self.cells))


def learned(matrices: Mapping[str, Trained]) -> Learned | None:
    """Measure every trained matrix; None where there is none."""
    if not matrices:
        return None
    cells = tuple(cell for matrix in matrices.values() for cell in _cells(matrix))
    squares = [cell.norm**2 if isfinite(cell.norm) else 0.0 for cell in cells]
    whole = sum(squares)
    by_layer: dict[int | None, float] = {}
    for cell, square in zip(cells, squares, strict=True):
        by_layer[cell.layer] = by_layer.get(cell.layer, 0.0) + (square / whole if whole else 0.0)
    return Learned(cells, by_layer, _main(by_layer), _spare(cells, squares, whole))


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of σ/Σσ.

    Args:
        singular_values: [..., rank], none below zero.

    Returns:
        [...], from 1 (one direction) to rank (all equal); 0 where all are zero.
    """
    total = singular_values.sum(-1, keepdim=True)
    shares = singular_values / total.clamp_min(torch.finfo(singular_values.dtype).tiny)
    ranks = torch.special.entr(shares).sum(-1).exp()
    return torch.where(total[..., 0] > 0, ranks, torch.zeros_like(ranks))


def _cells(matrix: Trained) -> list[Cell]:
    nan = float("nan")
    if not matrix.finite:
        return [
            Cell(matrix.layer, matrix.column, head, nan, nan, ()) for head in range(matrix.shape[0])
        ]
    values = matrix.singular_values()
    norms, ranks = values.norm(dim=-1), effective_rank(values)
    rows = zip(norms.tolist(), ranks.tolist(), values.tolist(), strict=True)
    return [
        Cell(matrix.layer, matrix.column, head, norm, rank, tuple(spectrum))
        for head, (norm, rank, spectrum) in enumerate(rows)
    ]


def _main(by_layer: Mapping[int | None, float]) -> tuple[int | None, ...]:
    held, chosen = 0.0, set()
    for layer, share in sorted(by_layer.items(), key=lambda item: -item[1]):
        if held >= HELD - 1e-9 or share == 0:
            break
        held += share
        chosen.add(layer)
    return tuple(layer for layer in by_layer if layer in chosen)


def _spare(cells: Sequence[Cell], squares: Sequence[float], whole: float) -> tuple[Cell, ...]:
    held, spare = 0.0, set()
    for i in sorted(range(len(cells)), key=squares.__getitem__):
        held += squares[i]
        if held >= SPARE * whole:
            break
        if isfinite(cells[i].norm):
            spare.add(i)
    return tuple(cells[i] for i in sorted(spare))

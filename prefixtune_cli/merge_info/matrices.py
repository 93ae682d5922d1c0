"""The trained matrices of an adapter, and their statistics: norms, spectra and effective ranks.

Prefix-Tuning+ trains one M for each head, LoRA one ΔW for each module.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from prefixtune_cli.merge_info.saved_adapter import LORA, PREFIX_TUNING_PLUS, SavedAdapter

ATTENTION, FFN = "attention", "ffn"
HELD = 0.9  # the share of the squared norm that the main layers hold
SPARE = 0.01  # the share of the squared norm that all spare heads together hold at most
_MEMORY = re.compile(
    r"(?P<place>.+)\.prefix_tuning_plus_memory\.(?P<part>M|M_down|M_up|W_phi|b_phi)"
)
_LORA = re.compile(r"(?P<place>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class TrainedMatrix:
    """The trained matrices of all heads of one module: left, or the product left·right where they have low rank.

    Attributes:
        layer: the decoder layer; None where the module is outside of them.
        column: `attention` or `ffn` for Prefix-Tuning+, the module's name for LoRA.
        left: [heads, rows, columns], or [heads, rows, rank]. For LoRA it has one head, and includes the scale.
        right: [heads, rank, columns]; None where left is the whole matrix.
    """

    layer: int | None
    column: str
    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[heads, rows, columns] of the whole matrices."""
        heads, rows, columns = self.left.shape
        return heads, rows, columns if self.right is None else self.right.shape[2]

    @property
    def finite(self) -> bool:
        parts = (self.left,) if self.right is None else (self.left, self.right)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def singular_values(self) -> Tensor:
        """[heads, rank] in float64, the largest first. A product is not multiplied out."""
        left = self.left.double()
        if self.right is None:
            values: Tensor = torch.linalg.svdvals(left)
            return values
        _, r_left = torch.linalg.qr(left, mode="r")
        _, r_right = torch.linalg.qr(self.right.double().mT, mode="r")
        values = torch.linalg.svdvals(r_left @ r_right.mT)
        return values


@dataclass(frozen=True)
class Cell:
    """One trained matrix of one head.

    Attributes:
        layer, column: see `TrainedMatrix`.
        head: the head, or the FFN's block; 0 for LoRA.
        norm: the Frobenius norm; NaN where the matrix is not finite.
        effective_rank: of the singular values; 0 for a matrix of zeros, NaN where the matrix is not finite.
        spectrum: the singular values, the largest first; empty where the matrix is not finite.
    """

    layer: int | None
    column: str
    head: int
    norm: float
    effective_rank: float
    spectrum: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """The cell without its spectrum."""
        return {
            "layer": self.layer,
            "column": self.column,
            "head": self.head,
            "norm": _short(self.norm),
            "effective_rank": _short(self.effective_rank),
        }


@dataclass(frozen=True)
class Statistics:
    """The cells of an adapter, and what they say together.

    Attributes:
        by_layer: each layer's share of the squared norm of all cells.
        main_layers: the fewest layers that hold HELD of the squared norm.
        spare: the smallest cells, as many as hold less than SPARE of the squared norm together.
    """

    cells: tuple[Cell, ...]
    by_layer: dict[int | None, float]
    main_layers: tuple[int | None, ...]
    spare: tuple[Cell, ...]

    @property
    def columns(self) -> list[str]:
        """The sites or modules, each once, in the order of the model."""
        return list(dict.fromkeys(cell.column for cell in self.cells))

    def to_json(self) -> dict[str, Any]:
        """All cells with their spectra, and what they say together."""
        return {
            "cells": [
                {**cell.to_json(), "spectrum": [_short(value) for value in cell.spectrum]}
                for cell in self.cells
            ],
            "share_of_squared_norm": [
                {"layer": layer, "share": _short(share)} for layer, share in self.by_layer.items()
            ],
            "main_layers": list(self.main_layers),
            "spare": [cell.to_json() for cell in self.spare],
        }


def trained_matrices(adapter: SavedAdapter) -> dict[str, TrainedMatrix]:
    """The trained matrices by the module's name, in the order of the layers; empty for other methods."""
    found: dict[str, tuple[Tensor, Tensor | None]]
    if adapter.method == PREFIX_TUNING_PLUS:
        found = _memories(adapter.tensors)
    elif isinstance(adapter.config, LoraConfig) and adapter.method == LORA:
        found = _lora(adapter.tensors, adapter.config)
    else:
        return {}
    places = sorted(found, key=_order)
    columns = _columns(places, sites=adapter.method == PREFIX_TUNING_PLUS)
    matrices = {}
    for place in places:
        left, right = found[place]
        right = None if right is None else right.float()
        matrices[place] = TrainedMatrix(_layer(place), columns[place], left.float(), right)
    return matrices


def memory_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of Prefix-Tuning+ by module: M, or M_down and M_up; with a trained map also W_phi and b_phi."""
    return _grouped(tensors, _MEMORY)


def site(place: str) -> str:
    """Whether a module of Prefix-Tuning+ is attention or an FFN."""
    return ATTENTION if "att" in place.rpartition(".")[2].lower() else FFN


def skipped(adapter: SavedAdapter, matrices: Mapping[str, TrainedMatrix]) -> list[str]:
    """The LoRA modules whose ΔW is not one product B·A, such as convolutions, or experts in one tensor."""
    return [place for place in _grouped(adapter.tensors, _LORA) if place not in matrices]


def _memories(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """M, or M_down and M_up, by module. A module that lacks one of the two is left out."""
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for place, parts in memory_parts(tensors).items():
        if "M" in parts:
            found[place] = parts["M"], None
        elif {"M_down", "M_up"} <= parts.keys():
            found[place] = parts["M_down"], parts["M_up"]
    return found


def _lora(
    tensors: Mapping[str, Tensor], config: LoraConfig
) -> dict[str, tuple[Tensor, Tensor | None]]:
    found: dict[str, tuple[Tensor, Tensor | None]] = {}
    for place, parts in _grouped(tensors, _LORA).items():
        if {"A", "B"} <= parts.keys():
            down, up = parts["A"], parts["B"]
        elif {"embedding_A", "embedding_B"} <= parts.keys():
            down, up = parts["embedding_A"], parts["embedding_B"]
        else:
            continue
        rank = _of_pattern(config.rank_pattern, place, config.r)
        if down.ndim == up.ndim == 2 and down.shape[0] == up.shape[1] == rank:
            scale = _of_pattern(config.alpha_pattern, place, config.lora_alpha)
            scale /= math.sqrt(rank) if config.use_rslora else rank
            found[place] = (up[None].float() * scale, down[None])
    return found


def _of_pattern(pattern: Mapping[str, float], place: str, otherwise: float) -> float:
    return pattern.get(get_pattern_key(list(pattern), place), otherwise)


def _grouped(tensors: Mapping[str, Tensor], form: re.Pattern[str]) -> dict[str, dict[str, Tensor]]:
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if match := form.fullmatch(key.removeprefix(_PEFT_PREFIX)):
            found.setdefault(match["place"], {})[match["part"]] = value
    return found


def _order(place: str) -> tuple[bool, int, bool, str]:
    """A key that sorts by layer, attention before the FFN, and modules outside of the layers last."""
    layer = _layer(place)
    return layer is None, layer or 0, "att" not in place, place


def _layer(place: str) -> int | None:
    match = re.search(r"\.(\d+)(?:\.|$)", place)
    return int(match[1]) if match else None


def _columns(places: Iterable[str], *, sites: bool) -> dict[str, str]:
    """A short name for each module, or its name within the layer where short names would be the same."""
    within = {place: re.split(r"\.\d+\.", place, maxsplit=1)[-1] for place in places}
    short = {
        place: site(name) if sites else name.rpartition(".")[2] for place, name in within.items()
    }
    told_apart = len({(_layer(place), name) for place, name in short.items()}) == len(short)
    return short if told_apart else within


def statistics(matrices: Mapping[str, TrainedMatrix]) -> Statistics | None:
    """Measure every trained matrix; None where there is none."""
    if not matrices:
        return None
    cells = tuple(cell for matrix in matrices.values() for cell in _cells(matrix))
    squares = [cell.norm**2 if math.isfinite(cell.norm) else 0.0 for cell in cells]
    whole = sum(squares)
    by_layer: dict[int | None, float] = {}
    for cell, square in zip(cells, squares, strict=True):
        by_layer[cell.layer] = by_layer.get(cell.layer, 0.0) + (square / whole if whole else 0.0)
    return Statistics(cells, by_layer, _main(by_layer), _spare(cells, squares, whole))


def effective_rank(shares: Sequence[float]) -> float:
    """The exponential of the entropy of singular values or eigenvalues, given as shares of their sum.

    It is n where n shares are equal and the rest are zero, and 0 without shares (Roy and Vetterli, "The effective
    rank: a measure of effective dimensionality", EUSIPCO 2007).
    """
    return math.exp(-sum(p * math.log(p) for p in shares if p > 0)) if shares else 0.0


def _cells(matrix: TrainedMatrix) -> list[Cell]:
    where, heads = (matrix.layer, matrix.column), range(matrix.shape[0])
    if not matrix.finite:
        return [Cell(*where, head, math.nan, math.nan, ()) for head in heads]
    values = matrix.singular_values()
    found = []
    for head, norm, spectrum in zip(
        heads, values.norm(dim=-1).tolist(), values.tolist(), strict=True
    ):
        total = sum(spectrum)
        rank = effective_rank([value / total for value in spectrum] if total else [])
        found.append(Cell(*where, head, norm, rank, tuple(spectrum)))
    return found


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
        if math.isfinite(cells[i].norm):
            spare.add(i)
    return tuple(cells[i] for i in sorted(spare))


def _short(value: float) -> float:
    """Round to six digits; float32 has no more."""
    return float(f"{value:.6g}")

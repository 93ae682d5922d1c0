"""The trained matrices of an adapter: M of each head for Prefix-Tuning+, ΔW of each module for LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import sqrt

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from prefixtune_cli.merge_info.saved import LORA, PREFIX_TUNING_PLUS, SavedAdapter

ATTENTION, FFN = "attention", "ffn"
_MEMORY = re.compile(
    r"(?P<place>.+)\.prefix_tuning_plus_memory\.(?P<part>M|M_down|M_up|W_phi|b_phi)"
)
_LORA = re.compile(r"(?P<place>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(\.weight)?")
_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Trained:
    """One trained matrix of each head: left, or left·right where it is kept as a product of two of low rank.

    Attributes:
        layer: the decoder layer; None is outside of them.
        column: `attention` or `ffn` for Prefix-Tuning+, the module's name for LoRA.
        left: [heads, rows, columns], or [heads, rows, rank]; LoRA has one head, and its scale in here.
        right: [heads, rank, columns].
    """

    layer: int | None
    column: str
    left: Tensor
    right: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """[heads, rows, columns] of the dense matrix."""
        heads, rows, columns = self.left.shape
        return heads, rows, columns if self.right is None else self.right.shape[2]

    @property
    def finite(self) -> bool:
        parts = (self.left,) if self.right is None else (self.left, self.right)
        return all(bool(torch.isfinite(part).all()) for part in parts)

    def dense(self) -> Tensor:
        """[heads, rows, columns], float32."""
        return self.left if self.right is None else self.left @ self.right

    def singular_values(self) -> Tensor:
        """[heads, rank], float64, the largest first; of a product without making it dense."""
        left = self.left.double()
        if self.right is None:
            values: Tensor = torch.linalg.svdvals(left)
            return values
        _, r_left = torch.linalg.qr(left, mode="r")
        _, r_right = torch.linalg.qr(self.right.double().mT, mode="r")
        values = torch.linalg.svdvals(r_left @ r_right.mT)
        return values


def trained(adapter: SavedAdapter) -> dict[str, Trained]:
    """The trained matrices by the module's name, in the order of the layers; none for other methods."""
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
        matrices[place] = Trained(_layer(place), columns[place], left.float(), right)
    return matrices


def memory_parts(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Prefix-Tuning+'s parts by module: M (or M_down and M_up), and W_phi and b_phi of a trained map."""
    return _grouped(tensors, _MEMORY)


def skipped(adapter: SavedAdapter) -> list[str]:
    """The LoRA modules whose ΔW is not B·A of one matrix: experts in one tensor, convolutions."""
    read = trained(adapter)
    return [place for place in _grouped(adapter.tensors, _LORA) if place not in read]


def dense_memory(parts: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None] | None:
    """M, or M_down and M_up; None where neither is whole."""
    if "M" in parts:
        return parts["M"], None
    if {"M_down", "M_up"} <= parts.keys():
        return parts["M_down"], parts["M_up"]
    return None


def _memories(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor | None]]:
    return {
        place: m
        for place, parts in memory_parts(tensors).items()
        if (m := dense_memory(parts)) is not None
    }


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
            scale /= sqrt(rank) if config.use_rslora else rank
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
    """Sorts by layer, attention before the FFN; what is outside of the layers comes last."""
    layer = _layer(place)
    return layer is None, layer or 0, "att" not in place, place


def _layer(place: str) -> int | None:
    match = re.search(r"\.(\d+)(?:\.|$)", place)
    return int(match[1]) if match else None


def _columns(places: Iterable[str], *, sites: bool) -> dict[str, str]:
    """A short name of each place, told apart within a layer."""
    within = {place: re.split(r"\.\d+\.", place, maxsplit=1)[-1] for place in places}
    short = {
        place: _site(name) if sites else name.rpartition(".")[2] for place, name in within.items()
    }
    told_apart = len({(_layer(place), name) for place, name in short.items()}) == len(short)
    return short if told_apart else within


def _site(name: str) -> str:
    return ATTENTION if "att" in name.rpartition(".")[2].lower() else FFN


def layers_of(matrices: Mapping[str, Trained]) -> list[int]:
    """The decoder layers that have a trained matrix."""
    return sorted({m.layer for m in matrices.values() if m.layer is not None})


def own_keys(config: PeftConfig, tensors: Mapping[str, Tensor]) -> list[str]:
    """The keys of the method's own weights: without those of `modules_to_save` and copies of the base's."""
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix = None if config.peft_type is None else PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    return [key for key in tensors if prefix is None or config.is_prompt_learning or prefix in key]

"""Several adapters: whether they can be merged with each other, how alike they are, and what adding them will do.

The prediction is a rule of thumb, not a measurement. TIES found that entries of opposite sign cancel in a merge (Yadav
et al. 2023, arXiv 2306.01708). Task arithmetic found that updates for different tasks are often nearly orthogonal, and
then add up (Ilharco et al. 2023, arXiv 2212.04089). DARE found that most entries can be dropped (Yu et al. 2023,
arXiv 2311.03099).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from math import isnan, nan, sqrt
from typing import Any

import torch
from torch import Tensor

from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter.arithmetic import differing_setting
from prefixtune_cli.merge.source import INITIALISATION, without_a_sum
from prefixtune_cli.merge_info.matrices import TrainedMatrix, memory_parts
from prefixtune_cli.merge_info.one_adapter import Facts
from prefixtune_cli.merge_info.saved_adapter import LORA
from prefixtune_cli.pointed import base_key

NEAR_ORTHOGONAL, ALIKE, OPPOSED, CONFLICTING = 0.1, 0.5, -0.1, 0.6
RULE = (
    "Rule of thumb (after TIES, arXiv 2306.01708, and task arithmetic, arXiv 2212.04089), not a measurement: cosine "
    f"below {OPPOSED} or sign conflict above {CONFLICTING}: they cancel; cosine within ±{NEAR_ORTHOGONAL}: they add "
    f"with little interference; above {ALIKE}: they say the same; between: they share a part. Sign conflict is "
    "Σ min(|a|, |b|) over entries of opposite sign, divided by that over all entries: 0.5 of independent matrices."
)
_ENTRIES_AT_ONCE = 2**22
# The settings that decide how M is read.
_READS = ("feature_map", "normalize_query", "share_heads", "block_size")


@dataclass(frozen=True)
class Mismatch:
    """One thing that keeps two adapters from being merged, or that a merge has to bridge.

    Attributes:
        what: the setting, tensor or module in which they differ; or a reason that holds for both.
        first, second: its values in the two; empty where `what` is a reason.
        merged_by: how they can be merged nevertheless; empty where they cannot.
    """

    what: str
    first: str
    second: str
    merged_by: str = ""

    def __str__(self) -> str:
        return f"{self.what}: {self.first} against {self.second}" if self.first else self.what


@dataclass(frozen=True)
class Likeness:
    """How alike the trained matrices of one layer are, or of all.

    Attributes:
        layer: None where it is outside of the layers, or for all layers together.
        cosine: of the vectors of all entries; NaN where one of them is zero.
        sign_conflict: Σ min(|a|, |b|) over entries of opposite sign, divided by the same sum over all entries.
        norm_ratio: the second adapter's norm divided by the first's.
    """

    layer: int | None
    cosine: float
    sign_conflict: float
    norm_ratio: float


@dataclass(frozen=True)
class Pair:
    """Two adapters, compared with each other.

    Attributes:
        difference: the first that keeps them from being merged; None where they can be merged.
        bridged: the differences that do not keep them from being merged.
        incomparable: why their matrices cannot be compared; empty where they are compared.
        by_layer, whole: how alike their matrices are; empty and None where they are not compared.
        prediction: what adding them will do, in words.
    """

    first: str
    second: str
    difference: Mismatch | None
    bridged: tuple[Mismatch, ...] = ()
    incomparable: str = ""
    by_layer: tuple[Likeness, ...] = ()
    whole: Likeness | None = None
    prediction: str = ""

    def to_json(self) -> dict[str, Any]:
        """The pair as JSON types."""
        return {**asdict(self), "can_be_merged": self.difference is None}


def pairs(adapters: Sequence[Facts]) -> list[Pair]:
    """Compare every two of the adapters, in the order given; see `distinct_names` for their names."""
    names = distinct_names(adapters)
    return [
        _pair((names[i], adapters[i]), (names[j], adapters[j]))
        for i, j in combinations(range(len(adapters)), 2)
    ]


def distinct_names(adapters: Sequence[Facts]) -> list[str]:
    """The adapters' names; all are numbered where two of them are the same."""
    names = [facts.adapter.name for facts in adapters]
    if len(set(names)) == len(names):
        return names
    return [f"{i}-{name}" for i, name in enumerate(names, 1)]


def _pair(first: tuple[str, Facts], second: tuple[str, Facts]) -> Pair:
    (a_name, a), (b_name, b) = first, second
    found = list(mismatches(a, b))
    stops = next((one for one in found if not one.merged_by), None)
    bridged = tuple(one for one in found if one.merged_by)
    if incomparable := _incomparable(a, b):
        return Pair(a_name, b_name, stops, bridged, incomparable)
    by_layer, whole = likeness(a.matrices, b.matrices)
    return Pair(a_name, b_name, stops, bridged, "", by_layer, whole, predict(whole, by_layer))


def mismatches(a: Facts, b: Facts) -> Iterator[Mismatch]:
    """All in which two adapters differ, the most important first."""
    one, other = _base_name(a), _base_name(b)
    if one is not None and other is not None:
        if one != other:
            yield Mismatch("base", one, other)
        if (mine := _revision(a)) != (theirs := _revision(b)):
            yield Mismatch("revision of the base", mine, theirs)
    if (mine := a.adapter.method) != (theirs := b.adapter.method):
        yield Mismatch("method", mine, theirs)
        return
    no_sum = without_a_sum(a.adapter.config) is None or without_a_sum(b.adapter.config) is None
    if no_sum or not a.matrices or not b.matrices:
        yield Mismatch(f"adapters of {a.adapter.method} have no sum", "", "")
        return
    yield from _different_settings(a, b)
    yield from _different_matrices(a, b)
    if a.layers != b.layers:
        mine, theirs = (", ".join(map(str, facts.layers)) for facts in (a, b))
        yield Mismatch("layers", mine, theirs, "what is zero where one has none")
    if moved := _other_feature_map(a, b):
        yield Mismatch(
            moved,
            "of one map",
            "of another",
            "linear alone, with the two maps side by side, at the cost of both",
        )


def _different_settings(a: Facts, b: Facts) -> Iterator[Mismatch]:
    mine, theirs = a.adapter.config, b.adapter.config
    both = isinstance(mine, PrefixTuningPlusConfig) and isinstance(theirs, PrefixTuningPlusConfig)
    if both and (found := differing_setting(mine, theirs)):
        what, before, after = found
        yield Mismatch(what, str(before), str(after))
    for name in {**(without_a_sum(mine) or {}), **(without_a_sum(theirs) or {})}:
        before, after = getattr(mine, name), getattr(theirs, name)
        why = "has changed the base's weights" if name == INITIALISATION else "has no sum"
        yield Mismatch(f"{name}, which {why}", str(before), str(after))


def _different_matrices(a: Facts, b: Facts) -> Iterator[Mismatch]:
    lora, only = a.adapter.method == LORA, a.matrices.keys() ^ b.matrices.keys()
    if lora and only:
        place = min(only)
        there = ["adapted" if place in facts.matrices else "not adapted" for facts in (a, b)]
        yield Mismatch(place, there[0], there[1], "what is zero where one has none")
    for place in a.matrices:
        if place not in b.matrices:
            continue
        one, other = a.matrices[place], b.matrices[place]
        if one.shape != other.shape:
            both = a.adapter.trains_feature_map and b.adapter.trains_feature_map
            maps = "linear alone, with the two maps side by side" if both else ""
            yield Mismatch(f"shape of {place}", str(list(one.shape)), str(list(other.shape)), maps)
            return
        if lora and one.left.shape != other.left.shape:
            ranks = str(one.left.shape[2]), str(other.left.shape[2])
            yield Mismatch(f"rank of {place}", ranks[0], ranks[1], "the sum of the ranks")
            return


def likeness(
    a: Mapping[str, TrainedMatrix], b: Mapping[str, TrainedMatrix]
) -> tuple[tuple[Likeness, ...], Likeness | None]:
    """How alike the matrices are that both have: by layer, and all together (None where there are none)."""
    sums: dict[int | None, Tensor] = {}
    for place in [
        place for place in a if place in b
    ]:  # in a fixed order, as sums of floats depend on it
        if a[place].shape == b[place].shape and a[place].finite and b[place].finite:
            layer = a[place].layer
            sums[layer] = sums.get(layer, torch.zeros(5).double()) + _sums(a[place], b[place])
    order = sorted(sums, key=lambda layer: (layer is None, layer or 0))
    whole = _likeness(None, torch.stack(list(sums.values())).sum(0)) if sums else None
    return tuple(_likeness(layer, sums[layer]) for layer in order), whole


def predict(whole: Likeness | None, by_layer: Sequence[Likeness] = ()) -> str:
    """What adding two adapters will do, in words, according to RULE."""
    if whole is None or isnan(whole.cosine):
        return "Nothing can be said: one of them is zero."
    opposed = [str(found.layer) for found in by_layer if _cancel(found) and found.layer is not None]
    if _cancel(whole):
        return "They cancel in part: expect interference; try ties, or keep them apart."
    where = f" But they cancel in layers {', '.join(opposed)}." if opposed else ""
    if whole.cosine > ALIKE:
        return f"They say nearly the same: give weights that sum to one, or it counts twice.{where}"
    if abs(whole.cosine) <= NEAR_ORTHOGONAL:
        return f"They are near orthogonal: they add with little interference.{where}"
    return f"They share a part: it adds up in a sum with weights of one.{where}"


def _cancel(found: Likeness) -> bool:
    return found.cosine < OPPOSED or found.sign_conflict > CONFLICTING


def _sums(a: TrainedMatrix, b: TrainedMatrix) -> Tensor:
    """Sums over all entries, [5]: Σab, Σa², Σb², Σ min(|a|, |b|) of entries of opposite sign, and that of all entries.

    Some rows are multiplied out at a time, so that a large product is never held whole.
    """
    total = torch.zeros(5, dtype=torch.float64)
    _, rows, columns = a.shape
    step = max(1, _ENTRIES_AT_ONCE // columns)
    for head in range(a.shape[0]):
        for start in range(0, rows, step):
            x, y = (_rows(matrix, head, slice(start, start + step)) for matrix in (a, b))
            smaller = torch.minimum(x.abs(), y.abs()).double()
            opposite = smaller[(x * y) < 0].sum()
            products = (
                (x.double() * y).sum(),
                x.double().square().sum(),
                y.double().square().sum(),
            )
            total += torch.stack([*products, opposite, smaller.sum()])
    return total


def _rows(matrix: TrainedMatrix, head: int, rows: slice) -> Tensor:
    left = matrix.left[head, rows]
    return left if matrix.right is None else left @ matrix.right[head]


def _likeness(layer: int | None, sums: Tensor) -> Likeness:
    product, a, b, opposite, both = sums.tolist()
    return Likeness(
        layer,
        cosine=product / sqrt(a * b) if a and b else nan,
        sign_conflict=opposite / both if both else nan,
        norm_ratio=sqrt(b / a) if a else nan,
    )


def _base_name(facts: Facts) -> str | None:
    """The base's full path or hub id, which is the same however the base was written."""
    section = facts.adapter.model
    return None if section is None else base_key(section.model_copy(update={"revision": None}))


def _revision(facts: Facts) -> str:
    section = facts.adapter.model
    return (section.revision if section else None) or "main"


def _other_feature_map(a: Facts, b: Facts) -> str | None:
    """The first tensor in which two trained feature maps differ; None where there is none."""
    if not (a.adapter.trains_feature_map and b.adapter.trains_feature_map):
        return None
    mine, theirs = memory_parts(a.adapter.tensors), memory_parts(b.adapter.tensors)
    for place in sorted(mine.keys() & theirs.keys()):
        for part in ("W_phi", "b_phi"):
            one, other = mine[place].get(part), theirs[place].get(part)
            if one is not None and other is not None and not torch.equal(one, other):
                return f"{place}.{part}"
    return None


def _incomparable(a: Facts, b: Facts) -> str:
    """Why the entries of two adapters cannot be compared; empty where they can."""
    if a.adapter.method != b.adapter.method or not a.matrices or not b.matrices:
        return "There are no matrices of the same kind to compare."
    mine, theirs = a.adapter.config, b.adapter.config
    if isinstance(mine, PrefixTuningPlusConfig) and isinstance(theirs, PrefixTuningPlusConfig):
        for name in _READS:
            if getattr(mine, name) != getattr(theirs, name):
                return f"{name} differs, so M is read by another φ or by other heads: entries cannot be compared."
        if moved := _other_feature_map(a, b):
            return (
                f"The feature maps are trained, and differ (first {moved}): M is comparable only where W_phi and b_phi "
                "are equal."
            )
    both = a.matrices.keys() & b.matrices.keys()
    alike = any(a.matrices[place].shape == b.matrices[place].shape for place in both)
    return "" if alike else "They have no matrix of equal place and shape."

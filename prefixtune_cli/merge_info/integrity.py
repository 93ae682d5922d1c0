"""Whether an adapter is what its configuration says: the values, the keys, the shapes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch

from prefixtune_cli.merge_info.base import Base
from prefixtune_cli.merge_info.saved import SavedAdapter
from prefixtune_cli.merge_info.trained import own_keys
from prefixtune_cli.saved_adapter import copies_of_base


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: nan, infinite, zero, missing, extra, shape, dtypes or misfit.
        key: the tensor's; empty for what concerns all.
        text: a sentence.
    """

    kind: str
    key: str
    text: str


def integrity(adapter: SavedAdapter, base: Base | None) -> list[Finding]:
    """Everything that is wrong with the adapter; keys and shapes are checked where the base is known."""
    return [
        *_values(adapter),
        *_dtypes(adapter),
        *(_keys(adapter, base) if base is not None else []),
    ]


def _values(adapter: SavedAdapter) -> list[Finding]:
    found = []
    for key, tensor in adapter.tensors.items():
        nans, infinite = int(tensor.isnan().sum()), int(tensor.isinf().sum())
        of = f"of {tensor.numel()} values are"
        if nans:
            found.append(Finding("nan", key, f"{key}: {nans} {of} NaN."))
        if infinite:
            found.append(Finding("infinite", key, f"{key}: {infinite} {of} infinite."))
        if not bool(torch.count_nonzero(tensor)):
            found.append(
                Finding(
                    "zero", key, f"{key}: every value is zero, so it was never trained, or is lost."
                )
            )
    return found


def _dtypes(adapter: SavedAdapter) -> list[Finding]:
    counts = Counter(
        name_of(adapter.tensors[key].dtype) for key in own_keys(adapter.config, adapter.tensors)
    )
    if len(counts) < 2:
        return []
    told = ", ".join(f"{count} of {name}" for name, count in counts.most_common())
    return [Finding("dtypes", "", f"The adapter's tensors have more than one dtype: {told}.")]


def _keys(adapter: SavedAdapter, base: Base) -> list[Finding]:
    if base.expected is None:
        return [Finding("misfit", "", f"The adapter cannot be put on its base: {base.misfit}")]
    stored = {key: tuple(tensor.shape) for key, tensor in adapter.tensors.items()}
    copies = copies_of_base(stored, base.expected, base.names)
    found = []
    for key in sorted(base.expected.keys() | stored.keys() - copies.keys()):
        wanted, there = base.expected.get(key), stored.get(key)
        if there is None:
            found.append(
                Finding(
                    "missing", key, f"{key} is missing; its shape would be {list(wanted or ())}."
                )
            )
        elif wanted is None:
            found.append(Finding("extra", key, f"{key} {list(there)} has no place on this base."))
        elif there != wanted:
            found.append(
                Finding("shape", key, f"{key} is {list(there)}, and on this base {list(wanted)}.")
            )
    return found


def name_of(dtype: torch.dtype) -> str:
    """As in float32."""
    return str(dtype).removeprefix("torch.")

"""An adapter on the disk, with its tensors, and the check whether its values, keys and shapes are right."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prefixtune_cli.adapter.feature_map import MAPS
from prefixtune_cli.adapter_folder import copies_of_base, read_adapter_config
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.merge.source import Source
from prefixtune_cli.merge_info.base import Base
from prefixtune_cli.pointed import WEIGHTS, Pointed

PREFIX_TUNING_PLUS, LORA, PREFIX_TUNING = "prefix-tuning-plus", "lora", "prefix-tuning"


@dataclass(frozen=True, kw_only=True)
class SavedAdapter(Source):
    """One adapter with its tensors.

    Attributes:
        tensors: as they are stored, by key.
        environment, summary: the run's files; empty where there is no run.
    """

    tensors: dict[str, Tensor]
    environment: dict[str, Any]
    summary: dict[str, Any]

    @property
    def bytes_on_disk(self) -> int:
        """The size of the file of weights."""
        return (self.folder / WEIGHTS).stat().st_size

    @property
    def trains_feature_map(self) -> bool:
        """Whether φ is trained together with M; never for methods other than Prefix-Tuning+."""
        phi = MAPS.get(str(getattr(self.config, "feature_map", None)))
        return phi is not None and phi.is_trained


def read(found: Pointed) -> SavedAdapter:
    """Read an adapter that was pointed at.

    Raises:
        AdapterError: it is a whole model, or it is damaged, a pickle, or without a configuration.
    """
    if found.whole or found.folder is None:
        raise AdapterError(
            f"{found.given} has no adapter: its method is full, which trains every weight of the base. "
            "Give runs of another method."
        )
    config = read_adapter_config(found.folder)
    try:
        tensors = load_file(found.folder / WEIGHTS)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"The adapter in {found.folder} cannot be read: {error}") from error
    if not tensors:
        raise AdapterError(f"The adapter in {found.folder} holds no weights: {WEIGHTS} is empty.")
    return SavedAdapter(
        **vars(found),
        config=config,
        tensors=tensors,
        environment=_read_json(found.run.environment) if found.run else {},
        summary=_read_json(found.run.summary) if found.run and found.as_trained else {},
    )


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; empty where the run is not finished, or another tool wrote the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: nan, infinite, zero, missing, extra, shape, dtypes or misfit.
        key: the tensor's; empty where the finding is about the whole adapter.
        text: the finding in a sentence.
    """

    kind: str
    key: str
    text: str


def integrity(adapter: SavedAdapter, base: Base | None) -> list[Finding]:
    """Find everything that is wrong with an adapter. Keys and shapes are checked where the base is known."""
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
    config = adapter.config
    # Only the method's own weights: `modules_to_save` and copies of the base's weights may have another dtype.
    prefix = None if config.peft_type is None else PEFT_TYPE_TO_PREFIX_MAPPING.get(config.peft_type)
    counts = Counter(
        name_of(tensor.dtype)
        for key, tensor in adapter.tensors.items()
        if prefix is None or config.is_prompt_learning or prefix in key
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
    """The dtype's name without its library, such as float32."""
    return str(dtype).removeprefix("torch.")

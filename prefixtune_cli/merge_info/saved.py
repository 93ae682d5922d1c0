"""An adapter as it lies on the disk: alone in a folder, or in a run directory with the recipe that it was made by."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from prefixtune_cli.errors import AdapterError
from prefixtune_cli.pointed import WEIGHTS, Pointed
from prefixtune_cli.saved_adapter import read_adapter_config

PREFIX_TUNING_PLUS, LORA, PREFIX_TUNING = "prefix-tuning-plus", "lora", "prefix-tuning"


@dataclass(frozen=True, kw_only=True)
class SavedAdapter(Pointed):
    """One adapter, with its tensors.

    Attributes:
        tensors: as stored, by key.
        sha256: of the file of weights.
        bytes_on_disk: of that file.
        environment, summary: of the run, empty where there is none.
    """

    folder: Path
    method: str
    config: PeftConfig
    tensors: dict[str, Tensor]
    sha256: str
    bytes_on_disk: int
    environment: dict[str, Any]
    summary: dict[str, Any]


def read(found: Pointed) -> SavedAdapter:
    """Read an adapter that was pointed at.

    Raises:
        AdapterError: it is a whole model, or it cannot be read: damaged, a pickle, without a configuration.
    """
    if found.whole or found.folder is None:
        raise AdapterError(
            f"{found.given} has no adapter: its method is full, which trains every weight of the base. "
            "Give runs of another method."
        )
    config = read_adapter_config(found.folder)
    weights = found.folder / WEIGHTS
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"The adapter in {found.folder} cannot be read: {error}") from error
    if not tensors:
        raise AdapterError(f"The adapter in {found.folder} holds no weights: {WEIGHTS} is empty.")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SavedAdapter(
        **vars(found),
        config=config,
        tensors=tensors,
        sha256=digest,
        bytes_on_disk=weights.stat().st_size,
        environment=_read_json(found.run.environment) if found.run else {},
        summary=_read_json(found.run.summary) if found.run and found.as_trained else {},
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (
        OSError,
        ValueError,
    ):  # an unfinished run, or one of another tool: the adapter is what is asked for
        return {}
    return found if isinstance(found, dict) else {}

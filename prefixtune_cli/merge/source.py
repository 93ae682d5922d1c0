"""What is merged: a run or an adapter folder, read without any weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from prefixtune_cli.errors import AdapterError
from prefixtune_cli.pointed import WEIGHTS, Pointed, point
from prefixtune_cli.saved_adapter import read_adapter_config


@dataclass(frozen=True, kw_only=True)
class Source(Pointed):
    """An adapter that is merged, with peft's configuration of it."""

    folder: Path
    config: PeftConfig

    def to_json(self) -> dict[str, Any]:
        with open(self.folder / WEIGHTS, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"folder": str(self.folder), "method": self.method, "sha256": digest}


def read_source(given: str, model: str | None = None) -> Source:
    """Find an adapter and read its settings; raises what `point` does, and AdapterError for a whole model.

    Args:
        given: a run, what lies in it, or an adapter folder.
        model: its base, where that is not the one that it names.
    """
    found = point(given, None if model is None else {"name": model})
    if found.whole or found.folder is None:
        raise AdapterError(
            f"{given} is a run of method full: it holds a whole model and no adapter, so there is nothing to merge. "
            "Give runs of prefix-tuning-plus or lora."
        )
    return Source(**vars(found), config=read_adapter_config(found.folder))

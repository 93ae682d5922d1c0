"""What is merged: a run directory or an adapter folder, read without any weight."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftConfig

from prefixtune_cli.errors import AdapterError
from prefixtune_cli.model import read_adapter_config
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.run_dir import RunDir

WEIGHTS = "adapter_model.safetensors"
NAMES = {"PREFIX_TUNING_PLUS": "prefix-tuning-plus", "PREFIX_TUNING": "prefix-tuning"}


@dataclass(frozen=True)
class Source:
    """An adapter that is merged.

    Attributes:
        given: the run or the folder, as it was typed.
        folder: the adapter's.
        config: peft's.
        section: the base that it was trained on.
        run: where it comes from a run.
    """

    given: str
    folder: Path
    config: PeftConfig
    section: ModelSection
    run: RunDir | None = None

    @property
    def method(self) -> str:
        """As recipes call it; of methods that only peft knows, its name there in lower case."""
        name = str(getattr(self.config.peft_type, "value", self.config.peft_type))
        return NAMES.get(name, name.lower())

    @property
    def base(self) -> str:
        """What tells bases apart: a folder's full path, or a hub id, with its revision."""
        name = resolve_alias(self.section.name)
        where = str(Path(name).resolve()) if Path(name).exists() else name
        return f"{where} at {self.section.revision}" if self.section.revision else where

    def to_json(self) -> dict[str, Any]:
        with open(self.folder / WEIGHTS, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"folder": str(self.folder), "method": self.method, "sha256": digest}


def read_source(given: str) -> Source:
    """Find an adapter and read its settings.

    Args:
        given: a run directory or an adapter folder.

    Raises:
        AdapterError: there is no adapter, or it is a whole model.
        RunDirError: the run has no adapter yet.
    """
    path = Path(given)
    run = RunDir(path) if RunDir(path).recipe.exists() else None
    if run is None and not (path / "adapter_config.json").exists():
        raise AdapterError(
            f"{given} is neither a run directory (it has no recipe.yaml) nor an adapter folder (no "
            "adapter_config.json). The runs are under runs/."
        )
    if run is None:
        config = read_adapter_config(path)
        name = config.base_model_name_or_path
        if not name:
            raise AdapterError(
                f"The adapter in {given} does not say which base it belongs to (base_model_name_or_path in its "
                "adapter_config.json). Write the base's name there."
            )
        return Source(given, path, config, ModelSection(name=name, revision=config.revision))
    run.check_adapter()
    recipe = resolve(str(run.recipe))
    if recipe.adapter.method == "full":
        raise AdapterError(
            f"{given} is a run of method full: it holds a whole model and no adapter, so there is nothing to merge. "
            "Give runs of prefix-tuning-plus or lora."
        )
    return Source(given, run.adapter, read_adapter_config(run.adapter), recipe.model, run)

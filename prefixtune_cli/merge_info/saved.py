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

from prefixtune_cli import model as models
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.recipe import load
from prefixtune_cli.recipe.schema import ModelSection, Recipe
from prefixtune_cli.run_dir import RunDir

PREFIX_TUNING_PLUS, LORA, PREFIX_TUNING = "prefix-tuning-plus", "lora", "prefix-tuning"
_WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class SavedAdapter:
    """One adapter.

    Attributes:
        name: the run's, or the folder's.
        folder: what peft has saved.
        run: the run directory that it lies in.
        tensors: as stored, by key.
        sha256: of the file of weights.
        bytes_on_disk: of that file.
        recipe: of the run; likewise `environment` and `summary`, empty where there is none.
    """

    name: str
    folder: Path
    run: RunDir | None
    config: PeftConfig
    tensors: dict[str, Tensor]
    sha256: str
    bytes_on_disk: int
    recipe: Recipe | None
    environment: dict[str, Any]
    summary: dict[str, Any]

    @property
    def method(self) -> str:
        """The name of the method, as in recipes; of another method of peft, peft's own."""
        return (
            str(getattr(self.config.peft_type, "value", self.config.peft_type))
            .lower()
            .replace("_", "-")
        )

    def base(self, model: ModelSection | None = None) -> ModelSection | None:
        """The base: `model` where it is given, else the recipe's, else the adapter's; None where none is named."""
        if model is not None:
            return model
        if self.recipe is not None:
            return self.recipe.model
        name, revision = self.config.base_model_name_or_path, self.config.revision
        return ModelSection(name=name, revision=revision) if name else None


def read(path: str | Path) -> SavedAdapter:
    """Read a run's adapter, or an adapter folder.

    Args:
        path: a run directory, its `adapter/`, or any folder that peft has saved an adapter to.

    Raises:
        AdapterError: there is no adapter, or it cannot be read: damaged, a pickle, without a configuration.
        RunDirError: the run has no adapter yet.
        RecipeError: the run's recipe cannot be read.
    """
    path = Path(path)
    run = _run(path)
    recipe = load.resolve(str(run.recipe)) if run else None
    folder = run.adapter if run else path
    if run and recipe:
        run.check_adapter()
        if recipe.adapter.method == "full":
            raise AdapterError(
                f"The run in {path} has no adapter: its method is full, which trains every weight of the base. "
                "Give runs of another method."
            )
    _check_folder(path, folder)
    config = models.read_adapter_config(folder)
    weights = folder / _WEIGHTS
    try:
        tensors = load_file(weights)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {error}") from error
    if not tensors:
        raise AdapterError(f"The adapter in {folder} holds no weights: {_WEIGHTS} is empty.")
    with open(weights, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SavedAdapter(
        name=(run.path if run else path).resolve().name,
        folder=folder,
        run=run,
        config=config,
        tensors=tensors,
        sha256=digest,
        bytes_on_disk=weights.stat().st_size,
        recipe=recipe,
        environment=_read_json(run.environment) if run else {},
        summary=_read_json(run.summary) if run else {},
    )


def _run(path: Path) -> RunDir | None:
    """The run that is given, itself or by its adapter."""
    for folder in (path, path.parent):
        run = RunDir(folder)
        if run.recipe.exists() and (folder == path or path.name == run.adapter.name):
            return run
    return None


def _check_folder(path: Path, folder: Path) -> None:
    hint = "Give a run directory of `ptp train`, or a folder with adapter_config.json."
    if not path.exists():
        raise AdapterError(f"There is no folder {path}. {hint}")
    if not folder.is_dir():
        raise AdapterError(f"{path} is a file, not an adapter. {hint}")
    if not (folder / "adapter_config.json").exists():
        lacks = "has weights but no adapter_config.json, so nothing says what they are"
        raise AdapterError(
            f"{folder} {lacks if (folder / _WEIGHTS).exists() else 'holds no adapter (no adapter_config.json)'}. {hint}"
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

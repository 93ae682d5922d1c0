"""What is known of one adapter, gathered from its folder, its run and its base's configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from prefixtune_cli.adapter.feature_map import MAPS
from prefixtune_cli.errors import ModelError
from prefixtune_cli.merge_info.base import Base, without_weights
from prefixtune_cli.merge_info.costs import Costs, costs
from prefixtune_cli.merge_info.folding import Folding, folding
from prefixtune_cli.merge_info.integrity import Finding, integrity, name_of
from prefixtune_cli.merge_info.learned import Cell, Learned, learned
from prefixtune_cli.merge_info.saved import (
    LORA,
    PREFIX_TUNING,
    PREFIX_TUNING_PLUS,
    SavedAdapter,
    read,
)
from prefixtune_cli.merge_info.trained import Trained, layers_of, skipped, trained
from prefixtune_cli.pointed import Pointed
from prefixtune_cli.recipe.schema import ModelSection

# What of a method's configuration says what the adapter computes; a newer or older version may lack some.
SETTINGS = {
    PREFIX_TUNING_PLUS: (
        "feature_map",
        "feature_dim",
        "normalize_query",
        "share_heads",
        "sites",
        "block_size",
        "rank",
    ),
    LORA: ("r", "lora_alpha", "use_rslora", "use_dora", "target_modules"),
    PREFIX_TUNING: ("num_virtual_tokens", "prefix_projection"),
}
_FEATURE_MAP_SCALE = (
    "The map is trained: a head's M may be small because its features are large, so the norms of M alone are not "
    "comparable across heads."
)
_DORA = "The adapter is a DoRA: its magnitudes are left out, and what is told is B·A·scale alone."


@dataclass(frozen=True)
class Facts:
    """Everything that `ptp merge-info` tells of one adapter.

    Attributes:
        section: how the base is found; None where none is named.
        base: None where its configuration cannot be found, and `base_problem` says why.
        matrices: the trained matrices by module, for Prefix-Tuning+ and LoRA.
        settings: what of its configuration says what it computes.
        notes: what to bear in mind with what it has learned.
        findings: of the integrity check; none of a sound adapter.
    """

    adapter: SavedAdapter
    section: ModelSection | None
    base: Base | None
    base_problem: str | None
    matrices: dict[str, Trained]
    settings: dict[str, Any]
    folding: Folding
    costs: Costs
    learned: Learned | None
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def layers(self) -> list[int]:
        return layers_of(self.matrices)

    @property
    def heads(self) -> dict[str, int]:
        """The heads (at the FFN: blocks) of Prefix-Tuning+'s M by site."""
        if self.adapter.method != PREFIX_TUNING_PLUS:
            return {}
        return {matrix.column: matrix.shape[0] for matrix in self.matrices.values()}

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.adapter.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """How many tensors there are of each dtype."""
        return dict(Counter(name_of(tensor.dtype) for tensor in self.adapter.tensors.values()))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types, with the spectra."""
        saved, base = self.adapter, self.base
        return {
            "name": saved.name,
            "folder": str(saved.folder),
            "run": None if saved.run is None else str(saved.run.path),
            "base": None if self.section is None else self.section.name,
            "revision": None if self.section is None else self.section.revision,
            "base_parameters": None if base is None else base.parameters,
            "base_parameters_per_token": None if base is None else base.parameters_per_token,
            "base_problem": self.base_problem,
            "method": saved.method,
            "settings": self.settings,
            "layers": self.layers,
            "heads": self.heads,
            "parameters": self.parameters,
            "bytes_on_disk": saved.bytes_on_disk,
            "dtypes": self.dtypes,
            "sha256": saved.sha256,
            "data": saved.environment.get("data"),
            "recipe": None if saved.recipe is None else saved.recipe.model_dump(),
            "summary": saved.summary or None,
            "folding": asdict(self.folding),
            "costs": {
                **asdict(self.costs),
                "flops_percent": self.costs.flops_percent,
                "bytes_read_percent": self.costs.bytes_read_percent,
            },
            "learned": None if self.learned is None else _learned_json(self.learned),
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
        }


def gather(found: Pointed, *, typed_base: bool = False) -> Facts:
    """Everything to know of one adapter, without its base's weights.

    Args:
        found: the adapter.
        typed_base: the user has named the base, so that it must be there.

    Raises:
        AdapterError: it cannot be read.
        ModelError: there is no such base.
    """
    adapter = read(found)
    section = adapter.model
    base, problem = None, None
    if section is None:
        problem = "The adapter names no base. Type --model NAME for what depends on it."
    else:
        try:
            base = without_weights(section, adapter.config)
        except ModelError as error:
            if typed_base:
                raise
            problem = str(error)
    matrices = trained(adapter)
    return Facts(
        adapter=adapter,
        section=section,
        base=base,
        base_problem=problem,
        matrices=matrices,
        settings=_settings(adapter),
        folding=folding(adapter, base),
        costs=costs(adapter, base),
        learned=learned(matrices),
        notes=_notes(adapter),
        findings=tuple(integrity(adapter, base)),
    )


def _settings(adapter: SavedAdapter) -> dict[str, Any]:
    named = SETTINGS.get(adapter.method, ())
    stored = {name: getattr(adapter.config, name, None) for name in named}
    return {
        name: sorted(value) if isinstance(value, set) else value
        for name, value in stored.items()
        if value is not None
    }


def _notes(adapter: SavedAdapter) -> tuple[str, ...]:
    notes = []
    if (
        adapter.method == PREFIX_TUNING_PLUS
        and MAPS[str(getattr(adapter.config, "feature_map", None))].is_trained
    ):
        notes.append(_FEATURE_MAP_SCALE)
    if getattr(adapter.config, "use_dora", False):
        notes.append(_DORA)
    if left_out := skipped(adapter):
        notes.append(
            f"{len(left_out)} modules are left out, as their update is not B·A of one matrix: {left_out[0]}, …"
        )
    return tuple(notes)


def _learned_json(found: Learned) -> dict[str, Any]:
    return {
        "cells": [
            {**_cell_json(cell), "spectrum": [_short(value) for value in cell.spectrum]}
            for cell in found.cells
        ],
        "share_of_squared_norm": [
            {"layer": layer, "share": _short(share)} for layer, share in found.by_layer.items()
        ],
        "main_layers": list(found.main_layers),
        "spare": [_cell_json(cell) for cell in found.spare],
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {
        "layer": cell.layer,
        "column": cell.column,
        "head": cell.head,
        "norm": _short(cell.norm),
        "effective_rank": _short(cell.effective_rank),
    }


def _short(value: float) -> float:
    """Rounds to six digits, which is what float32 has."""
    return float(f"{value:.6g}")

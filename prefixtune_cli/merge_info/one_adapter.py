"""Everything about one adapter, from its folder, its run and its base's configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from prefixtune_cli.errors import ModelError
from prefixtune_cli.merge_info.base import Base, without_weights
from prefixtune_cli.merge_info.costs import Costs, Folding, costs, folding
from prefixtune_cli.merge_info.matrices import (
    Statistics,
    TrainedMatrix,
    skipped,
    statistics,
    trained_matrices,
)
from prefixtune_cli.merge_info.saved_adapter import (
    LORA,
    PREFIX_TUNING,
    PREFIX_TUNING_PLUS,
    Finding,
    SavedAdapter,
    integrity,
    name_of,
    read,
)
from prefixtune_cli.pointed import Pointed

# The settings of each method that decide what its adapters compute; another version of peft may lack some.
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
        base: None where its configuration cannot be found; `base_problem` says why.
        matrices: see `trained_matrices`.
        settings: those of its configuration that decide what it computes.
        learned: the statistics of its matrices; None where it has none.
        notes: what to know when reading the statistics.
        findings: what is wrong with it; empty where it is sound.
    """

    adapter: SavedAdapter
    base: Base | None
    base_problem: str | None
    matrices: dict[str, TrainedMatrix]
    settings: dict[str, Any]
    folding: Folding
    costs: Costs
    learned: Statistics | None
    notes: tuple[str, ...]
    findings: tuple[Finding, ...]

    @property
    def layers(self) -> list[int]:
        """The decoder layers that have a trained matrix."""
        return sorted({m.layer for m in self.matrices.values() if m.layer is not None})

    @property
    def heads(self) -> dict[str, int]:
        """For Prefix-Tuning+, the number of heads (FFN: blocks) of M at each site; else empty."""
        if self.adapter.method != PREFIX_TUNING_PLUS:
            return {}
        return {matrix.column: matrix.shape[0] for matrix in self.matrices.values()}

    @property
    def parameters(self) -> int:
        return sum(tensor.numel() for tensor in self.adapter.tensors.values())

    @property
    def dtypes(self) -> dict[str, int]:
        """The number of tensors of each dtype."""
        return dict(Counter(name_of(tensor.dtype) for tensor in self.adapter.tensors.values()))

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON types."""
        saved, base, section = self.adapter, self.base, self.adapter.model
        return {
            "name": saved.name,
            "folder": str(saved.folder),
            "run": None if saved.run is None else str(saved.run.path),
            "base": None if section is None else section.name,
            "revision": None if section is None else section.revision,
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
            "start": saved.environment.get("start"),
            "data": saved.environment.get("data"),
            "recipe": None if saved.recipe is None else saved.recipe.model_dump(),
            "summary": saved.summary or None,
            "folding": asdict(self.folding),
            "costs": {
                **asdict(self.costs),
                "flops_percent": self.costs.flops_percent,
                "bytes_read_percent": self.costs.bytes_read_percent,
            },
            "learned": None if self.learned is None else self.learned.to_json(),
            "notes": list(self.notes),
            "findings": [asdict(finding) for finding in self.findings],
        }


def gather(found: Pointed, *, typed_base: bool = False) -> Facts:
    """Read one adapter and find out everything about it, without its base's weights.

    Args:
        found: the adapter.
        typed_base: the user has named the base, so it is an error where the base is not there.

    Raises:
        AdapterError: the adapter cannot be read.
        ModelError: there is no such base.
    """
    adapter = read(found)
    base, problem = None, None
    if adapter.model is None:
        problem = "The adapter names no base. Type --model NAME for what depends on it."
    else:
        try:
            base = without_weights(adapter.model, adapter.config)
        except ModelError as error:
            if typed_base:
                raise
            problem = str(error)
    matrices = trained_matrices(adapter)
    return Facts(
        adapter=adapter,
        base=base,
        base_problem=problem,
        matrices=matrices,
        settings=_settings(adapter),
        folding=folding(adapter, matrices, base),
        costs=costs(adapter, matrices, base),
        learned=statistics(matrices),
        notes=_notes(adapter, matrices),
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


def _notes(adapter: SavedAdapter, matrices: Mapping[str, TrainedMatrix]) -> tuple[str, ...]:
    notes = []
    if adapter.trains_feature_map:
        notes.append(_FEATURE_MAP_SCALE)
    if getattr(adapter.config, "use_dora", False):
        notes.append(_DORA)
    if left_out := skipped(adapter, matrices):
        notes.append(
            f"{len(left_out)} modules are left out, as their update is not B·A of one matrix: {left_out[0]}, …"
        )
    return tuple(notes)

"""Whether an adapter can be folded into the base weights, and into which modules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from peft.tuners.tuners_utils import BaseTunerLayer

from prefixtune_cli.adapter.layer import WHY_NOT_MERGED
from prefixtune_cli.merge_info.base import Base
from prefixtune_cli.merge_info.saved import LORA, PREFIX_TUNING_PLUS, SavedAdapter
from prefixtune_cli.merge_info.trained import trained


@dataclass(frozen=True)
class Folding:
    """Whether the base's weights can take the adapter in.

    Attributes:
        possible: None where that cannot be told without the base.
        reason: in one or two lines.
        modules: the names of the modules that it goes into, and how many there are of each.
        kinds: their classes, likewise; empty where the base is unknown.
    """

    possible: bool | None
    reason: tuple[str, ...]
    modules: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)


def folding(adapter: SavedAdapter, base: Base | None) -> Folding:
    """Tell whether the adapter can be folded into its base, which is None where it is unknown."""
    if adapter.method == PREFIX_TUNING_PLUS:
        why, _, _ = WHY_NOT_MERGED.partition(". ")
        return Folding(
            False,
            (f"{why}.", "It stays beside the base; adapters of equal φ can be merged into one."),
        )
    if adapter.config.is_prompt_learning:
        return Folding(
            False,
            (
                "Its vectors are tokens of every sequence and lie in the KV cache: no weight of the base gives them.",
            ),
        )
    if base is not None and base.expected is not None:
        return _by_layers(base, adapter.method)
    if adapter.method == LORA:
        names = Counter(place.rpartition(".")[2] for place in trained(adapter))
        return Folding(True, ("W + B·A·scale is a matrix of W's shape.",), dict(names))
    return Folding(
        None, (f"Without its base, it cannot be told whether peft folds {adapter.method}.",)
    )


def _by_layers(base: Base, method: str) -> Folding:
    if not base.layers:
        return Folding(False, (f"peft has no merge for {method}.",))
    fixed = {
        kind.__name__ for kind, _ in base.layers.values() if kind.merge is BaseTunerLayer.merge
    }
    if fixed:
        return Folding(False, (f"peft has no merge for its layers ({', '.join(sorted(fixed))}).",))
    return Folding(
        True,
        ("peft writes it into the modules' own weights.",),
        dict(Counter(name.rpartition(".")[2] for name in base.layers)),
        dict(Counter(kind for _, kind in base.layers.values())),
    )

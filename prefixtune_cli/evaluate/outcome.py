"""What an evaluation found: the lines of its table, and what is written to eval/<bench>.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.evaluate.paired import Interval, PairedDifference

BASE = "base"


@dataclass(frozen=True)
class Line:
    """One metric on one set of items, of every model that was evaluated.

    Attributes:
        name: the task, group or data that was evaluated, as in `mmlu_anatomy`.
        metric: as its home calls it, as in `acc` or `exact_match,strict-match`.
        items: how many items the figures are of.
        values: model → figure, the base under BASE.
        differences: adapter → its figure less the base's, item by item; empty without a base.
        intervals: model → 95 % interval of its own figure, where there is no base to compare with.
        higher_is_better: None where neither is.
        percent: the figure is a fraction, and shown in percent.
        depth: how deep the line is in a group; 0 is the benchmark itself.
        folded: it is shown with --all alone.
    """

    name: str
    metric: str
    items: int
    values: Mapping[str, float]
    differences: Mapping[str, PairedDifference] = field(default_factory=dict)
    intervals: Mapping[str, Interval] = field(default_factory=dict)
    higher_is_better: bool | None = True
    percent: bool = False
    depth: int = 0
    folded: bool = False

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "metric": self.metric,
            "items": self.items,
            "higher_is_better": self.higher_is_better,
            "depth": self.depth,
            "values": dict(self.values),
            "differences": {name: d.to_json() for name, d in self.differences.items()},
            "intervals": {name: i.to_json() for name, i in self.intervals.items()},
        }


@dataclass(frozen=True)
class Outcome:
    """One benchmark's result.

    Attributes:
        bench: its name, as typed; results go to <bench>.json.
        lines: the table.
        record: what the JSON holds beside the lines: settings, versions, data, items.
        notices: what a reader of the table should know, such as the rule of exact match.
        files: file name → content, or a function that writes it, for files beside the JSON.
    """

    bench: str
    lines: list[Line]
    record: dict[str, Any]
    notices: tuple[str, ...] = ()
    files: Mapping[str, str | Callable[[Path], object]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "lines": [line.to_json() for line in self.lines],
            **self.record,
        }

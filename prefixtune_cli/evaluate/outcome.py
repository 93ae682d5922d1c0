"""The result of an evaluation: the lines of its table, and the content of eval/<bench>.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.evaluate.paired import Interval, PairedDifference

BASE = "base"


@dataclass(frozen=True)
class Line:
    """One metric on one set of items, for every model that was evaluated.

    Attributes:
        name: the task, group or data, such as `mmlu_anatomy`.
        metric: under the name that its source gives it, such as `acc` or `exact_match,strict-match`.
        items: the number of items.
        values: model → figure; the base is under BASE.
        differences: adapter → its figure minus the base's, item by item; empty without a base.
        intervals: model → the 95 % interval of its own figure, if there is no base to compare with.
        higher_is_better: None if neither direction is better.
        percent: whether the figure is a fraction, to be shown in percent.
        depth: how deep the line is in a group; 0 is the benchmark itself.
        folded: whether it is shown only with --all.
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
        record: the rest of the JSON: settings, versions, data, items.
        notices: what a reader of the table should know, such as the rule for exact match.
        files: further files, as file name → content, or → a function that writes the file.
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

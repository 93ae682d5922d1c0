"""What a comparison found: the content of results.json, from which table, pictures and report are made.

A comparison has contestants, which are methods with their settings. A contestant has cells, one run for each seed. A
cell has results, one for each data set; a cell that failed has none and says why. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from prefixtune_cli.compare.metrics import Cost
from prefixtune_cli.recipe.schema import Kind, kind_of

BASE = "base"
TEST, OOD, FORGETTING = "test", "ood", "forgetting"


@dataclass(frozen=True)
class Result:
    """What one model did on one data set.

    The rows are the same, in the same order, for every model of a comparison. A run that kept no losses of its rows
    has their mean in `nats`, as one row of one token; `right` has all rows even then. Of pairs of answers, `nats` and
    `tokens` are those of the chosen answers; a run that kept no figures of its pairs has their means, as one pair.

    Attributes:
        nats: the cross-entropy of each row, summed over its predicted tokens.
        tokens: the number of predicted tokens of each row.
        right: whether each row's answer is right; None where answers are long, or there are none.
        kind: what the rows are; `answers` also for pairs and labelled answers, if the model did not learn from such.
        losses: the objective's loss of each pair, in nats, or of each labelled answer; None where it is not known.
        ahead: 1 for each pair whose chosen answer has the higher reward, else 0; for each desirable answer the fraction
            of the undesirable ones with a lower reward. None where it is not known, as for the base of DPO and KTO,
            which rewards nothing.
    """

    nats: Sequence[float]
    tokens: Sequence[int]
    right: Sequence[bool] | None = None
    kind: Kind = "answers"
    losses: Sequence[float] | None = None
    ahead: Sequence[float] | None = None

    @property
    def loss(self) -> float:
        """Mean cross-entropy in nats a token."""
        return sum(self.nats) / sum(self.tokens)

    @property
    def exact_match(self) -> float | None:
        """The fraction of right answers."""
        return _mean(self.right)

    @property
    def preference_loss(self) -> float | None:
        """Mean loss of the objective: in nats a pair, or of a labelled answer."""
        return _mean(self.losses)

    @property
    def chosen_ahead(self) -> float | None:
        """The fraction of the pairs whose chosen, or desirable, answer has the higher reward."""
        return _mean(self.ahead)

    def each(self, figure: str) -> Sequence[float]:
        """One value for each row; their mean is the figure of this name, which must be known."""
        if figure == "loss":
            a_row = sum(self.tokens) / len(self.tokens)
            return [nats / a_row for nats in self.nats]
        kept = {
            "exact_match": self.right,
            "preference_loss": self.losses,
            "chosen_ahead": self.ahead,
        }
        values = kept[figure]
        assert values is not None
        return values


def _mean(values: Sequence[float] | None) -> float | None:
    return None if values is None else sum(values) / len(values)


@dataclass(frozen=True)
class Cell:
    """One run: a contestant with one seed.

    Attributes:
        run: its run directory.
        steps: optimizer steps.
        failure: why it has no results.
        results: by data set: TEST, OOD, FORGETTING.
        losses: (step, training loss in nats a token), as logged.
    """

    seed: int
    run: str
    steps: int | None = None
    failure: str | None = None
    results: Mapping[str, Result] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()


@dataclass(frozen=True)
class Point:
    """One learning rate of a sweep, with its figures on the validation rows, or with `failure`, which says why not."""

    learning_rate: float
    loss: float | None
    exact_match: float | None
    run: str
    failure: str | None = None


@dataclass(frozen=True)
class Contestant:
    """A method with its settings.

    Attributes:
        label: its name, as in `lora` or `prefix-tuning-plus elu`; no other contestant has it.
        method: adapter.method of its recipes.
        settings: the recipe keys in which it differs from its method's defaults, as in {"adapter.feature_map": "elu"}.
        learning_rate: its cells were trained with it.
        trainable_parameters, adapter_bytes: of one cell; None where none finished.
        sweep: the learning rates that were tried; empty where there was one alone.
    """

    label: str
    method: str
    settings: Mapping[str, Any]
    learning_rate: float | None
    trainable_parameters: int | None
    adapter_bytes: int | None
    cells: Sequence[Cell]
    sweep: Sequence[Point] = ()
    cost: Cost | None = None

    def results(self, data: str = TEST) -> list[Result]:
        """The results on `data` of the cells that have one, in the order of the seeds."""
        return [cell.results[data] for cell in self.cells if data in cell.results]

    @property
    def failures(self) -> list[str]:
        return [cell.failure for cell in self.cells if cell.failure is not None]


@dataclass(frozen=True)
class Group:
    """Contestants whose costs were measured beside each other, on one base and at one shape.

    Attributes:
        base: label of its base, as in `base max_length=128`.
        base_cost: the ratios of the contestants' costs are to it; None where it was not measured.
        contestants: their labels.
    """

    base: str
    base_cost: Cost | None
    contestants: Sequence[str]


@dataclass(frozen=True)
class Comparison:
    """A whole comparison.

    Attributes:
        name: of its folder under compare/.
        kind: the command `trained` the cells, or read finished `runs`, or measured `speed` alone.
        command: as the user typed it.
        created: UTC, ISO 8601.
        model: name, revision and bits of the base, and its parameters where known.
        data: data set (`train`, `validation`, TEST, OOD, FORGETTING, or another name) → source, rows, sha256, and
            `same_rows`: false where the contestants were judged on different rows, which cannot be paired.
        protocol: what all contestants shared: steps, batch, seeds, sweep, few_shot, schedule; and of runs on
            preferences, what they share of `objective`, `beta` and the objective's own settings.
        environment: versions and hardware.
        base: the base's results by data set; empty where it was not judged.
        contestants: the others are compared with the first.
        base_cost: what the base costs; None where `groups` have the costs of several bases.
        unmeasured: label → why it has no cost; the label of a group's base stands for the whole group.
        groups: where costs were measured on several bases or at several shapes; contestants are in the groups' order.
        notices: what a reader has to know, such as differences that --anyway passed over.
    """

    name: str
    kind: Literal["trained", "runs", "speed"]
    command: str
    created: str
    model: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]
    protocol: Mapping[str, Any]
    environment: Mapping[str, Any]
    base: Mapping[str, Result]
    contestants: Sequence[Contestant]
    base_cost: Cost | None = None
    notices: Sequence[str] = ()
    unmeasured: Mapping[str, str] = field(default_factory=dict)
    groups: Sequence[Group] = ()

    @property
    def learned_from(self) -> Kind:
        """What the contestants were trained on."""
        kinds = (result.kind for c in self.contestants for result in c.results())
        found = next((kind for kind in kinds if kind != "answers"), None)
        return found or kind_of(self.protocol.get("objective"))

    @property
    def measured_together(self) -> Sequence[Group]:
        """The groups; without any, one group of all contestants."""
        return self.groups or [Group(BASE, self.base_cost, [c.label for c in self.contestants])]

    def lora_of(self, group: Group) -> Contestant | None:
        """The group's first LoRA, to which ratios are taken; None where it has none."""
        members = (c for c in self.contestants if c.label in group.contestants)
        return next((c for c in members if c.method == "lora"), None)

    @property
    def failed(self) -> bool:
        """Whether some cell has no result, or some contestant no cost that was asked for."""
        return bool(self.unmeasured) or any(c.failures for c in self.contestants)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Comparison:
        return TypeAdapter(cls).validate_python(found)

    @classmethod
    def read(cls, file: Path) -> Comparison:
        """Read a results.json."""
        return cls.from_json(json.loads(file.read_text(encoding="utf-8")))

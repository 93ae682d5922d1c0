"""Held-out pairs of answers: how often, and by how much, a model prefers the chosen one to the rejected one.

A model prefers the answer that is likelier to it. What training has added is the implicit reward
β·(log π(y|x) − log π₀(y|x)) of an answer y to a prompt x, with π the adapted model and π₀ its base (Rafailov et al.
2023, arXiv 2305.18290).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.evaluate.held_out import shared_losses
from prefixtune_cli.evaluate.paired import (
    Floats,
    Interval,
    PairedDifference,
    mean_difference,
    mean_interval,
)
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import EvaluateSection

BASE_LOSS = math.log(2)  # of DPO, where the adapter is its base


class Likelihoods(NamedTuple):
    """The log-probabilities of both answers of every pair, in nats [pairs]."""

    chosen: Floats
    rejected: Floats


@dataclass(frozen=True)
class Preference:
    """What one model prefers.

    Attributes:
        accuracy: fraction of the pairs whose chosen answer is likelier to it.
        chosen, rejected: mean log-probability of an answer, in nats.
    """

    accuracy: float
    chosen: float
    rejected: float


@dataclass(frozen=True)
class Preferences:
    """What base and adapter prefer on the same held-out pairs.

    Attributes:
        base, adapter: of each.
        accuracy_difference: the adapter's accuracy less the base's.
        reward_accuracy: fraction of the pairs whose chosen answer has the higher reward; `reward_interval` is its own.
        margin: the mean by which the chosen answer's reward is above the rejected one's; `margin_interval` is its own.
        loss: DPO's, in nats a pair.
    """

    pairs: int
    beta: float
    base: Preference
    adapter: Preference
    accuracy_difference: PairedDifference
    reward_accuracy: float
    reward_interval: Interval
    margin: float
    margin_interval: Interval
    loss: float

    @property
    def both_fell(self) -> bool:
        """Whether training has made not the rejected answers alone less likely, but the chosen ones as well."""
        base, adapter = self.base, self.adapter
        return adapter.chosen < base.chosen and adapter.rejected < base.rejected

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_json(cls, found: dict[str, Any]) -> Preferences:
        """What `to_json` gave."""
        parts: dict[str, Any] = {
            "base": Preference,
            "adapter": Preference,
            "accuracy_difference": PairedDifference,
            "reward_interval": Interval,
            "margin_interval": Interval,
        }
        return cls(**{k: parts[k](**v) if k in parts else v for k, v in found.items()})


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    section: EvaluateSection,
    *,
    name: str,
    processes: Processes,
    reporter: Reporter,
) -> Likelihoods:
    """One model's log-probabilities of the answers; the arguments are those of `held_out.score`.

    Args:
        pairs: `input_ids` and `labels` of the chosen answers, `rejected_ids` and `rejected_labels` of the others.
    """
    columns = (("input_ids", "labels"), ("rejected_ids", "rejected_labels"))
    rows = [
        {"input_ids": ids, "labels": labels}
        for side in columns
        for ids, labels in zip(*(pairs[column] for column in side), strict=True)
    ]
    task = f"log-probabilities of the {name}"
    losses = shared_losses(model, tokenizer, rows, section, task, processes, reporter)
    found = -np.array([nats for nats, _ in losses])
    return Likelihoods(found[: len(pairs)], found[len(pairs) :])


def compared(base: Likelihoods, adapter: Likelihoods, beta: float) -> Preferences:
    """The adapter against its base, on the same pairs."""
    margins = beta * ((adapter.chosen - base.chosen) - (adapter.rejected - base.rejected))
    of_base, of_adapter, rewarded = (
        np.asarray(found > 0, dtype=np.float64)
        for found in (base.chosen - base.rejected, adapter.chosen - adapter.rejected, margins)
    )

    def preference(hits: Floats, found: Likelihoods) -> Preference:
        return Preference(*(float(values.mean()) for values in (hits, *found)))

    return Preferences(
        pairs=len(margins),
        beta=beta,
        base=preference(of_base, base),
        adapter=preference(of_adapter, adapter),
        accuracy_difference=mean_difference([of_base], [of_adapter]),
        reward_accuracy=float(rewarded.mean()),
        reward_interval=mean_interval([rewarded]),
        margin=float(margins.mean()),
        margin_interval=mean_interval([margins]),
        loss=float(np.logaddexp(0, -margins).mean()),
    )

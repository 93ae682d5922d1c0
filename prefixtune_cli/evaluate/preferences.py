"""Held-out pairs of answers: how often, and by how much, a model prefers the chosen one to the rejected one.

A model prefers the answer that is likelier to it. For DPO, what training has added is the implicit reward
β·(log π(y|x) − log π₀(y|x)) of an answer y to a prompt x, with π the adapted model and π₀ the reference: its base, or
the adapter that training went on from (Rafailov et al. 2023, arXiv 2305.18290). For SimPO, the reward is
β·log π(y|x)/|y|, with |y| the tokens of the answer (Meng et al. 2024, arXiv 2405.14734), so all log-probabilities are
those per token.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from prefixtune_cli.evaluate.paired import (
    Floats,
    Interval,
    PairedDifference,
    mean_difference,
    mean_interval,
)

BASE_LOSS = math.log(2)  # of DPO, where the adapter is the reference


class Likelihoods(NamedTuple):
    """The log-probabilities of both answers of every pair, in nats [pairs]."""

    chosen: Floats
    rejected: Floats


@dataclass(frozen=True)
class Preference:
    """What one model prefers.

    Attributes:
        accuracy: fraction of the pairs whose chosen answer is likelier to it; for SimPO, per token.
        chosen, rejected: mean log-probability of an answer, in nats; for SimPO, per token.
    """

    accuracy: float
    chosen: float
    rejected: float

    @classmethod
    def of(cls, found: Likelihoods) -> Preference:
        """What a model with these log-probabilities prefers."""
        likelier = hits(found.chosen - found.rejected)
        return cls(*(float(values.mean()) for values in (likelier, *found)))

    def has_both_below(self, other: Preference) -> bool:
        """Whether not the rejected answers alone are less likely than to the other, but the chosen ones as well."""
        return self.chosen < other.chosen and self.rejected < other.rejected


@dataclass(frozen=True)
class Preferences:
    """What base and adapter prefer on the same held-out pairs.

    Attributes:
        base, adapter: of each.
        start: of the adapter that training went on from, which is then the reference; None if it began with a fresh
            one, whose reference is the base.
        accuracy_difference: the adapter's accuracy less the reference's.
        reward_accuracy: fraction of the pairs whose chosen answer has the higher reward; `reward_interval` is its own.
        margin: the mean by which the chosen answer's reward is above the rejected one's; `margin_interval` is its own.
        loss: the objective's, in nats a pair.
        reference_loss: the reference's.
        gamma: γ of SimPO; None for DPO.
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
    start: Preference | None = None
    reference_loss: float = BASE_LOSS
    gamma: float | None = None

    @property
    def reference(self) -> Preference:
        """What the adapter is compared with."""
        return self.start or self.base

    @property
    def compared_with(self) -> str:
        """The name of the reference."""
        return "base" if self.start is None else "start"

    @property
    def of_simpo(self) -> bool:
        """Whether the objective is SimPO, whose log-probabilities are per token and whose reward has no reference."""
        return self.gamma is not None

    @property
    def is_ahead(self) -> bool:
        """Whether training has brought the chosen answers ahead in more pairs than it has set back."""
        return self.accuracy_difference.value > 0 if self.of_simpo else self.reward_accuracy > 0.5

    @property
    def both_fell(self) -> bool:
        """Whether training has made not the rejected answers alone less likely, but the chosen ones as well."""
        return self.adapter.has_both_below(self.reference)

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
            "start": Preference,
        }
        return cls(**{k: parts[k](**v) if k in parts and v else v for k, v in found.items()})


def compared(
    base: Likelihoods,
    adapter: Likelihoods,
    beta: float,
    start: Likelihoods | None = None,
    gamma: float | None = None,
) -> Preferences:
    """The adapter against its reference, on the same pairs.

    Args:
        base, adapter: their log-probabilities; for SimPO, per token.
        beta: β.
        start: the reference's; None if that is the base.
        gamma: γ of SimPO; None for DPO.
    """
    before = base if start is None else start

    of_dpo = gamma is None
    margins = reward_margins(adapter, beta, before if of_dpo else None)
    rewarded = hits(margins)

    return Preferences(
        pairs=len(margins),
        beta=beta,
        base=Preference.of(base),
        start=None if start is None else Preference.of(start),
        adapter=Preference.of(adapter),
        accuracy_difference=mean_difference(
            [hits(before.chosen - before.rejected)], [hits(adapter.chosen - adapter.rejected)]
        ),
        reward_accuracy=float(rewarded.mean()),
        reward_interval=mean_interval([rewarded]),
        margin=float(margins.mean()),
        margin_interval=mean_interval([margins]),
        loss=float(losses(margins, gamma).mean()),
        reference_loss=BASE_LOSS
        if of_dpo
        else float(losses(reward_margins(before, beta), gamma).mean()),
        gamma=gamma,
    )


def reward_margins(found: Likelihoods, beta: float, reference: Likelihoods | None = None) -> Floats:
    """By how much the reward of each chosen answer is above the rejected one's [pairs].

    Args:
        found: log-probabilities; for SimPO, per token.
        beta: β.
        reference: the reference's, for DPO; None for SimPO.
    """
    ahead = found.chosen - found.rejected
    before = 0.0 if reference is None else reference.chosen - reference.rejected
    return beta * (ahead - before)


def losses(margins: Floats, gamma: float | None = None) -> Floats:
    """The objective's loss of each pair, in nats; `gamma` is SimPO's."""
    return np.logaddexp(0, (gamma or 0.0) - margins)


def hits(found: Floats) -> Floats:
    """1 where the chosen answer is ahead, 0 elsewhere."""
    return np.asarray(found > 0, dtype=np.float64)

"""Held-out pairs of answers: how often, and by how much, a model prefers the chosen one to the rejected one.

A model prefers the answer that is likelier to it. What an objective rewards is another thing, see `Objective`. Answers
that are labelled one by one are in labelled.py.
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
from prefixtune_cli.recipe.schema import WITH_REFERENCE, TrainSection

BASE_LOSS = math.log(2)  # of DPO, where the adapter is the reference
TITLES = {"dpo": "DPO", "simpo": "SimPO", "orpo": "ORPO", "kto": "KTO"}
CERTAIN = (
    -1e-7
)  # the highest log-probability per token whose odds are taken: those of certainty are infinite


class Likelihoods(NamedTuple):
    """The log-probabilities of both answers of every pair, in nats [pairs].

    Of labelled answers [rows], `chosen` are their own, and `rejected` those of the answers to other prompts.
    """

    chosen: Floats
    rejected: Floats


@dataclass(frozen=True)
class Objective:
    """What is learned from pairs of a chosen answer y⁺ and a rejected one y⁻ to a prompt x, or from labelled answers.

    With π the adapted model, π₀ the reference, which is the base or the adapter that training went on from, and |y| the
    tokens of an answer, the reward r of an answer and the loss of a pair are

        dpo     r = β·log π(y|x)/π₀(y|x)      −log σ(r⁺ − r⁻)                  (Rafailov et al. 2023, arXiv 2305.18290)
        simpo   r = β·log π(y|x)/|y|          −log σ(r⁺ − r⁻ − γ)              (Meng et al. 2024, arXiv 2405.14734)
        orpo    r = log p/(1 − p)             −log p⁺ − β·log σ(r⁺ − r⁻)       (Hong et al. 2024, arXiv 2403.07691)

    where log p = log π(y|x)/|y|. The last two have no reference, and take log-probabilities per token. With labels, and
    z, which is the mean reward of answers y′ to other prompts, β·log π(y′|x)/π₀(y′|x), but at least 0, the loss of an
    answer is

        kto     r = β·log π(y|x)/π₀(y|x)      λ_D·σ(z − r) if it is desirable, else λ_U·σ(r − z)
                                              (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7)

    Attributes:
        weights: λ_D and λ_U.
    """

    name: str
    beta: float
    gamma: float = 0.0
    weights: tuple[float, float] = (1.0, 1.0)

    @classmethod
    def of(cls, train: TrainSection) -> Objective:
        """The objective of a run on preferences."""
        gamma = train.gamma if train.objective == "simpo" else 0.0
        weights = (train.desirable_weight, train.undesirable_weight)
        return cls(train.objective, train.beta, gamma, weights)

    @property
    def has_reference(self) -> bool:
        return self.name in WITH_REFERENCE

    @property
    def is_per_token(self) -> bool:
        return not self.has_reference

    def margins(self, found: Likelihoods, reference: Likelihoods | None = None) -> Floats:
        """By how much the reward of each chosen answer is above the rejected one's, r⁺ − r⁻ [pairs].

        Args:
            found: the model's log-probabilities, per token where the objective takes such.
            reference: the reference's, where the objective has one.
        """
        if self.name == "orpo":
            return log_odds(found.chosen) - log_odds(found.rejected)
        margins = self.beta * (found.chosen - found.rejected)
        return margins if reference is None else margins - self.margins(reference)

    def losses(self, found: Likelihoods, reference: Likelihoods | None = None) -> Floats:
        """The loss of each pair, in nats; the arguments are those of `margins`."""
        margins = self.margins(found, reference)
        if self.name == "orpo":
            return self.beta * np.logaddexp(0, -margins) - found.chosen
        return np.logaddexp(0, self.gamma - margins)


def log_odds(log_p: Floats) -> Floats:
    """log p/(1 − p)."""
    known = np.minimum(log_p, CERTAIN)
    return known - np.log(-np.expm1(known))


@dataclass(frozen=True)
class Preference:
    """What one model prefers. Of labelled answers, the desirable ones are those chosen, and the others those rejected.

    Attributes:
        accuracy: fraction of the pairs whose chosen answer is likelier to it; by SimPO and ORPO, per token. Of labelled
            answers, every desirable one makes a pair with every other one, likelier per token.
        chosen, rejected: mean log-probability of an answer, in nats; by SimPO and ORPO, per token.
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
    """What base and adapter prefer on the same held-out pairs, or on the same labelled answers, see `Preference`.

    Attributes:
        pairs: their number; of labelled answers, that of answers.
        objective: its name; `beta` is its β, and `gamma` SimPO's γ.
        base, adapter: of each.
        start: of the adapter that training went on from, which is then the reference; None if it began with a fresh
            one, whose reference is the base.
        accuracy_difference: the adapter's accuracy less the reference's.
        reward_accuracy: fraction of the pairs whose chosen answer has the higher reward; `reward_interval` is its own.
        margin: the mean by which the chosen answer's reward is above the rejected one's; `margin_interval` is its own.
        loss: the objective's, in nats a pair; KTO's has no unit.
        reference_loss: the reference's.
    """

    pairs: int
    objective: str
    beta: float
    gamma: float
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

    @property
    def reference(self) -> Preference:
        """What the adapter is compared with."""
        return self.start or self.base

    @property
    def compared_with(self) -> str:
        """The name of the reference."""
        return "base" if self.start is None else "start"

    @property
    def title(self) -> str:
        """The objective as it is written."""
        return TITLES[self.objective]

    @property
    def of_labelled(self) -> bool:
        """Whether the answers are labelled one by one, and not pairs."""
        return self.objective == "kto"

    @property
    def rows(self) -> str:
        """What there are `pairs` of."""
        return "labelled answers" if self.of_labelled else "pairs of answers"

    @property
    def words(self) -> tuple[str, str]:
        """What the better and the worse answers are called."""
        return ("desirable", "undesirable") if self.of_labelled else ("chosen", "rejected")

    @property
    def is_per_token(self) -> bool:
        """Whether log-probabilities are per token, and rewards have no reference."""
        return Objective(self.objective, self.beta, self.gamma).is_per_token

    @property
    def is_ahead(self) -> bool:
        """Whether training has brought the chosen answers ahead in more pairs than it has set back."""
        return (
            self.accuracy_difference.value > 0 if self.is_per_token else self.reward_accuracy > 0.5
        )

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
        # Runs from before ORPO do not name their objective, and SimPO's alone have a gamma.
        before = {"objective": "dpo" if found.get("gamma") is None else "simpo", "gamma": 0.0}
        known = before | {k: v for k, v in found.items() if v is not None}
        return cls(**{k: parts[k](**v) if k in parts else v for k, v in known.items()})


def compared(
    base: Likelihoods,
    adapter: Likelihoods,
    objective: Objective,
    start: Likelihoods | None = None,
) -> Preferences:
    """The adapter against its reference, on the same pairs.

    Args:
        base, adapter: their log-probabilities, per token where the objective takes such.
        objective: what was learned.
        start: those of the adapter that training went on from; None if it began with a fresh one.
    """
    before = base if start is None else start
    reference = before if objective.has_reference else None
    margins = objective.margins(adapter, reference)
    rewarded = hits(margins)

    return Preferences(
        pairs=len(margins),
        beta=objective.beta,
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
        loss=float(objective.losses(adapter, reference).mean()),
        reference_loss=float(objective.losses(before, reference).mean()),
        objective=objective.name,
        gamma=objective.gamma,
    )


def hits(found: Floats) -> Floats:
    """1 where the chosen answer is ahead, 0 elsewhere."""
    return np.asarray(found > 0, dtype=np.float64)

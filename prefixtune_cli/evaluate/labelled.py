"""Held-out answers that are labelled desirable or not: how a model tells the ones from the others, and KTO's loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.evaluate.paired import (
    Floats,
    Interval,
    PairedDifference,
    mean_difference,
    mean_interval,
)
from prefixtune_cli.evaluate.preferences import Likelihoods, Objective, Preference, Preferences

Labels = NDArray[np.bool_]


def rewards(objective: Objective, found: Likelihoods, reference: Likelihoods) -> Floats:
    """r − z of each answer [rows]: its implicit reward above that of answers to other prompts, see `Objective`.

    Args:
        objective: KTO.
        found: the model's log-probabilities of the answers, and of the answers to other prompts, in nats.
        reference: the reference's.
    """
    others = max(0.0, float((found.rejected - reference.rejected).mean()))
    above: Floats = objective.beta * (found.chosen - reference.chosen - others)
    return above


def losses(objective: Objective, above: Floats, desirable: Labels) -> Floats:
    """KTO's loss of each answer [rows], from `rewards`."""
    of_desirable, of_others = objective.weights
    # σ(x) = exp(−log(1 + exp(−x)))
    found: Floats = np.where(
        desirable,
        of_desirable * np.exp(-np.logaddexp(0, above)),
        of_others * np.exp(-np.logaddexp(0, -above)),
    )
    return found


class Auc:
    """In how many of the pairs of a desirable answer and another one the desirable one has the higher score.

    Equal scores count as half. The fraction is the area under the ROC curve. The intervals draw the answers of each
    label, each with the part of the pairs that it wins (DeLong, DeLong & Clarke-Pearson 1988). To first order, such
    draws have the spread of the fraction.

    Args:
        score: of each answer [rows].
        desirable: the labels [rows]; both occur.

    Attributes:
        ahead: for each desirable answer, the fraction of the others with a lower score [desirable answers].
        value: the fraction, which is the mean of `ahead`.
    """

    def __init__(self, score: Floats, desirable: Labels) -> None:
        self.ahead = _above(score[desirable], score[~desirable])
        self.value = float(self.ahead.mean())
        behind = _above(-score[~desirable], -score[desirable])
        # The mean of both strata, which count alike, is the sum of both means less the value.
        self._strata = [2 * won - self.value for won in (self.ahead, behind)]

    @property
    def interval(self) -> Interval:
        return mean_interval(self._strata, weights=[1, 1])

    def difference(self, base: Auc) -> PairedDifference:
        """This less that of the base, on the same answers."""
        return mean_difference(base._strata, self._strata, weights=[1, 1])


def _above(scores: Floats, others: Floats) -> Floats:
    """For each score the fraction of the others that are lower; equal ones count as half."""
    ordered = np.sort(others)
    below, upto = (np.searchsorted(ordered, scores, side=s) for s in ("left", "right"))
    found: Floats = (below + upto) / (2 * len(others))
    return found


def compared(
    base: Likelihoods,
    adapter: Likelihoods,
    objective: Objective,
    desirable: Labels,
    tokens: Floats,
    start: Likelihoods | None = None,
) -> Preferences:
    """The adapter against its reference, on the same answers.

    Args:
        base, adapter: their log-probabilities.
        objective: KTO.
        desirable: the labels [rows]; both occur.
        tokens: the numbers of tokens of the answers [rows].
        start: those of the adapter that training went on from; None if it began with a fresh one.
    """
    before = base if start is None else start

    def likelier(found: Likelihoods) -> Auc:
        return Auc(found.chosen / tokens, desirable)

    def preference(found: Likelihoods) -> Preference:
        means = (float(found.chosen[kind].mean()) for kind in (desirable, ~desirable))
        return Preference(likelier(found).value, *means)

    above = rewards(objective, adapter, before)
    rewarded = Auc(above, desirable)
    none = rewards(objective, before, before)
    return Preferences(
        pairs=len(desirable),
        objective=objective.name,
        beta=objective.beta,
        gamma=objective.gamma,
        base=preference(base),
        start=None if start is None else preference(start),
        adapter=preference(adapter),
        accuracy_difference=likelier(adapter).difference(likelier(before)),
        reward_accuracy=rewarded.value,
        reward_interval=rewarded.interval,
        margin=float(above[desirable].mean() - above[~desirable].mean()),
        # The mean of both strata, which count alike, is half of their sum.
        margin_interval=mean_interval(
            [2 * above[desirable], -2 * above[~desirable]], weights=[1, 1]
        ),
        loss=float(losses(objective, above, desirable).mean()),
        reference_loss=float(losses(objective, none, desirable).mean()),
    )

"""Held-out answers that are labelled desirable or not: how a model tells the ones from the others, and KTO's loss."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.evaluate.paired import (
    Floats,
    aggregate_difference,
    aggregate_interval,
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


def auc(items: Floats) -> float:
    """The fraction of pairs of a desirable answer and another one in which the desirable one has the higher score.

    Equal scores count as half. It is the area under the ROC curve (Mann & Whitney 1947).

    Args:
        items: score and label, 1 if desirable, of each answer [rows, 2]; with one label alone, the figure is 0.5.
    """
    desirable = items[:, 1] == 1
    if desirable.all() or not desirable.any():
        return 0.5
    return float(ahead(items[:, 0], desirable).mean())


def ahead(score: Floats, desirable: Labels) -> Floats:
    """For each desirable answer, the fraction of the others with a lower score; equal ones count as half.

    Their mean is the `auc`.
    """
    others = np.sort(score[~desirable])
    below, upto = (np.searchsorted(others, score[desirable], side=s) for s in ("left", "right"))
    found: Floats = (below + upto) / (2 * len(others))
    return found


def labelled(score: Floats, desirable: Labels) -> Floats:
    """Scores with their labels, as `auc` takes them [rows, 2]."""
    return np.column_stack([score, desirable.astype(float)])


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

    def likelier(found: Likelihoods) -> Floats:
        return labelled(found.chosen / tokens, desirable)

    def preference(found: Likelihoods) -> Preference:
        means = (float(found.chosen[kind].mean()) for kind in (desirable, ~desirable))
        return Preference(auc(likelier(found)), *means)

    above = rewards(objective, adapter, before)
    rewarded = labelled(above, desirable)
    none = rewards(objective, before, before)
    return Preferences(
        pairs=len(desirable),
        objective=objective.name,
        beta=objective.beta,
        gamma=objective.gamma,
        base=preference(base),
        start=None if start is None else preference(start),
        adapter=preference(adapter),
        accuracy_difference=aggregate_difference(likelier(before), likelier(adapter), auc),
        reward_accuracy=auc(rewarded),
        reward_interval=aggregate_interval(rewarded, auc),
        margin=float(above[desirable].mean() - above[~desirable].mean()),
        # The mean of both strata, which count alike, is half of their sum.
        margin_interval=mean_interval(
            [2 * above[desirable], -2 * above[~desirable]], weights=[1, 1]
        ),
        loss=float(losses(objective, above, desirable).mean()),
        reference_loss=float(losses(objective, none, desirable).mean()),
    )

"""Labelled answers: KTO's loss by hand, and how a model tells desirable answers from others."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from prefixtune_cli.evaluate.labelled import Auc, compared, losses, rewards
from prefixtune_cli.evaluate.preferences import Likelihoods, Objective, Preferences
from prefixtune_cli.recipe.schema import TrainSection

KTO = Objective("kto", 0.5, weights=(1.0, 2.0))
LABELS = np.array([True, False, True])
TOKENS = np.array([1.0, 2.0, 4.0])
# Own answers, and answers to other prompts.
BASE = Likelihoods(np.array([-4.0, -4.0, -6.0]), np.array([-5.0, -5.0, -5.0]))
ADAPTER = Likelihoods(np.array([-2.0, -7.0, -5.0]), np.array([-4.0, -3.0, -5.0]))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_the_loss_is_that_of_the_paper() -> None:
    above = rewards(KTO, ADAPTER, BASE)
    z = 0.5 * (1 + 2 + 0) / 3
    assert above == pytest.approx([1.0 - z, -1.5 - z, 0.5 - z])
    found = losses(KTO, above, LABELS)
    assert found == pytest.approx(
        [1 - sigmoid(1.0 - z), 2 * (1 - sigmoid(z + 1.5)), 1 - sigmoid(0.5 - z)]
    )


def test_what_answers_to_other_prompts_lost_is_not_taken_off() -> None:
    fallen = ADAPTER._replace(rejected=BASE.rejected - 3)
    assert rewards(KTO, fallen, BASE) == pytest.approx([1.0, -1.5, 0.5])


def test_the_area_is_that_of_sklearn_and_the_interval_holds_it_as_often_as_it_says() -> None:
    drawn = np.random.default_rng(0)
    scores, labels = drawn.integers(0, 9, 50).astype(float), drawn.random(50) < 0.3
    found = Auc(scores, labels)
    assert found.value == pytest.approx(roc_auc_score(labels, scores))
    # Of normal scores that are one deviation apart the area is Φ(1/√2).
    area, held = 0.5 * (1 + math.erf(0.5)), 0
    for _ in range(100):
        scores = np.concatenate([drawn.normal(1, 1, 40), drawn.normal(0, 1, 25)])
        ends = Auc(scores, np.arange(65) < 40).interval
        held += ends.low <= area <= ends.high
    assert 88 <= held <= 99


def test_the_interval_of_a_rare_label_is_not_wide_for_draws_without_it() -> None:
    labels = np.arange(60) < 3
    found = Auc(1.0 * labels + np.linspace(0, 0.5, 60), labels)
    assert (found.value, found.interval.low, found.interval.high) == (1, 1, 1)
    reverse = Auc(-1.0 * labels + np.linspace(0, 0.5, 60), labels)
    more = found.difference(reverse)
    assert (more.value, more.low, more.high) == (1, 1, 1)


def test_both_models_are_told_apart() -> None:
    found = compared(BASE, ADAPTER, KTO, LABELS, TOKENS)
    # Per token −4, −2, −1.5, and then −2, −3.5, −1.25; the second answer is the undesirable one.
    assert (found.base.accuracy, found.adapter.accuracy) == (0.5, 1.0)
    assert found.accuracy_difference.value == 0.5
    assert (found.base.chosen, found.base.rejected) == (-5.0, -4.0)
    assert (found.adapter.chosen, found.adapter.rejected) == (-3.5, -7.0)
    assert found.reward_accuracy == 1.0
    assert found.margin == pytest.approx(0.75 + 1.5)
    assert found.margin_interval.low <= found.margin <= found.margin_interval.high
    assert found.reference_loss == pytest.approx((0.5 + 2 * 0.5 + 0.5) / 3)
    assert found.loss == pytest.approx(losses(KTO, rewards(KTO, ADAPTER, BASE), LABELS).mean())
    assert found.words == ("desirable", "undesirable")
    assert found.is_ahead
    assert Preferences.of_json(found.to_json()) == found


def test_with_a_start_everything_is_against_it() -> None:
    found = compared(BASE, ADAPTER, KTO, LABELS, TOKENS, start=ADAPTER)
    assert found.start == found.adapter
    assert found.reference_loss == found.loss
    assert (found.margin, found.accuracy_difference.value, found.reward_accuracy) == (0, 0, 0.5)


def test_the_weights_are_those_of_the_recipe() -> None:
    section = TrainSection(objective="kto", desirable_weight=1.5, undesirable_weight=0.5)
    assert Objective.of(section).weights == (1.5, 0.5)

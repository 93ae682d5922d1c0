"""Preference accuracy, margin and DPO's loss: figures that can be worked out by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from datasets import Dataset

from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.evaluate.likelihoods import per_token
from prefixtune_cli.evaluate.preferences import (
    BASE_LOSS,
    Likelihoods,
    Objective,
    Preferences,
    compared,
)
from prefixtune_cli.recipe.schema import TrainSection

BASE = Likelihoods(np.array([-5.0, -4.0, -9.0, -2.0]), np.array([-4.0, -6.0, -3.0, -1.0]))
MORE = np.array([2.0, 1.0, -1.0, 3.0])  # by which the chosen answers are likelier to the adapter
ADAPTER = Likelihoods(BASE.chosen + MORE, BASE.rejected - np.array([1.0, -3.0, 0.0, 1.0]))


def of_dpo(beta: float) -> Objective:
    return Objective("dpo", beta)


HALF = of_dpo(0.5)


def test_both_prefer_what_is_likelier_and_the_reward_what_has_become_so() -> None:
    found = compared(BASE, ADAPTER, of_dpo(0.5))
    margins = [1.5, -1.0, -0.5, 2.0]
    # The chosen answers are behind by 1, ahead by 2, behind by 6 and behind by 1 for the base; then by 2, 0, −7 and 3.
    assert (found.base.accuracy, found.adapter.accuracy) == (0.25, 0.5)
    assert (found.accuracy_difference.value, found.pairs) == (0.25, 4)
    assert found.accuracy_difference.low <= 0.25 <= found.accuracy_difference.high
    assert found.reward_accuracy == 0.5
    assert found.reward_interval.low <= 0.5 <= found.reward_interval.high
    assert found.margin == pytest.approx(0.5)
    assert found.margin_interval.low < 0.5 < found.margin_interval.high
    losses = [-math.log(1 / (1 + math.exp(-margin))) for margin in margins]
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert (found.base.chosen, found.base.rejected) == (-5, -3.5)
    assert found.adapter.chosen == pytest.approx(-3.75)


def test_an_adapter_that_is_its_base_prefers_nothing() -> None:
    found = compared(BASE, BASE, of_dpo(0.1))
    assert (found.reward_accuracy, found.margin) == (0, 0)
    assert found.adapter.accuracy == found.base.accuracy == 0.25
    assert found.loss == pytest.approx(BASE_LOSS)


@pytest.mark.parametrize(
    ("chosen", "rejected", "fell"), [(-1, -2, True), (1, -2, False), (-1, 1, False)]
)
def test_only_where_both_answers_fell_it_is_said(chosen: int, rejected: int, fell: bool) -> None:
    adapter = Likelihoods(BASE.chosen + chosen, BASE.rejected + rejected)
    assert compared(BASE, adapter, of_dpo(0.1)).both_fell is fell


def test_with_a_start_everything_is_against_it() -> None:
    start = Likelihoods(BASE.chosen + 50, BASE.rejected - 50)
    against_base, found = compared(start, ADAPTER, HALF), compared(BASE, ADAPTER, HALF, start)
    assert (found.compared_with, against_base.compared_with) == ("start", "base")
    assert found.base == compared(BASE, ADAPTER, HALF).base
    assert found.start == found.reference == against_base.base
    for name in ("accuracy_difference", "reward_accuracy", "margin", "margin_interval", "loss"):
        assert getattr(found, name) == getattr(against_base, name), name
    assert found.loss != compared(BASE, ADAPTER, HALF).loss
    risen = Likelihoods(start.chosen - 1, start.rejected - 1)
    assert compared(BASE, risen, HALF, start).both_fell
    assert not compared(BASE, risen, HALF).both_fell


def test_by_simpo_the_reward_needs_no_reference_and_the_reference_has_a_loss() -> None:
    of_simpo = Objective("simpo", 0.5, 0.25)
    found = compared(BASE, ADAPTER, of_simpo)

    def loss(ahead: list[float]) -> float:
        return sum(math.log1p(math.exp(0.25 - 0.5 * x)) for x in ahead) / 4

    # The chosen answers are ahead by −1, 2, −6 and −1 for the base; then by 2, 0, −7 and 3.
    assert found.margin == pytest.approx(0.5 * -0.5)
    assert found.margin_interval.low < found.margin < found.margin_interval.high
    assert found.reward_accuracy == found.adapter.accuracy == 0.5
    assert found.loss == pytest.approx(loss([2, 0, -7, 3]))
    assert found.reference_loss == pytest.approx(loss([-1, 2, -6, -1]))
    assert found.is_ahead
    assert not compared(ADAPTER, BASE, of_simpo).is_ahead
    against_start = compared(BASE, ADAPTER, of_simpo, ADAPTER)
    assert against_start.reference_loss == against_start.loss == found.loss


def test_per_token_a_longer_answer_is_not_less_likely() -> None:
    rows = {"labels": [[MASKED, 5, 6], [MASKED, 7]], "other_labels": [[MASKED, 5], [8, 8, 8, 8]]}
    found = Likelihoods(np.array([-3.0, -2.0]), np.array([-4.0, -2.0]))
    mean = per_token(found, Dataset.from_dict(rows))
    assert (mean.chosen.tolist(), mean.rejected.tolist()) == ([-1.5, -2.0], [-4.0, -0.5])


def test_by_orpo_the_reward_is_the_log_odds_and_the_chosen_answer_is_learned_as_well() -> None:
    of_orpo = Objective("orpo", 0.5)
    adapter = Likelihoods(ADAPTER.chosen - 2, ADAPTER.rejected - 2)
    found = compared(BASE, adapter, of_orpo)

    def odds(nats: float) -> float:
        return math.exp(nats) / (1 - math.exp(nats))

    pairs = [*zip(adapter.chosen.tolist(), adapter.rejected.tolist(), strict=True)]
    margins = [math.log(odds(chosen) / odds(rejected)) for chosen, rejected in pairs]
    losses = [
        0.5 * math.log1p(math.exp(-margin)) - chosen
        for margin, (chosen, _) in zip(margins, pairs, strict=True)
    ]
    assert found.margin == pytest.approx(sum(margins) / 4)
    assert found.loss == pytest.approx(sum(losses) / 4)
    assert found.reward_accuracy == found.adapter.accuracy == 0.5
    assert found.reference_loss == compared(adapter, BASE, of_orpo).loss
    assert (found.title, found.is_per_token) == ("ORPO", True)
    certain = Likelihoods(np.array([0.0, -0.5]), np.array([-800.0, 0.0]))
    assert np.isfinite(of_orpo.losses(certain)).all()


@pytest.mark.parametrize("name", ["dpo", "simpo", "orpo"])
@pytest.mark.parametrize("start", [None, ADAPTER])
def test_what_is_written_is_read_back(start: Likelihoods | None, name: str) -> None:
    train = TrainSection.model_validate({"objective": name, "beta": 0.5, "gamma": 0.25})
    found = compared(BASE, ADAPTER, Objective.of(train), start)
    assert (found.objective, found.gamma) == (name, 0.25 if name == "simpo" else 0.0)
    written = json.loads(json.dumps(found.to_json()))
    assert Preferences.of_json(written) == found
    if name != "orpo":  # as runs before ORPO wrote it
        older = {k: v for k, v in written.items() if k != "objective"}
        assert (
            Preferences.of_json({**older, "gamma": found.gamma if name == "simpo" else None})
            == found
        )

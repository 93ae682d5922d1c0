"""The records that describe a comparison's figures."""

from dataclasses import fields

from prefixtune_cli.compare.metrics import (
    COSTS,
    EXACT_MATCH,
    FIRST_TOKEN,
    KV_CACHE,
    LEARNING_RATE,
    LOSS,
    PARAMETERS,
    Cost,
    Measured,
)
from tests.compare.made import comparison, contestant


def test_every_figure_of_a_cost_has_a_record_and_every_ratio_its_field() -> None:
    ratios = {key for m in COSTS if m.ratio for key in (m.over_base, m.over_lora)}
    circumstances = {"prompt_tokens", "prompts", "adapters", "interleaved"}
    assert {field.name for field in fields(Cost)} == {m.key for m in COSTS} | ratios | circumstances


def test_a_metric_finds_its_figure_wherever_it_is_kept() -> None:
    one = contestant("lora")
    assert EXACT_MATCH.median(one.results()[0]) == one.results()[0].exact_match
    assert LOSS.median(one.results()[0]) == one.results()[0].loss
    assert PARAMETERS.median(one) == one.trainable_parameters
    assert KV_CACHE.median(one) == KV_CACHE.median(one.cost) == 6 * 2 * 256 * 2 * 1024
    assert KV_CACHE.of(None) is None
    assert PARAMETERS.of(comparison().base_cost) is None


def test_figures_are_told_in_their_unit() -> None:
    assert EXACT_MATCH.figure(0.8125, 0.01) == "81.2 ± 1.0"
    assert EXACT_MATCH.with_unit(0.5) == "50.0 %"
    assert LOSS.figure(0.5, signed=True) == "+0.500"
    assert [m.heading for m in (LOSS, LEARNING_RATE)] == ["loss, nats", "learning rate"]
    cost = Cost(time_to_first_token_seconds=Measured(0.0123, 0.012, 0.0134))
    assert FIRST_TOKEN.cell(cost) == "12.3 (12.0–13.4)"

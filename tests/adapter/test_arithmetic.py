"""One adapter from several: exact combinations are exact on logits, and PEFT's combinations act on M as PEFT's do."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils import merge_utils

from prefixtune_cli.adapter import Memory, PrefixTuningPlusConfig

from .architectures import NAMES, base_model, fill, logits, tokens

WEIGHTS = [0.7, -0.4]


def with_adapters(*options: dict[str, object], name: str = "llama") -> PeftModel:
    """A base with one filled adapter for each of the options, named `a`, `b`, …"""
    configs = [PrefixTuningPlusConfig(task_type="CAUSAL_LM", **given) for given in options]
    model = get_peft_model(base_model(name), configs[0], adapter_name="a")
    for adapter, config in zip("bcd", configs[1:], strict=False):
        model.add_adapter(adapter, config)
    for seed, adapter in enumerate("abcd"[: len(configs)]):
        fill(model, adapter, seed=seed)
    return model.eval()


def memories(model: PeftModel, adapter: str) -> dict[str, Memory]:
    end = f".{adapter}"
    return {
        path.removesuffix(end): module
        for path, module in model.named_modules()
        if isinstance(module, Memory) and path.endswith(end)
    }


def all_active(model: PeftModel, weights: list[float]) -> torch.Tensor:
    """The logits with every adapter active, each scaled by its weight; the scaling is then undone."""
    names = "abcd"[: len(weights)]
    kept = {}
    for adapter, weight in zip(names, weights, strict=True):
        for path, memory in memories(model, adapter).items():
            scaled = memory.M if memory.rank is None else memory.M_up
            kept[adapter, path] = (scaled, scaled.data)
            scaled.data = scaled.data * weight
    model.base_model.set_adapter(list(names))
    found = logits(model, tokens())
    for parameter, value in kept.values():
        parameter.data = value
    return found


def merged(model: PeftModel, weights: list[float], *rest: object, **named: object) -> torch.Tensor:
    model.base_model.add_weighted_adapter("abcd"[: len(weights)], weights, "sum", *rest, **named)
    model.set_adapter("sum")
    return logits(model, tokens())


def assert_exact(model: PeftModel, weights: list[float] = WEIGHTS) -> None:
    expected = all_active(model, weights)
    with model.disable_adapter():
        assert (logits(model, tokens()) - expected).abs().max() > 1e-2
    torch.testing.assert_close(merged(model, weights), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_linear_merge_is_all_adapters_active_with_their_weights(name):
    assert_exact(with_adapters({}, {}, name=name))


@pytest.mark.parametrize(
    "options",
    [
        {"feature_map": "gelu"},
        {"normalize_query": True},
        {"share_heads": "kv"},
        {"layers": "last:2"},
        {"sites": "attention+ffn"},
        {"sites": "ffn", "block_size": 16},
        {"rank": 3},
    ],
    ids=str,
)
def test_it_is_exact_in_every_form_of_the_adapter(options):
    assert_exact(with_adapters(options, options))


def test_three_adapters_merge_into_one():
    assert_exact(with_adapters({}, {}, {}), [0.5, 0.3, 0.2])


def test_trained_maps_that_are_equal_stay_as_wide_as_one():
    model = with_adapters({"feature_map": "mlp"}, {"feature_map": "mlp"})
    for path, memory in memories(model, "b").items():
        memory.W_phi.data = memories(model, "a")[path].W_phi.data.clone()
        memory.b_phi.data = memories(model, "a")[path].b_phi.data.clone()
    assert_exact(model)
    assert {m.M.shape for m in memories(model, "sum").values()} == {(4, 8, 8)}
    assert model.peft_config["sum"].feature_dim is None


def test_trained_maps_that_differ_are_laid_side_by_side():
    model = with_adapters(
        {"feature_map": "mlp"}, {"feature_map": "mlp", "feature_dim": 5, "layers": [1]}
    )
    assert_exact(model)
    assert {m.M.shape for m in memories(model, "sum").values()} == {(4, 13, 8)}
    assert model.peft_config["sum"].feature_dim == 13


def test_the_merged_adapter_has_the_layers_of_all():
    model = with_adapters({"layers": [0]}, {"layers": [0, 2]})
    assert_exact(model)
    assert model.peft_config["sum"].layers == [0, 2]


def test_low_rank_adapters_merge_into_a_whole_matrix_with_one_that_is_whole():
    model = with_adapters({"rank": 2}, {})
    assert_exact(model)
    assert model.peft_config["sum"].rank is None


@pytest.mark.parametrize("combination", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_the_other_combinations_are_pefts_on_each_m(combination):
    model = with_adapters({}, {"layers": [1]})
    of_a, of_b = memories(model, "a"), memories(model, "b")
    torch.manual_seed(3)
    expected = {}
    for path, memory in of_a.items():
        other = of_b[path].M if path in of_b else torch.zeros_like(memory.M)
        both = [memory.M.detach(), other.detach()]
        combine = getattr(merge_utils, combination)
        expected[path] = combine(both, torch.tensor(WEIGHTS), 0.3)
    torch.manual_seed(3)
    merged(model, WEIGHTS, combination_type=combination, density=0.3)
    for path, memory in memories(model, "sum").items():
        assert torch.equal(memory.M, expected[path])
    share = sum(int((m.M != 0).sum()) for m in memories(model, "sum").values()) / (3 * 4 * 8 * 8)
    assert 0.1 < share < 0.6  # pruned


def test_a_merged_adapter_is_saved_and_loaded_as_any_other(tmp_path):
    model = with_adapters({"layers": [0]}, {"layers": [2]})
    expected = merged(model, WEIGHTS)
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path / "sum").eval()
    assert torch.equal(logits(again, tokens()), expected)


def test_the_merged_matrices_are_float32_on_a_base_of_bfloat16():
    model = with_adapters({}, {})
    model.get_base_model().to(torch.bfloat16)
    for adapter in "ab":
        for memory in memories(model, adapter).values():
            memory.float()
    model.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
    for path, memory in memories(model, "sum").items():
        pair = (memories(model, "a")[path].M, memories(model, "b")[path].M)
        torch.testing.assert_close(memory.M, WEIGHTS[0] * pair[0] + WEIGHTS[1] * pair[1])


def test_what_was_active_stays_active_and_nothing_new_is_trained():
    model = with_adapters({}, {})
    before = logits(model, tokens())
    model.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
    assert torch.equal(logits(model, tokens()), before)
    assert not any(p.requires_grad for m in memories(model, "sum").values() for p in m.parameters())


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({}, {"feature_map": "gelu"}, "feature_map is 'elu' in 'a', and 'gelu' in 'b'"),
        ({}, {"normalize_query": True}, "normalize_query is False in 'a', and True in 'b'"),
        ({"share_heads": "kv"}, {}, "share_heads is 'kv' in 'a', and 'query' in 'b'"),
        ({}, {"sites": "ffn"}, "sites is 'attention' in 'a', and 'ffn' in 'b'"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save is None in 'a', and .'lm_head'"),
    ],
    ids=str,
)
def test_the_first_setting_in_which_adapters_differ_is_named(first, second, said):
    model = with_adapters(first, second)
    with pytest.raises(ValueError, match=said):
        model.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")


def test_trained_maps_that_differ_are_merged_by_linear_alone():
    model = with_adapters({"feature_map": "mlp"}, {"feature_map": "mlp"})
    with pytest.raises(ValueError, match="cannot be merged by ties: the rows"):
        model.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum", "ties", density=0.5)


def test_maps_side_by_side_need_one_width_at_both_sites():
    options = {"feature_map": "mlp", "sites": "attention+ffn", "block_size": 16}
    model = with_adapters(options, options)
    with pytest.raises(ValueError, match="16 and 32 features at attention and at the FFN"):
        model.base_model.add_weighted_adapter(["a", "b"], WEIGHTS, "sum")
    assert "sum" not in model.peft_config


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"adapters": ["a", "x"]}, "no adapter 'x'"),
        ({"adapter_name": "b"}, "has an adapter 'b' already"),
        ({"weights": [1.0]}, "got 1 for 2 adapters"),
        ({"combination_type": "mean"}, "got 'mean'"),
        ({"combination_type": "ties"}, "density above 0 and up to 1, got None"),
        ({"combination_type": "ties", "density": 0.0}, "got 0.0"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(changed, said):
    model = with_adapters({}, {})
    arguments = {"adapters": ["a", "b"], "weights": WEIGHTS, "adapter_name": "sum", **changed}
    with pytest.raises(ValueError, match=said):
        model.base_model.add_weighted_adapter(**arguments)

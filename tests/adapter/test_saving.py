"""What is on disk, and that loading gives what was saved."""

from __future__ import annotations

import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    PeftConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
)
from safetensors.torch import load_file

from prefixtune_cli.adapter import PrefixTuningPlusConfig

from .architectures import (
    ARCHITECTURES,
    LAYERS,
    NAMES,
    SITES,
    adapted_modules,
    base_model,
    fill,
    logits,
    tokens,
)

PREFIX = "base_model.model.model.layers.{}.self_attn.prefix_tuning_plus_memory."


def adapted(
    name: str = "llama", dtype: torch.dtype = torch.float32, **options: object
) -> PeftModel:
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", **options)
    model = get_peft_model(base_model(name, dtype=dtype), config).eval()
    fill(model)
    return model


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    saved = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}
    return {key: tuple(value.shape) for key, value in saved.items()}


@pytest.mark.parametrize(
    ("options", "of_each_layer"),
    [
        ({}, {"M": (4, 8, 8)}),
        ({"feature_map": "gelu"}, {"M": (4, 8, 8)}),
        ({"share_heads": "kv"}, {"M": (2, 8, 8)}),
        ({"feature_map": "mlp"}, {"M": (4, 8, 8), "W_phi": (4, 8, 8), "b_phi": (4, 8)}),
        (
            {"feature_map": "mlp", "feature_dim": 5, "share_heads": "kv"},
            {"M": (2, 5, 8), "W_phi": (2, 5, 8), "b_phi": (2, 5)},
        ),
    ],
    ids=str,
)
def test_saved_file_holds_exactly_these_keys_and_shapes(tmp_path, options, of_each_layer):
    adapted(**options).save_pretrained(tmp_path)
    expected = {
        PREFIX.format(layer) + key: shape
        for layer in (0, 1, 2)
        for key, shape in of_each_layer.items()
    }
    assert shapes(tmp_path) == expected


@pytest.mark.parametrize("share_heads", ["query", "kv"])
@pytest.mark.parametrize("name", NAMES)
def test_saved_shapes_are_the_architectures_own(tmp_path, name, share_heads):
    architecture = ARCHITECTURES[name]
    adapted(name, share_heads=share_heads, feature_map="mlp").save_pretrained(tmp_path)
    heads = architecture.heads if share_heads == "query" else architecture.kv_heads
    d_query, d_value = architecture.d_query, architecture.d_value
    expected = {}
    for layer in range(LAYERS):
        memory = (
            f"base_model.model.{architecture.attention.format(layer)}.prefix_tuning_plus_memory."
        )
        expected[memory + "M"] = (heads, d_query, d_value)
        expected[memory + "W_phi"] = (heads, d_query, d_query)
        expected[memory + "b_phi"] = (heads, d_query)
    assert shapes(tmp_path) == expected


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "of_each_ffn"),
    [
        ({}, {"M": ("blocks", "block", "block")}),
        ({"block_size": 16}, {"M": (2, 16, 16)}),
        (
            {"block_size": 32, "rank": 3, "feature_map": "mlp", "feature_dim": 5},
            {"M_down": (1, 5, 3), "M_up": (1, 3, 32), "W_phi": (1, 5, 32), "b_phi": (1, 5)},
        ),
    ],
    ids=["default", "16", "low-rank"],
)
def test_saved_keys_and_shapes_of_an_ffn_are_those_of_its_blocks(
    tmp_path, name, options, of_each_ffn
):
    adapted(name, sites="ffn", **options).save_pretrained(tmp_path)
    # The widest divisor of 32 that does not exceed the width of a query head.
    block = 8 if ARCHITECTURES[name].d_query < 16 else 16
    widths = {"blocks": 32 // block, "block": block}
    expected = {
        f"base_model.model.{module}.prefix_tuning_plus_memory.{key}": tuple(
            widths.get(size, size) for size in shape
        )
        for module in adapted_modules(name, "ffn")
        for key, shape in of_each_ffn.items()
    }
    assert shapes(tmp_path) == expected


def test_only_the_chosen_layers_are_saved(tmp_path):
    adapted(layers="last:1").save_pretrained(tmp_path)
    assert list(shapes(tmp_path)) == [PREFIX.format(2) + "M"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"feature_map": "mlp", "feature_dim": 5, "share_heads": "kv"},
        {"sites": "ffn", "block_size": 16},
        {"sites": "attention+ffn", "feature_map": "mlp", "feature_dim": 5, "rank": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", NAMES)
def test_loaded_adapter_gives_the_saved_ones_logits(tmp_path, name, options):
    model = adapted(name, **options)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(name), tmp_path)
    assert torch.equal(logits(loaded, tokens()), expected)
    assert not any(p.requires_grad for p in loaded.parameters())


@SITES
@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_loading_keeps_every_bit_of_m_whatever_the_bases_dtype(
    tmp_path, dtype, low_cpu_mem_usage, sites
):
    model = adapted(dtype=dtype, feature_map="mlp", sites=sites)
    saved = get_peft_model_state_dict(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(
        base_model(dtype=dtype), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
    )
    loaded.load_adapter(tmp_path, "second", low_cpu_mem_usage=low_cpu_mem_usage)
    for name in ("default", "second"):
        values = get_peft_model_state_dict(loaded, adapter_name=name)
        assert values.keys() == saved.keys()
        for key, value in values.items():
            assert value.dtype == torch.float32
            assert value.device.type == "cpu"
            assert torch.equal(value, saved[key]), (name, key)


@SITES
def test_low_cpu_mem_usage_leaves_nothing_on_the_meta_device(tmp_path, sites):
    model = adapted(feature_map="mlp", sites=sites)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, low_cpu_mem_usage=True)
    assert {p.device.type for p in loaded.parameters()} == {"cpu"}
    assert torch.equal(logits(loaded, tokens()), expected)

    empty = get_peft_model(
        base_model(), PrefixTuningPlusConfig(sites=sites), low_cpu_mem_usage=True
    )
    trainable = [p for p in empty.parameters() if p.requires_grad]
    assert {p.device.type for p in trainable} == {"meta"}
    assert len(trainable) == len(adapted_modules("llama", sites))


def test_auto_class_finds_base_and_adapter_from_the_folder(tmp_path):
    base_model().save_pretrained(tmp_path / "base")
    model = adapted()
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


@SITES
def test_loaded_adapter_can_be_trained_on(tmp_path, sites):
    adapted(sites=sites).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, is_trainable=True)
    trainable = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trainable == {
        f"base_model.model.{module}.prefix_tuning_plus_memory.default.M"
        for module in adapted_modules("llama", sites)
    }


@SITES
def test_adapter_loaded_under_another_name_is_the_same_adapter(tmp_path, sites):
    model = adapted(sites=sites)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path, adapter_name="first")
    loaded.load_adapter(tmp_path, adapter_name="second")
    for name in ("first", "second"):
        loaded.set_adapter(name)
        assert torch.equal(logits(loaded, tokens()), expected)


def test_adapters_on_other_layers_are_loaded_beside_each_other(tmp_path):
    for layers in ([0], [2]):
        model = adapted(layers=layers, share_heads="kv" if layers == [2] else "query")
        fill(model, seed=layers[0])
        model.save_pretrained(tmp_path / str(layers[0]))
    expected = logits(model, tokens())
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "0", adapter_name="bottom")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded.load_adapter(tmp_path / "2", "top")
    assert not [str(w.message) for w in caught if "missing" in str(w.message)]
    loaded.set_adapter("top")
    assert torch.equal(logits(loaded, tokens()), expected)


def test_several_adapters_are_saved_each_into_a_folder_of_its_own(tmp_path):
    model = adapted()
    model.add_adapter("other", PrefixTuningPlusConfig(feature_map="mlp", layers=[1]))
    fill(model, "other", seed=1)
    model.save_pretrained(tmp_path)
    assert len(shapes(tmp_path)) == LAYERS
    assert set(shapes(tmp_path / "other")) == {
        PREFIX.format(1) + key for key in ("M", "W_phi", "b_phi")
    }


def test_modules_to_save_travel_with_the_adapter(tmp_path):
    model = adapted(modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.normal_()
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    assert "base_model.model.lm_head.weight" in shapes(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded, tokens()), expected)


def test_adapter_config_on_disk_names_the_method_and_its_format(tmp_path):
    adapted(layers="last:2").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "PREFIX_TUNING_PLUS"
    assert written["format_version"] == 1
    assert written["layers"] == "last:2"
    assert written["inference_mode"] is True
    assert type(PeftConfig.from_pretrained(tmp_path)) is PrefixTuningPlusConfig


@pytest.mark.parametrize(
    ("options", "version"),
    [
        ({"feature_map": "mlp", "feature_dim": 5, "normalize_query": True, "share_heads": "kv"}, 1),
        ({"rank": 2}, 2),
        ({"sites": "ffn"}, 2),
        ({"sites": "attention+ffn", "block_size": 16}, 2),
    ],
    ids=str,
)
def test_format_is_the_lowest_that_knows_the_settings(tmp_path, options, version):
    adapted(**options).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["format_version"] == version
    assert PeftConfig.from_pretrained(tmp_path).format_version == version


def test_file_of_before_sites_is_read_as_attention(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    written = json.loads(file.read_text())
    for key in ("sites", "block_size", "rank"):
        del written[key]
    file.write_text(json.dumps(written))
    loaded = PeftModel.from_pretrained(base_model(), tmp_path)
    assert torch.equal(logits(loaded, tokens()), logits(model, tokens()))


def test_adapter_of_another_shape_is_refused_when_it_is_loaded(tmp_path):
    adapted(share_heads="kv").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["share_heads"] = "query"
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="size mismatch"):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_adapter_for_more_layers_than_the_base_has_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["layers"] = [0, 5]
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"layers names \[5\]"):
        PeftModel.from_pretrained(base_model(), tmp_path)


@SITES
def test_transformers_own_loader_takes_the_adapter(tmp_path, caplog, sites):
    """transformers' `model.load_adapter`, which injects an adapter without a PeftModel."""
    model = adapted(sites=sites)
    expected = logits(model, tokens())
    model.save_pretrained(tmp_path)
    base = base_model()
    with caplog.at_level(logging.WARNING):
        base.load_adapter(str(tmp_path))
    assert torch.equal(logits(base, tokens()), expected)

from __future__ import annotations

import copy
import json
import pickle
import re

import pytest
from peft import PeftConfig, PeftType, get_peft_config

from prefixtune_cli.adapter import PrefixTuningPlusConfig

FULL = {
    "feature_map": "mlp",
    "feature_dim": 5,
    "normalize_query": True,
    "sites": "attention+ffn",
    "block_size": 16,
    "rank": 2,
    "share_heads": "kv",
    "layers": [0, 2],
    "target_modules": ["self_attn"],
    "modules_to_save": ["lm_head"],
    "init_weights": False,
    "task_type": "CAUSAL_LM",
}


def test_defaults_are_the_papers_form():
    config = PrefixTuningPlusConfig()
    assert config.peft_type is PeftType.PREFIX_TUNING_PLUS
    assert (config.feature_map, config.feature_dim, config.normalize_query) == ("elu", None, False)
    assert (config.share_heads, config.layers, config.target_modules) == ("query", "all", None)
    assert (config.sites, config.block_size, config.rank) == ("attention", None, None)
    assert config.init_weights is True
    assert config.format_version == 1


@pytest.mark.parametrize("layers", ["all", [0], [2, 0], "last:1", "last:12"])
def test_layers_takes_all_a_list_or_the_last_k(layers):
    assert PrefixTuningPlusConfig(layers=layers).layers == layers


@pytest.mark.parametrize("layers", [(0, 1), range(2)])
def test_layers_may_be_any_sequence_and_is_kept_as_a_list(layers):
    assert PrefixTuningPlusConfig(layers=layers).layers == [0, 1]


@pytest.mark.parametrize(
    ("values", "rule", "received"),
    [
        ({"feature_map": "relu"}, "feature_map must be elu, gelu or mlp", "'relu'"),
        ({"feature_map": None}, "feature_map must be elu, gelu or mlp", "None"),
        (
            {"feature_dim": 4},
            "feature_dim belongs to feature_map 'mlp'",
            "feature_dim=4 with 'elu'",
        ),
        (
            {"feature_map": "gelu", "feature_dim": 4},
            "feature_dim belongs to feature_map 'mlp'",
            "feature_dim=4 with 'gelu'",
        ),
        ({"feature_map": "mlp", "feature_dim": 0}, "whole number above 0", "0"),
        ({"feature_map": "mlp", "feature_dim": -3}, "whole number above 0", "-3"),
        ({"feature_map": "mlp", "feature_dim": True}, "whole number above 0", "True"),
        ({"feature_map": "mlp", "feature_dim": 3.5}, "whole number above 0", "3.5"),
        ({"feature_map": "mlp", "feature_dim": "8"}, "whole number above 0", "'8'"),
        ({"sites": "mlp"}, "sites must be attention, ffn or attention+ffn", "'mlp'"),
        ({"sites": None}, "sites must be attention, ffn or attention+ffn", "None"),
        ({"sites": "ffn+attention"}, "sites must be attention, ffn", "'ffn+attention'"),
        ({"block_size": 8}, "block_size belongs to sites 'ffn'", "block_size=8 with 'attention'"),
        ({"sites": "ffn", "block_size": 0}, "block_size must be a whole number above 0", "0"),
        ({"sites": "ffn", "block_size": True}, "block_size must be a whole number", "True"),
        ({"sites": "ffn", "block_size": "8"}, "block_size must be a whole number", "'8'"),
        ({"rank": 0}, "rank must be a whole number above 0", "0"),
        ({"rank": -2}, "rank must be a whole number above 0", "-2"),
        ({"rank": 1.5}, "rank must be a whole number above 0", "1.5"),
        (
            {"sites": "ffn", "share_heads": "kv"},
            "share_heads belongs to sites 'attention'",
            "share_heads='kv' with 'ffn'",
        ),
        ({"share_heads": "key"}, "share_heads must be query or kv", "'key'"),
        ({"layers": "top"}, "layers must be all, a list of layer numbers", "'top'"),
        ({"layers": "last:0"}, "last:k with k above 0", "'last:0'"),
        ({"layers": "last:-1"}, "last:k with k above 0", "'last:-1'"),
        ({"layers": "last:two"}, "last:k with k above 0", "'last:two'"),
        ({"layers": "last:1\n"}, "last:k with k above 0", r"'last:1\n'"),
        ({"layers": []}, "layers must be all, a list of layer numbers", "[]"),
        ({"layers": [-1]}, "layers must be all, a list of layer numbers", "[-1]"),
        ({"layers": [1, 1]}, "each once", "[1, 1]"),
        ({"layers": [True]}, "layers must be all, a list of layer numbers", "[True]"),
        ({"layers": ["0"]}, "layers must be all, a list of layer numbers", "['0']"),
        ({"layers": 3}, "layers must be all, a list of layer numbers", "3"),
        ({"layers": None}, "layers must be all, a list of layer numbers", "None"),
    ],
)
def test_error_states_the_rule_and_the_value_received(values, rule, received):
    with pytest.raises(ValueError, match="got") as error:
        PrefixTuningPlusConfig(**values)
    assert rule in str(error.value)
    assert re.search(rf", got {re.escape(received)}[., ]", str(error.value))


def test_adapter_of_a_newer_format_is_refused_whatever_else_it_says(tmp_path):
    newer = PrefixTuningPlusConfig().to_dict() | {"format_version": 3, "feature_map": "cosine"}
    newer["peft_type"] = "PREFIX_TUNING_PLUS"
    (tmp_path / "adapter_config.json").write_text(json.dumps(newer))
    with pytest.raises(ValueError, match=r"format version 3.*reads up to 2.*pip install"):
        PeftConfig.from_pretrained(tmp_path)


def test_copy_and_pickle_keep_every_value():
    config = PrefixTuningPlusConfig(**FULL)
    for twin in (copy.copy(config), copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert type(twin) is PrefixTuningPlusConfig
        assert twin.to_dict() == config.to_dict()
        assert twin.peft_type is PeftType.PREFIX_TUNING_PLUS
    assert copy.deepcopy(config).layers is not config.layers


def test_file_holds_every_value_as_plain_json_and_reads_back_the_same(tmp_path):
    config = PrefixTuningPlusConfig(**FULL)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {key: written[key] for key in FULL} == FULL
    assert written["peft_type"] == "PREFIX_TUNING_PLUS"
    assert written["format_version"] == 2
    for read in (PeftConfig, PrefixTuningPlusConfig):
        loaded = read.from_pretrained(tmp_path)
        assert type(loaded) is PrefixTuningPlusConfig
        assert {key: getattr(loaded, key) for key in FULL} == FULL


def test_peft_builds_the_config_from_the_types_name():
    config = get_peft_config({"peft_type": "PREFIX_TUNING_PLUS", "layers": "last:2"})
    assert type(config) is PrefixTuningPlusConfig
    assert config.layers == "last:2"

"""What an adapter costs a token, relative to its base, and whether it can be folded into the base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AdaptionPromptConfig, IA3Config, LNTuningConfig
from transformers import AutoModelForCausalLM

from prefixtune_cli.merge_info.base import without_weights
from prefixtune_cli.merge_info.one_adapter import gather
from prefixtune_cli.pointed import point
from prefixtune_cli.recipe.schema import ModelSection

from .conftest import Make, lora, memory, prefix

# The tiny base: 2 layers, 4 query and 2 key/value heads of width 16, hidden 64, FFN 128.
LAYERS, HEADS, D, HIDDEN, FFN = 2, 4, 16, 64, 128


def test_m_costs_two_operations_a_number_in_it_and_one_a_feature(
    make: Make, random_base: Path
) -> None:
    facts = gather(point(make("plus", memory())))
    assert facts.costs.flops == LAYERS * HEADS * (2 * D * D + D)
    assert facts.costs.bytes_read == LAYERS * HEADS * D * D * 4
    assert facts.costs.kv_cache_bytes == 0
    parameters = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(random_base).parameters()
    )
    assert facts.costs.base_flops == 2 * parameters  # its embeddings are also its head
    assert facts.costs.base_bytes_read == 2 * parameters
    assert facts.costs.flops_percent == pytest.approx(100 * facts.costs.flops / (2 * parameters))


@pytest.mark.parametrize(
    ("settings", "a_head"),
    [
        ({"share_heads": "kv"}, 2 * D * D + D),  # every query head reads, though they share M
        ({"feature_map": "mlp", "feature_dim": 5}, 2 * 5 * D + 2 * 5 * D + 5),
        ({"rank": 3}, 2 * 3 * (D + D) + D),
    ],
    ids=str,
)
def test_shared_heads_trained_maps_and_low_ranks_count_what_they_compute(
    make: Make, settings, a_head
) -> None:
    assert gather(point(make("plus", memory(**settings)))).costs.flops == LAYERS * HEADS * a_head


def test_lora_costs_two_thin_products_until_it_is_folded(make: Make) -> None:
    facts = gather(point(make("lora", lora(target_modules=["q_proj", "down_proj"]))))
    assert facts.costs.flops == LAYERS * 2 * 2 * ((HIDDEN + HIDDEN) + (FFN + HIDDEN))
    assert facts.folding.possible is True
    assert facts.folding.modules == {"q_proj": 2, "down_proj": 2}
    assert facts.folding.kinds == {"Linear": 4}


def test_a_prefix_costs_its_tokens_in_the_kv_cache_and_in_attention(make: Make) -> None:
    facts = gather(point(make("prefix", prefix(3))))
    cache = 3 * LAYERS * 2 * (D + D) * 2  # tokens, layers, key/value heads, keys and values, bytes
    assert facts.costs.kv_cache_bytes == facts.costs.bytes_read == cache
    assert facts.costs.kv_cache_tokens == 3
    assert facts.costs.flops == 3 * LAYERS * HEADS * 2 * (D + D)
    assert facts.folding.possible is False
    assert "KV cache" in facts.folding.reason[0]


def test_prefix_tuning_plus_does_not_fold_and_says_why_in_two_lines(make: Make) -> None:
    found = gather(point(make("plus", memory()))).folding
    assert found.possible is False
    assert len(found.reason) == 2
    assert "φ is not linear" in found.reason[0]
    assert "position" in found.reason[0]


@pytest.mark.parametrize(
    ("config", "folds"),
    [
        (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), True),
        (LNTuningConfig(task_type="CAUSAL_LM", target_modules=["input_layernorm"]), True),
        (AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=2), False),
    ],
    ids=["ia3", "ln-tuning", "adaption-prompt"],
)
def test_of_other_methods_pefts_layers_say_whether_they_fold(make: Make, config, folds) -> None:
    facts = gather(point(make("other", config)))
    assert facts.folding.possible is folds
    assert sum(facts.folding.modules.values()) == 2 * folds
    assert facts.learned is None


def test_without_its_base_percentages_are_left_out_and_it_says_so(make: Make) -> None:
    folder = make("plus", memory(share_heads="kv"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "some-org/gone"})
    )
    facts = gather(point(folder))
    assert facts.base is None
    assert "some-org/gone" in str(facts.base_problem)
    assert facts.costs.flops is None  # only the base says how many heads read M
    assert facts.costs.flops_percent is None
    assert facts.costs.bytes_read == LAYERS * 2 * D * D * 4
    assert facts.findings == ()


def test_of_a_mixture_the_active_experts_count() -> None:
    found = without_weights(ModelSection(name="mistralai/Mixtral-8x7B-v0.1"), lora())
    assert found.parameters == pytest.approx(46.7e9, rel=0.01)
    assert found.parameters_per_token == pytest.approx(
        12.75e9, rel=0.01
    )  # 12.9 with the embedding table


def test_the_paper_figure_for_llama_2_7b_is_met() -> None:
    """16.8 million parameters, 0.25 % of the base's (design: H·d_φ·d_head a layer)."""
    found = without_weights(ModelSection(name="meta-llama/Llama-2-7b-hf"), memory())
    assert found.expected is not None
    count = sum(torch.Size(shape).numel() for shape in found.expected.values())
    assert count == 32 * 32 * 128 * 128
    assert 100 * count / found.parameters == pytest.approx(0.25, abs=0.005)

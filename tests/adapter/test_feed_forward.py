"""Which module is a layer's FFN, and that the adapted FFN gives its own output plus the equation over blocks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BioGptConfig,
    DbrxConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeSharedConfig,
    Llama4TextConfig,
    LongcatFlashConfig,
    MiniMaxConfig,
    OPTConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from prefixtune_cli.adapter import (
    FeedForwardMemoryLayer,
    FeedForwardShape,
    Memory,
    MemoryLayer,
    PrefixTuningPlusConfig,
    UnsupportedModelError,
    attention_modules,
    feed_forward_modules,
)
from prefixtune_cli.adapter.feed_forward import add_read_of_blocks

from .architectures import (
    ARCHITECTURES,
    COMMON,
    GROUPED,
    LAYERS,
    MIXTURE,
    NAMES,
    adapted_modules,
    base_model,
    feed_forward,
    fill,
    logits,
    tokens,
)
from .equation import read_of_blocks

OPTIONS = {
    "elu": {},
    "gelu-16": {"feature_map": "gelu", "block_size": 16},
    "mlp": {"feature_map": "mlp", "feature_dim": 5},
    "normalized": {"normalize_query": True},
    "low-rank": {"block_size": 32, "rank": 3},
    "mlp-low-rank-normalized": {
        "feature_map": "mlp",
        "rank": 2,
        "normalize_query": True,
        "block_size": 4,
    },
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
MIXTURES = {
    # The name of the FFN in each layer, and its output: a tensor, a tuple, or a tuple of flattened tokens.
    "granitemoe": (GraniteMoeConfig(**GROUPED | EXPERTS), "block_sparse_moe", "GraniteMoeMoE"),
    "gpt_oss": (
        GptOssConfig(**GROUPED | EXPERTS, head_dim=8, experts_implementation="batched_mm"),
        "mlp",
        "GptOssMLP",
    ),
    "llama4": (
        Llama4TextConfig(**GROUPED | EXPERTS, head_dim=8, intermediate_size_mlp=48),
        "feed_forward",
        "Llama4TextMoe",
    ),
}


def random_model(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def beside(model: PeftModel, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """One forward pass: the input of each wrapped FFN, its own output, and its output with the memory."""
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def first(output: object) -> torch.Tensor:
        return output[0] if isinstance(output, tuple) else output

    for name in names:
        layer = model.get_base_model().get_submodule(name)
        assert isinstance(layer, FeedForwardMemoryLayer)
        layer.base_layer.register_forward_hook(
            lambda module, args, output, to=seen[name]: to.extend([args[0], first(output)])
        )
        layer.register_forward_hook(
            lambda module, args, output, to=seen[name]: to.append(first(output))
        )
    logits(model, tokens(positions=5))
    return seen


def check_equation(model: PeftModel, names: list[str]) -> None:
    for name, (hidden, own, plus) in beside(model, names).items():
        memory = model.get_base_model().get_submodule(name).prefix_tuning_plus_memory["default"]
        expected = own + read_of_blocks(memory, hidden).reshape(own.shape).to(own.dtype)
        tight = {"rtol": 1e-9, "atol": 1e-11} if own.dtype == torch.float64 else {}
        torch.testing.assert_close(plus, expected, **tight)
        assert not torch.allclose(plus, own, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_ffn_gives_its_own_output_plus_the_read_of_its_inputs_blocks(name, options):
    config = PrefixTuningPlusConfig(sites="ffn", **options)
    model = get_peft_model(base_model(name, dtype=torch.float64), config)
    fill(model)
    check_equation(model, adapted_modules(name, "ffn"))


def test_llamas_ffn_is_the_formula_from_its_weights_on():
    model = get_peft_model(
        base_model(dtype=torch.float64), PrefixTuningPlusConfig(sites="ffn", block_size=16)
    )
    fill(model)
    layer = feed_forward(model, "llama", 1)
    M = layer.prefix_tuning_plus_memory["default"].M.double()
    x = torch.randn(2, 3, 32, dtype=torch.float64)
    ffn = F.silu(x @ layer.gate_proj.weight.T) * (x @ layer.up_proj.weight.T)
    blocks = [F.elu(x[..., 16 * b : 16 * (b + 1)]) @ M[b] for b in range(2)]
    expected = ffn @ layer.down_proj.weight.T + torch.cat(blocks, -1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x=x), expected)
    torch.testing.assert_close(layer(x.flatten(0, 1)), expected.flatten(0, 1))


def test_each_block_is_normalized_by_itself():
    model = get_peft_model(
        base_model(dtype=torch.float64), PrefixTuningPlusConfig(sites="ffn", normalize_query=True)
    )
    fill(model)
    memory = feed_forward(model, "llama", 0).prefix_tuning_plus_memory["default"]
    x = torch.randn(1, 32, dtype=torch.float64)
    longer = torch.cat([1000 * x[:, :8], x[:, 8:]], 1)
    none = torch.zeros_like(x)
    torch.testing.assert_close(
        add_read_of_blocks(none, longer, memory),
        add_read_of_blocks(none, x, memory),
        rtol=1e-4,
        atol=1e-5,
    )


# Which module


@pytest.mark.parametrize("name", NAMES)
def test_the_ffn_of_every_layer_is_found_with_its_width(name):
    architecture = ARCHITECTURES[name]
    expected = {
        architecture.feed_forward.format(n): FeedForwardShape(n, 32, architecture.d_query)
        for n in range(LAYERS)
    }
    model = base_model(name)
    assert feed_forward_modules(model, attention_modules(model)) == expected
    adapted = get_peft_model(model, PrefixTuningPlusConfig(sites="attention+ffn", layers=[1]))
    base = adapted.get_base_model()
    assert feed_forward_modules(base, attention_modules(base)) == expected


@pytest.mark.parametrize(("config", "child", "block"), MIXTURES.values(), ids=MIXTURES)
def test_the_memory_stands_beside_the_whole_mixture_of_experts(config, child, block):
    base = random_model(config)
    expected = logits(base, tokens())
    model = get_peft_model(base, PrefixTuningPlusConfig(sites="ffn"))
    names = [f"model.layers.{n}.{child}" for n in range(LAYERS)]
    assert model.targeted_module_names == names
    wrapped = [model.get_base_model().get_submodule(name).base_layer for name in names]
    assert {type(module).__name__ for module in wrapped} == {block}
    assert torch.equal(logits(model, tokens()), expected)
    fill(model)
    check_equation(model, names)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trained == [
        f"base_model.model.{name}.prefix_tuning_plus_memory.default.M" for name in names
    ]


def test_router_logits_beside_the_output_are_passed_on():
    memory = Memory(4, 8, 8, init_weights=False)
    hidden, router = torch.randn(2, 3, 32), torch.randn(6, 4)
    output, same = add_read_of_blocks((torch.zeros(6, 32), router), hidden, memory)
    assert same is router
    torch.testing.assert_close(
        output.double(), read_of_blocks(memory, hidden).reshape(6, 32), rtol=1e-5, atol=1e-5
    )


def test_read_takes_the_dtype_of_the_output():
    memory = Memory(4, 8, 8, init_weights=False)
    hidden = torch.randn(2, 3, 32)
    output = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    result = add_read_of_blocks(output, hidden, memory)
    assert result.dtype == torch.bfloat16
    read = read_of_blocks(memory, hidden).to(torch.bfloat16)
    torch.testing.assert_close(result, output + read)


def test_ffn_is_found_where_attention_lies_deeper_in_the_layer():
    config = DbrxConfig(
        d_model=32,
        n_heads=4,
        n_layers=2,
        vocab_size=64,
        attn_config={"kv_n_heads": 2, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    attention = attention_modules(model)
    assert list(attention) == [f"transformer.blocks.{n}.norm_attn_norm.attn" for n in (0, 1)]
    assert list(feed_forward_modules(model, attention)) == [
        f"transformer.blocks.{n}.ffn" for n in (0, 1)
    ]


def test_layers_without_attention_have_no_memory_beside_their_ffn():
    layer_types = ["full_attention", "linear_attention", "full_attention"]
    config = MiniMaxConfig(**MIXTURE, head_dim=8, layer_types=layer_types)
    model = get_peft_model(random_model(config), PrefixTuningPlusConfig(sites="ffn"))
    assert model.targeted_module_names == ["model.layers.0.mlp", "model.layers.2.mlp"]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (
            OPTConfig(
                vocab_size=64,
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
            ),
            "OPTDecoderLayer",
        ),
        (BioGptConfig(**COMMON), "BioGptDecoderLayer"),
        (BertConfig(**COMMON, is_decoder=True), "BertLayer"),
        # Two side by side.
        (GraniteMoeSharedConfig(**GROUPED, shared_intermediate_size=16), "GraniteMoeSharedDecoder"),
        (LongcatFlashConfig(**COMMON | {"num_layers": 2}), "LongcatFlash"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_layers_without_one_module_that_is_the_ffn_are_refused_by_their_class(config, named):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    for sites in ("ffn", "attention+ffn"):
        with pytest.raises(UnsupportedModelError, match=named) as error:
            get_peft_model(model, PrefixTuningPlusConfig(sites=sites))
        assert "Use sites attention" in str(error.value)
        assert dict(model.named_modules()) == modules
    adapted = get_peft_model(model, PrefixTuningPlusConfig(), low_cpu_mem_usage=True)
    assert any(isinstance(module, MemoryLayer) for module in adapted.modules())


# Blocks


@pytest.mark.parametrize(
    ("width", "d_query", "asked", "block_size"),
    [
        (256, 32, None, 32),
        (32, 12, None, 8),
        (4096, 256, None, 256),
        (30, 64, None, 30),
        (7, 4, None, 1),
        (32, 8, 32, 32),
        (32, 8, 1, 1),
    ],
)
def test_a_block_is_as_wide_as_a_query_head_or_the_largest_divisor_below(
    width, d_query, asked, block_size
):
    assert FeedForwardShape(0, width, d_query).block_size(asked) == block_size


def test_a_block_size_that_does_not_divide_the_width_names_those_near_it():
    model = base_model()
    config = PrefixTuningPlusConfig(sites="attention+ffn", block_size=12)
    with pytest.raises(ValueError, match=r"divide .*, 32, got 12\. Near it are 4, 8, 16, 32\."):
        get_peft_model(model, config)
    assert not any(isinstance(module, MemoryLayer) for module in model.modules())
    with pytest.raises(ValueError, match=r"got 64\. Near it are 16, 32\."):
        FeedForwardShape(0, 32, 8).block_size(64)


@pytest.mark.parametrize(
    ("options", "each"),
    [
        ({}, 4 * 8 * 8),
        ({"block_size": 32}, 32 * 32),
        ({"block_size": 32, "rank": 4}, 2 * 4 * 32),
        ({"block_size": 16, "feature_map": "mlp", "feature_dim": 5}, 2 * 5 * (16 + 1 + 16)),
    ],
    ids=str,
)
def test_trainable_parameters_are_those_of_the_blocks(options, each):
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(sites="ffn", **options))
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == LAYERS * each


def test_low_rank_trains_both_factors_once_m_up_has_moved():
    config = PrefixTuningPlusConfig(sites="attention+ffn", rank=2, block_size=32)
    model = get_peft_model(base_model(), config)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = logits(model, tokens())
    assert torch.equal(before, logits(base_model(), tokens()))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert {n.rsplit(".", 1)[1] for n in trained} == {"M_down", "M_up"}
    start = {n: p.detach().clone() for n, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.05, weight_decay=0.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
    assert not any(torch.equal(parameter, start[name]) for name, parameter in trained.items())
    assert all(torch.equal(dict(model.named_parameters())[n], value) for n, value in base.items())


# Sites


@pytest.mark.parametrize(
    ("target_modules", "expected"),
    [
        (["mlp"], [f"model.layers.{n}.mlp" for n in range(LAYERS)]),
        (["0.mlp", "2.self_attn"], ["model.layers.0.mlp", "model.layers.2.self_attn"]),
        (r".*\.1\..*", ["model.layers.1.self_attn", "model.layers.1.mlp"]),
    ],
    ids=str,
)
def test_target_modules_narrows_both_sites(target_modules, expected):
    config = PrefixTuningPlusConfig(sites="attention+ffn", target_modules=target_modules)
    assert get_peft_model(base_model(), config).targeted_module_names == expected


def test_adapters_of_other_sites_are_loaded_beside_each_other_and_add(tmp_path):
    alone = {}
    for seed, sites in enumerate(("attention", "ffn", "attention+ffn")):
        model = get_peft_model(base_model(), PrefixTuningPlusConfig(sites=sites))
        fill(model, seed=seed)
        model.save_pretrained(tmp_path / sites)
        alone[sites] = logits(model, tokens())
    model = PeftModel.from_pretrained(base_model(), tmp_path / "attention", "attention")
    for sites in ("ffn", "attention+ffn"):
        model.load_adapter(tmp_path / sites, sites.replace("+", "_"))
    for sites, expected in alone.items():
        model.set_adapter(sites.replace("+", "_"))
        assert torch.equal(logits(model, tokens()), expected)

    model.base_model.set_adapter(["attention", "ffn"])
    both = get_peft_model(base_model(), PrefixTuningPlusConfig(sites="attention+ffn"))
    memories = dict(both.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for site in ("attention", "ffn"):
                if f"memory.{site}." in name:
                    memories[name.replace(f".{site}.", ".default.")].copy_(parameter)
    torch.testing.assert_close(logits(model, tokens()), logits(both, tokens()))
    model.delete_adapter("ffn")
    model.set_adapter("attention")
    assert torch.equal(logits(model, tokens()), alone["attention"])


def test_ffn_answers_through_the_layer_around_it():
    model = get_peft_model(base_model(), PrefixTuningPlusConfig(sites="ffn"))
    layer = feed_forward(model, "llama", 1)
    assert layer.down_proj is layer.base_layer.down_proj
    assert isinstance(layer.down_proj, nn.Linear)
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing

"""Where the hook acts, and that a real model's attention then gives eq. 7."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    BloomConfig,
    CLIPVisionConfig,
    FalconConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MambaConfig,
)
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from prefixtune_cli.adapter import (
    AttentionShape,
    MemoryLayer,
    PrefixTuningPlusConfig,
    UnsupportedModelError,
    attention_modules,
)
from prefixtune_cli.adapter.attention import attention_with_memory

from .architectures import ARCHITECTURES, LAYERS, NAMES, attention, base_model, fill, logits, tokens
from .equation import features, read

MAPS = {
    "elu": {"feature_map": "elu"},
    "gelu-kv": {"feature_map": "gelu", "share_heads": "kv"},
    "mlp": {"feature_map": "mlp", "feature_dim": 5},
    "normalized": {"normalize_query": True},
    "mlp-kv-normalized": {"feature_map": "mlp", "share_heads": "kv", "normalize_query": True},
}


@pytest.fixture
def recorded() -> Iterator[dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]]:
    """The query that each attention module used, and its heads' outputs, as our own attention function sees them.

    The function replaces sdpa, below the hook, under the name `recording`.
    """
    calls = {}

    def recording(module, query, key, value, mask, scaling=None, softcap=None, **kwargs):
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        scores = query @ key.mT * (scaling or query.shape[-1] ** -0.5)
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        output = ((scores + mask).softmax(-1) @ value).transpose(1, 2)
        calls[module] = (query.detach().clone(), output.detach().clone())
        return output, None

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", eager_mask)
    yield calls
    del AttentionInterface._global_mapping["recording"]
    del AttentionMaskInterface._global_mapping["recording"]


@pytest.mark.parametrize("options", MAPS.values(), ids=MAPS)
@pytest.mark.parametrize("name", NAMES)
def test_attention_gives_the_bases_output_plus_the_read(name, options, recorded):
    model = base_model(name, implementation="recording", dtype=torch.float64)
    model = get_peft_model(model, PrefixTuningPlusConfig(**options))
    fill(model)
    outputs = {}
    for number in range(LAYERS):
        attention(model, name, number).register_forward_hook(
            lambda module, args, output: outputs.update({module: output[0]})
        )
    logits(model, tokens(positions=5))

    for number in range(LAYERS):
        layer = attention(model, name, number)
        query, output = recorded[layer.base_layer]
        plus = output + read(layer.prefix_tuning_plus_memory["default"], query)
        projection = layer.base_layer.get_submodule(ARCHITECTURES[name].output_projection)
        with torch.no_grad():
            expected = projection(plus.flatten(2))
            without = projection(output.flatten(2))
        torch.testing.assert_close(outputs[layer], expected, rtol=1e-9, atol=1e-11)
        assert not torch.allclose(outputs[layer], without, rtol=1e-2, atol=1e-2)


def test_llamas_attention_is_equation_7_from_its_hidden_states_on():
    """A layer with rotary embedding, grouped heads, softmax and both projections, as loops."""
    model = base_model("llama", dtype=torch.float64)
    model = get_peft_model(model, PrefixTuningPlusConfig())
    fill(model)
    layer = attention(model, "llama", 1)
    seen = {}
    layer.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(
            hidden=(kwargs.get("hidden_states", args[0] if args else None)), output=output[0]
        ),
        with_kwargs=True,
    )
    logits(model, tokens(batch=1, positions=5))

    hidden = seen["hidden"][0].tolist()
    theta = model.config.rope_parameters["rope_theta"]
    heads, kv_heads, d, positions = 4, 2, 8, 5
    base, memory = layer.base_layer, layer.prefix_tuning_plus_memory["default"]

    def project(linear: nn.Linear, head: int, x: list[float]) -> list[float]:
        rows = linear.weight[head * d : (head + 1) * d].tolist()
        return [sum(w * value for w, value in zip(row, x, strict=True)) for row in rows]

    def rotate(x: list[float], position: int) -> list[float]:
        turned = x[:]
        for j in range(d // 2):
            angle = position * theta ** (-2 * j / d)
            turned[j] = x[j] * math.cos(angle) - x[j + d // 2] * math.sin(angle)
            turned[j + d // 2] = x[j + d // 2] * math.cos(angle) + x[j] * math.sin(angle)
        return turned

    out = torch.zeros(positions, heads * d, dtype=torch.float64)
    for h in range(heads):
        group = h * kv_heads // heads
        queries = [rotate(project(base.q_proj, h, x), i) for i, x in enumerate(hidden)]
        keys = [rotate(project(base.k_proj, group, x), i) for i, x in enumerate(hidden)]
        values = [project(base.v_proj, group, x) for x in hidden]
        for i, q in enumerate(queries):
            scores = [
                math.exp(sum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(d))
                for key in keys[: i + 1]
            ]
            phi = features(memory, h, q)
            for v in range(d):
                attended = sum(s * values[t][v] for t, s in enumerate(scores)) / sum(scores)
                remembered = sum(p * memory.M[h, f, v].item() for f, p in enumerate(phi))
                out[i, h * d + v] = attended + remembered
    with torch.no_grad():
        expected = base.o_proj(out)
    # The model computes its rotary embedding in float32.
    torch.testing.assert_close(seen["output"][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_modules_and_their_heads_are_found(name):
    architecture = ARCHITECTURES[name]
    expected = {
        architecture.attention.format(number): AttentionShape(
            layer=number,
            heads=architecture.heads,
            kv_heads=architecture.kv_heads,
            d_query=architecture.d_query,
            d_value=architecture.d_value,
        )
        for number in range(LAYERS)
    }
    model = base_model(name)
    assert attention_modules(model) == expected
    adapted = get_peft_model(model, PrefixTuningPlusConfig(layers=[1]))
    assert attention_modules(adapted.get_base_model()) == expected


def test_vision_tower_of_a_multimodal_model_is_left_alone():
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
    )
    text = ARCHITECTURES["llama"].config()
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))
    expected = [f"model.language_model.layers.{number}.self_attn" for number in range(LAYERS)]
    assert list(attention_modules(model)) == expected
    adapted = get_peft_model(model, PrefixTuningPlusConfig())
    assert adapted.targeted_module_names == expected


@pytest.mark.parametrize("options", [{}, {"feature_map": "mlp"}, {"share_heads": "kv"}], ids=str)
@pytest.mark.parametrize(
    ("name", "implementation"),
    [(name, how) for name in NAMES for how in ARCHITECTURES[name].implementations],
)
def test_fresh_adapter_leaves_logits_bit_identical(name, implementation, options):
    model = base_model(name, implementation=implementation)
    before = logits(model, tokens())
    adapted = get_peft_model(model, PrefixTuningPlusConfig(**options))
    assert torch.equal(logits(adapted, tokens()), before)
    fill(adapted)
    assert not torch.allclose(logits(adapted, tokens()), before, atol=0.1)


@pytest.mark.parametrize("name", [n for n in NAMES if "sdpa" in ARCHITECTURES[n].implementations])
def test_eager_and_sdpa_agree_and_keep_their_names(name):
    results = {}
    for implementation in ("sdpa", "eager"):
        model = base_model(name, implementation=implementation)
        model = get_peft_model(model, PrefixTuningPlusConfig())
        fill(model)
        assert model.config._attn_implementation == implementation
        results[implementation] = logits(model, tokens())
        assert model.config._attn_implementation == implementation
    torch.testing.assert_close(results["sdpa"], results["eager"], rtol=1e-4, atol=1e-4)


def test_implementation_may_be_changed_under_an_adapter():
    model = get_peft_model(base_model(), PrefixTuningPlusConfig())
    fill(model)
    before = logits(model, tokens())
    model.get_base_model().set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(model, tokens()), before, rtol=1e-4, atol=1e-4)


def test_eager_attention_still_returns_its_weights():
    model = base_model(implementation="eager")
    before = model(input_ids=tokens(), output_attentions=True).attentions
    model = get_peft_model(model, PrefixTuningPlusConfig(layers="last:1"))
    fill(model)
    after = model(input_ids=tokens(), output_attentions=True).attentions
    assert len(after) == LAYERS
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    "config",
    [
        BloomConfig(vocab_size=16, hidden_size=8, n_layer=1, n_head=2),
        FalconConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
        MambaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, state_size=4),
    ],
    ids=lambda config: config.model_type,
)
def test_model_out_of_the_interfaces_reach_is_refused_by_its_class(config):
    model = AutoModelForCausalLM.from_config(config)
    before = list(model.state_dict())
    with pytest.raises(UnsupportedModelError, match=type(model).__name__) as error:
        get_peft_model(model, PrefixTuningPlusConfig())
    assert "AttentionInterface" in str(error.value)
    assert list(model.state_dict()) == before
    assert not hasattr(model, "peft_config")


class Layer(nn.Module):
    """What a model from elsewhere may look like: the usual fields of attention, and its own forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer_idx = 0
        self.num_heads = 2
        self.head_dim = 4
        self.projection = nn.Linear(8, 8)


class IndexesTheTable(Layer):
    """A call as in transformers 4.48, and in remote code still: not through `get_interface`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](self, x, x, x, None)[0]


class HasNoHeads(Layer):
    def __init__(self) -> None:
        super().__init__()
        del self.num_heads

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        attend = ALL_ATTENTION_FUNCTIONS.get_interface("sdpa", None)
        return attend(self, x, x, x, None)[0]


class Anonymous(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.attention = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(x)


@pytest.mark.parametrize(
    ("layer", "named"), [(IndexesTheTable, "Anonymous"), (HasNoHeads, "HasNoHeads")]
)
def test_attention_that_would_silently_go_unadapted_is_refused(layer, named):
    with pytest.raises(UnsupportedModelError, match=named):
        get_peft_model(Anonymous(layer()), PrefixTuningPlusConfig())


def test_read_takes_the_dtype_and_width_of_what_attention_returns():
    """Flash attention answers a float32 query in bfloat16, and gets latent values padded to the keys' width."""
    layer = MemoryLayer(Layer(), AttentionShape(layer=0, heads=2, kv_heads=2, d_query=4, d_value=3))
    layer.update_layer("default", PrefixTuningPlusConfig(init_weights=False))
    query = torch.randn(1, 2, 5, 4)
    output = torch.randn(1, 5, 2, 4, dtype=torch.bfloat16)

    def flash(module: nn.Module, query: torch.Tensor) -> tuple[torch.Tensor, None]:
        return output, None

    result, _ = attention_with_memory(flash, layer.base_layer, query)
    memory = layer.prefix_tuning_plus_memory["default"]
    expected = output[..., :3] + read(memory, query).to(torch.bfloat16)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result[..., :3], expected)
    assert torch.equal(result[..., 3], output[..., 3])

"""torch.compile and flex attention: the hook becomes a part of the graph and does not break it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model

from prefixtune_cli.adapter import PrefixTuningPlusConfig

from .architectures import NAMES, base_model, fill, logits, tokens


@pytest.fixture(autouse=True)
def _no_graph_of_another_test():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(name: str = "llama", implementation: str | None = None, **options: object) -> PeftModel:
    model = get_peft_model(
        base_model(name, implementation=implementation), PrefixTuningPlusConfig(**options)
    )
    fill(model)
    return model


@pytest.mark.parametrize(
    ("name", "sites"),
    [(name, "attention") for name in NAMES]
    + [(name, "attention+ffn") for name in ("llama", "gpt2", "mixtral")],
)
def test_model_compiles_to_one_graph_with_the_same_values(name, sites):
    model = adapted(name, sites=sites, share_heads="kv")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    actual = logits(compiled, tokens(), use_cache=False)
    torch.testing.assert_close(actual, logits(model, tokens()), rtol=1e-4, atol=1e-4)


def test_compiled_model_gives_the_same_gradients():
    model = adapted(feature_map="mlp", layers=[0, 2], sites="attention+ffn")
    parameters = [p for p in model.parameters() if p.requires_grad]
    results = []
    for forward in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        output = forward(input_ids=tokens(), use_cache=False).logits
        results.append((output, *torch.autograd.grad(output.square().mean(), parameters)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sites", ["attention", "attention+ffn"])
def test_compiled_model_follows_a_switch_of_adapters(sites):
    model = adapted(sites=sites)
    model.add_adapter("other", PrefixTuningPlusConfig(sites=sites, feature_map="gelu"))
    fill(model, "other", seed=1)
    compiled = torch.compile(model, backend="eager")
    results = []
    for name in ("default", "other", "default"):
        model.set_adapter(name)
        results.append(logits(compiled, tokens()))
        torch.testing.assert_close(results[-1], logits(model, tokens()), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(results[0], results[1], atol=0.1)
    with model.disable_adapter():
        expected = logits(base_model(), tokens())
        torch.testing.assert_close(logits(compiled, tokens()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sites", ["attention", "attention+ffn"])
def test_a_switch_to_an_adapter_of_the_same_shape_compiles_nothing_anew(sites):
    model = adapted(sites=sites)
    names = ["default", "second", "third"]
    for seed, name in enumerate(names[1:], start=1):
        model.add_adapter(name, PrefixTuningPlusConfig(sites=sites))
        fill(model, name, seed=seed)
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    expected = {}
    for name in names:
        model.set_adapter(name)
        expected[name] = logits(model, tokens())
    # PEFT's own forward looks up an adapter by its name, so it stays outside the graph.
    model.get_base_model().compile(backend=counting)
    for name in [*names, *names]:
        model.set_adapter(name)
        torch.testing.assert_close(logits(model, tokens()), expected[name], rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.slow
def test_inductor_gives_the_same_values():
    model = adapted(feature_map="mlp")
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        actual = compiled(input_ids=tokens(), use_cache=False).logits
    torch.testing.assert_close(actual, logits(model, tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "stance"),
    [
        ("llama", "force_eager"),  # a C++ compiler needs half a minute for the kernel
        *(
            pytest.param(name, "default", marks=pytest.mark.slow)
            for name in ("llama", "mistral", "gemma2", "gpt_neox")
        ),
    ],
)
def test_flex_attention_agrees_with_eager(name, stance):
    expected = logits(adapted(name, "eager"), tokens(positions=16))
    model = adapted(name, "flex_attention")
    assert model.config._attn_implementation == "flex_attention"
    with torch.compiler.set_stance(stance):
        actual = logits(model, tokens(positions=16))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)

"""Bases quantized by bitsandbytes, on a CPU: the adapter acts beside weights that it does not change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from prefixtune_cli.adapter import (
    MemoryLayer,
    PrefixTuningPlusConfig,
    fold_basis,
    initialize_basis,
)
from prefixtune_cli.quantization import keep_as_loaded

from .architectures import (
    LAYERS,
    SITES,
    adapted_modules,
    attention,
    base_model,
    feed_forward,
    fill,
    logits,
    tokens,
)

bitsandbytes = pytest.importorskip("bitsandbytes")

QUANTIZED = {
    "4-bit": (
        {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32},
        bitsandbytes.nn.Linear4bit,
    ),
    "8-bit": ({"load_in_8bit": True}, bitsandbytes.nn.Linear8bitLt),
}


@pytest.fixture(params=QUANTIZED)
def bits(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    # bitsandbytes' 4-bit kernel for CPUs needs at least 64 inputs and 32 outputs.
    base_model(hidden_size=64, intermediate_size=64, head_dim=16).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def quantized(bits: str, folder: Path) -> PreTrainedModel:
    return load(folder, bits)


def load(folder: Path, bits: str | None) -> PreTrainedModel:
    settings = None if bits is None else BitsAndBytesConfig(**QUANTIZED[bits][0])
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=settings, device_map="cpu"
    ).eval()


def gradient(
    base: PreTrainedModel, *, sites: str = "attention", training: bool = True
) -> torch.Tensor:
    """The gradient of a filled adapter: all its parameters in one float32 vector."""
    keep_as_loaded(base)
    model = get_peft_model(base, PrefixTuningPlusConfig(sites=sites))
    fill(model)
    model.train(training)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    found = [p.grad.flatten() for p in model.parameters() if p.requires_grad]
    assert {grad.dtype for grad in found} == {torch.float32}
    return torch.cat(found)


def distance(gradient: torch.Tensor, reference: torch.Tensor) -> float:
    return float((gradient - reference).norm() / reference.norm())


def linear_layers(model: torch.nn.Module, bits: str) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, QUANTIZED[bits][1])]


@SITES
def test_adapter_leaves_quantized_modules_as_they_are(quantized, bits, sites):
    before = linear_layers(quantized, bits)
    assert len(before) == 7 * LAYERS
    expected = logits(quantized, tokens())
    # After that pass, in which bitsandbytes repacks 4-bit weights for a CPU.
    weights = [module.weight.detach().clone() for module in before]

    model = get_peft_model(quantized, PrefixTuningPlusConfig(sites=sites))
    assert torch.equal(logits(model, tokens()), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = linear_layers(model, bits)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert isinstance(attention(model, "llama", 0), MemoryLayer) == ("attention" in sites)
    assert isinstance(feed_forward(model, "llama", 0), MemoryLayer) == ("ffn" in sites)
    for module, weight in zip(after, weights, strict=True):
        assert torch.equal(module.weight, weight)
    fill(model)
    assert not torch.allclose(logits(model, tokens()), expected, atol=0.1)
    assert torch.equal(logits(model.unload(), tokens()), expected)


@SITES
def test_adapter_trains_on_a_quantized_base(quantized, tmp_path, sites):
    quantized = prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    model = get_peft_model(quantized, PrefixTuningPlusConfig(sites=sites, feature_map="mlp"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 3 * len(adapted_modules("llama", sites))
    optimizer = torch.optim.AdamW(parameters, lr=0.05)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        output = model(input_ids=tokens(), labels=tokens())
        output.loss.backward()
        losses.append(output.loss.item())
        optimizer.step()
    assert all(torch.count_nonzero(p.grad) > 0 for p in parameters)
    assert losses[-1] < losses[0] - 0.5

    expected = logits(model, tokens())
    model.save_pretrained(tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(model.unload(), tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded, tokens()), expected)


@SITES
def test_the_gradient_is_that_on_the_dequantized_base(folder, bits, sites):
    """In float32, only the order of sums differs; the base is the rounded one, not the one before quantization.

    Measured: 0 at 4 bits, 1e-6 at 8; against the base before quantization, 0.48 and 0.033.
    """
    found = gradient(load(folder, bits), sites=sites)
    assert distance(found, gradient(load(folder, bits).dequantize(), sites=sites)) < 1e-5
    assert distance(found, gradient(load(folder, None), sites=sites)) > 1e-2


def test_the_gradient_through_rounded_activations_is_right_within_their_rounding(folder):
    """In evaluation mode, 8-bit layers round their inputs to 1/127 of a row's largest value.

    If a row's largest value is three times its root mean square, the error is 3 / (127·√12) = 0.7 % a layer. Random
    errors over 21 layers add up to √21 times as much, 3 %. Measured: 3 %; a lost gradient would give 100 %.
    """
    reference = gradient(load(folder, "8-bit").dequantize())
    assert 1e-3 < distance(gradient(load(folder, "8-bit"), training=False), reference) < 0.1


def test_the_gradient_after_an_evaluation_is_the_one_before_and_no_weight_changes(folder, bits):
    """bitsandbytes packs 4-bit weights for a CPU's inference kernel, which has no gradient."""
    base = load(folder, bits)
    keep_as_loaded(base)
    before = [parameter.clone() for parameter in base.parameters()]
    logits(base, tokens())
    assert all(torch.equal(p, b) for p, b in zip(base.parameters(), before, strict=True))
    assert torch.equal(gradient(base), gradient(load(folder, bits)))


@SITES
def test_the_basis_of_a_quantized_base_is_found_and_folded(quantized, sites):
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", sites=sites)
    model = get_peft_model(quantized, config).eval()
    expected = logits(model, tokens())
    initialize_basis(model, [{"input_ids": tokens(batch=4, positions=12)}])
    assert torch.equal(logits(model, tokens()), expected)
    fill(model, std=0.05)
    trained = logits(model, tokens())
    assert not torch.allclose(trained, expected, atol=1e-3)
    fold_basis(model)
    torch.testing.assert_close(logits(model, tokens()), trained, rtol=2e-2, atol=2e-2)

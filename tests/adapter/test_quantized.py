"""Bases quantized by bitsandbytes, on a CPU: the adapter stands beside weights that it does not touch."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from prefixtune_cli.adapter import MemoryLayer, PrefixTuningPlusConfig

from .architectures import LAYERS, attention, base_model, fill, logits, tokens

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
def quantized(bits: str, tmp_path: object) -> PreTrainedModel:
    # bitsandbytes' 4-bit kernel for CPUs wants 64 inputs and 32 outputs at least.
    base = base_model(hidden_size=64, intermediate_size=64, head_dim=16)
    base.save_pretrained(tmp_path / "base")
    return AutoModelForCausalLM.from_pretrained(
        tmp_path / "base",
        quantization_config=BitsAndBytesConfig(**QUANTIZED[bits][0]),
        device_map="cpu",
    ).eval()


def linear_layers(model: torch.nn.Module, bits: str) -> list[torch.nn.Module]:
    return [module for module in model.modules() if isinstance(module, QUANTIZED[bits][1])]


def test_adapter_leaves_quantized_modules_as_they_are(quantized, bits):
    before = linear_layers(quantized, bits)
    assert len(before) == 7 * LAYERS
    expected = logits(quantized, tokens())
    # After that pass, in which bitsandbytes packs 4-bit weights anew for a CPU.
    weights = [module.weight.detach().clone() for module in before]

    model = get_peft_model(quantized, PrefixTuningPlusConfig())
    assert torch.equal(logits(model, tokens()), expected)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    after = linear_layers(model, bits)
    assert all(one is other for one, other in zip(before, after, strict=True))
    assert isinstance(attention(model, "llama", 0), MemoryLayer)
    for module, weight in zip(after, weights, strict=True):
        assert torch.equal(module.weight, weight)
    fill(model)
    assert not torch.allclose(logits(model, tokens()), expected, atol=0.1)
    assert torch.equal(logits(model.unload(), tokens()), expected)


def test_adapter_trains_on_a_quantized_base(quantized, tmp_path):
    quantized = prepare_model_for_kbit_training(quantized, use_gradient_checkpointing=False)
    model = get_peft_model(quantized, PrefixTuningPlusConfig(feature_map="mlp"))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert len(parameters) == 3 * LAYERS
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

"""A vocabulary of 128 k: a training step never holds all logits of its tokens in float32.

The fused head's largest block is a tile of 4096 words; it has several at once. To see the peaks:
`pytest -m slow -s tests/train/test_large_vocabulary.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from prefixtune_cli.recipe.aliases import packaged_model
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.train.sft import SafeSFTTrainer
from tests.plan.measuring import _train_between, measured_on_cpu, recipe_for

VOCABULARY = 128_000
ROWS = 2


def step(folder: Path, hidden: int, tokens: int) -> Recipe:
    """Two rows on a base of two layers; all tokens are trained."""
    base = folder / "base"
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(packaged_model()).save_pretrained(base)
    settings = {
        "model": {"device": "cpu", "bits": 32},
        "data": {"max_length": tokens},
        "train": {"batch_size": ROWS},
    }
    return recipe_for(base, folder, settings)


def largest_block(recipe: Recipe) -> int:
    """The largest tensor that PyTorch allocates in the second step, in bytes."""
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    _train_between(recipe, lambda _: profiler.start(), lambda _: profiler.stop())
    events = profiler.profiler.kineto_results.events()
    return max(e.nbytes() for e in events if e.name() == "[memory]")


def plain_loss(self: SafeSFTTrainer, model: Any, inputs: dict[str, Any], **_: Any) -> torch.Tensor:
    """transformers' own loss, which computes all logits at once."""
    loss: torch.Tensor = model(**inputs, use_cache=False).loss
    return loss


@pytest.mark.parametrize("method", ["fused", "plain"])
def test_no_block_of_a_step_is_as_large_as_the_logits(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = 128
    if method == "plain":  # shows that the measurement would find them
        monkeypatch.setattr(SafeSFTTrainer, "compute_loss", plain_loss)
    found = largest_block(step(tmp_path, hidden=16, tokens=tokens))
    logits = ROWS * (tokens - 1) * VOCABULARY * 4
    if method == "plain":
        assert found >= logits
    else:
        assert found < logits / 3


@pytest.mark.slow
def test_a_step_takes_less_than_with_whole_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = step(tmp_path, hidden=256, tokens=512)
    fused = measured_on_cpu(recipe)
    monkeypatch.setattr(SafeSFTTrainer, "compute_loss", plain_loss)
    plain = measured_on_cpu(recipe)
    logits = ROWS * 512 * VOCABULARY * 4
    mib = (round(n / 2**20) for n in (fused, plain, logits))
    print("MiB at the peak: {} with the fused head, {} without; the logits are {}".format(*mib))
    assert fused < plain - 2 * logits
    assert fused < logits

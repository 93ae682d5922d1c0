"""TRL's trainers take the config as it is, with data and a tokenizer made here."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from prefixtune_cli.adapter import PrefixTuningPlusConfig

from .architectures import SITES, VOCAB, adapted_modules, base_model, logits, tokens

ARGUMENTS = {
    "max_steps": 3,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": 32,
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return words(VOCAB)


def words(count: int) -> PreTrainedTokenizerFast:
    """A tokenizer with so many words, three of them special."""
    special = ["<pad>", "<s>", "</s>"]
    plain = [f"w{number}" for number in range(count - len(special))]
    table = {word: number for number, word in enumerate(special + plain)}
    model = Tokenizer(WordLevel(table, unk_token="<pad>"))
    model.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def sentences(count: int, seed: int) -> list[str]:
    rows = tokens(batch=count, positions=6, seed=seed).tolist()
    return [" ".join(f"w{number - 3}" for number in row) for row in rows]


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_that_only_the_adapter_was_trained(
    trainer: SFTTrainer | DPOTrainer,
    before: dict[str, torch.Tensor],
    folder: Path,
    sites: str = "attention",
) -> None:
    assert isinstance(trainer.model, PeftModel)
    after = parameters(trainer.model)
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert len(changed) == len(adapted_modules("llama", sites))
    assert changed == {name for name in after if "prefix_tuning_plus_memory.default." in name}

    trainer.save_model(folder)
    assert (folder / "adapter_model.safetensors").exists()
    loaded = PeftModel.from_pretrained(base_model(), folder)
    expected = logits(trainer.model.eval(), tokens())
    torch.testing.assert_close(logits(loaded, tokens()), expected)
    assert not torch.allclose(expected, logits(base_model(), tokens()), atol=1e-3)


@SITES
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_sft_trainer_trains_the_adapter_alone(tmp_path, tokenizer, gradient_checkpointing, sites):
    trainer = SFTTrainer(
        model=base_model(),
        args=SFTConfig(
            output_dir=str(tmp_path / "run"),
            activation_checkpointing=gradient_checkpointing,
            **ARGUMENTS,
        ),
        train_dataset=Dataset.from_dict({"text": sentences(8, seed=0)}),
        processing_class=tokenizer,
        peft_config=PrefixTuningPlusConfig(sites=sites, task_type="CAUSAL_LM"),
    )
    before = parameters(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    assert all(math.isfinite(value) for value in losses)
    check_that_only_the_adapter_was_trained(trainer, before, tmp_path / "adapter", sites)


def test_dpo_trainer_compares_the_adapter_with_the_base_under_it(tmp_path, tokenizer):
    """A fresh adapter is its own reference, so the first loss is exactly ln 2."""
    trainer = DPOTrainer(
        model=base_model(),
        args=DPOConfig(output_dir=str(tmp_path / "run"), **ARGUMENTS),
        train_dataset=Dataset.from_dict(
            {
                "prompt": sentences(8, seed=0),
                "chosen": [" " + text for text in sentences(8, seed=1)],
                "rejected": [" " + text for text in sentences(8, seed=2)],
            }
        ),
        processing_class=tokenizer,
        peft_config=PrefixTuningPlusConfig(task_type="CAUSAL_LM"),
    )
    before = parameters(trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert abs(losses[-1] - math.log(2)) > 1e-3
    check_that_only_the_adapter_was_trained(trainer, before, tmp_path / "adapter")

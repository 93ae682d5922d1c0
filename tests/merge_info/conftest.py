"""Adapters made by hand on the tiny base, so that the expected measurements are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.merge_info.matrices import TrainedMatrix

WEIGHTS = "adapter_model.safetensors"
MEMORY = "base_model.model.model.layers.{}.{}.prefix_tuning_plus_memory.{}"
Make = Callable[..., Path]


@pytest.fixture
def make(random_base: Path, tmp_path: Path) -> Make:
    """make(name, config, seed=0): an adapter folder for the tiny base, with random weights everywhere."""

    def made(name: str, config: PeftConfig, *, base: Path = random_base, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
        model.name_or_path = str(base)
        config.base_model_name_or_path = str(base)
        adapted = get_peft_model(model, config)
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / name)
        return tmp_path / name

    return made


def memory(**settings: object) -> PrefixTuningPlusConfig:
    return PrefixTuningPlusConfig(task_type="CAUSAL_LM", **settings)


def lora(**settings: object) -> LoraConfig:
    return LoraConfig(
        **{
            "task_type": "CAUSAL_LM",
            "r": 2,
            "lora_alpha": 4,
            "target_modules": ["q_proj"],
            **settings,
        }
    )


def prefix(tokens: int = 3) -> PrefixTuningConfig:
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=tokens)


def dense(matrix: TrainedMatrix) -> Tensor:
    """[heads, rows, columns]."""
    return matrix.left if matrix.right is None else matrix.left @ matrix.right


def change(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Edit the stored tensors in place."""
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def with_singular_values(rows: int, columns: int, values: list[float], seed: int = 0) -> Tensor:
    """A matrix with these singular values and random directions."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator))
    return left @ torch.diag(torch.tensor(values)) @ right.T

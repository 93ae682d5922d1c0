"""The plan against the real memory of training, by PyTorch's allocator: every method and precision, GQA, MoE, MLA."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, LlamaConfig, MixtralConfig, PreTrainedConfig

from prefixtune_cli.plan import FRAMEWORK_RESERVE_BYTES, Planner
from tests.plan.measuring import measured_on_cpu, measured_on_gpu, recipe_for, save_random_model

# The goal is a tenth. The rest, on a CPU, is memory inside operators, and the trainer's figures.
TOLERANCE_CPU, TOLERANCE_GPU = 0.03, 0.1
# A GPU's libraries take workspaces of the same size for every shape: too large a share of a narrow base's memory.
NARROW = {"hidden_size": 192, "intermediate_size": 512}
WIDE = {"hidden_size": 384, "intermediate_size": 1024}
COMMON = {
    "vocab_size": 2048,
    **(WIDE if torch.cuda.is_available() else NARROW),
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
}
MIXTURE = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "num_key_value_heads": 6,
    "q_lora_rank": None,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
BASES: dict[str, Callable[[], PreTrainedConfig]] = {
    "gqa": lambda: LlamaConfig(**COMMON, num_key_value_heads=2),
    "mha": lambda: LlamaConfig(**COMMON),
    "moe": lambda: MixtralConfig(**COMMON, **MIXTURE, router_aux_loss_coef=0.0),
    "balanced moe": lambda: MixtralConfig(**COMMON, **MIXTURE),
    "mla": lambda: DeepseekV2Config(**COMMON, **LATENT),
}


@dataclass(frozen=True)
class Setting:
    """A base, and the settings of a recipe that differ from the defaults."""

    base: str
    method: str
    bits: int
    rows: int
    tokens: int
    checkpointing: bool = False
    accumulation: int = 1
    adapter: tuple[tuple[str, Any], ...] = ()
    objective: str = "sft"

    def __str__(self) -> str:
        words = [self.base, self.method, f"{self.bits}bit", f"{self.rows}x{self.tokens}"]
        words += ["checkpointing"] * self.checkpointing
        words += [f"accumulation{self.accumulation}"] * (self.accumulation > 1)
        words += [self.objective] * (self.objective != "sft")
        return "-".join([*words, *(f"{key}={value}" for key, value in self.adapter)])

    def recipe(self) -> dict[str, Any]:
        return {
            "model": {"bits": self.bits},
            "data": {"max_length": self.tokens},
            "adapter": {"method": self.method, **dict(self.adapter)},
            "train": {
                "batch_size": self.rows,
                "gradient_accumulation": self.accumulation,
                "gradient_checkpointing": self.checkpointing,
                "objective": self.objective,
            },
        }


SETTINGS = [
    Setting("gqa", "prefix-tuning-plus", 16, rows=2, tokens=256),
    Setting("gqa", "prefix-tuning-plus", 4, rows=4, tokens=128, checkpointing=True),
    Setting("gqa", "lora", 8, rows=2, tokens=256, checkpointing=True),
    Setting("mha", "prefix-tuning", 32, rows=4, tokens=128),
    Setting("moe", "prefix-tuning-plus", 16, rows=2, tokens=256),
    Setting("gqa", "prefix-tuning-plus", 16, rows=1, tokens=256, objective="dpo"),
]
MORE_SETTINGS = [
    Setting("gqa", "full", 16, rows=2, tokens=256, accumulation=2),
    Setting("mla", "lora", 4, rows=2, tokens=128),
    Setting("gqa", "prefix-tuning-plus", 32, 1, 256, adapter=(("layers", "last:2"),)),
    Setting("mla", "prefix-tuning-plus", 16, rows=2, tokens=256, checkpointing=True),
    Setting("moe", "full", 16, rows=4, tokens=128, checkpointing=True),
    Setting("balanced moe", "prefix-tuning-plus", 16, rows=2, tokens=256),
    Setting("mha", "lora", 32, rows=4, tokens=128),
    Setting("mha", "full", 32, rows=2, tokens=256),
    Setting("balanced moe", "lora", 16, rows=1, tokens=256, objective="orpo"),
    Setting("gqa", "prefix-tuning-plus", 16, rows=2, tokens=256, objective="kto"),
    Setting("mha", "prefix-tuning", 32, rows=2, tokens=128, objective="simpo"),
    Setting("gqa", "lora", 4, rows=2, tokens=128, checkpointing=True, objective="dpo"),
]
ALL_SETTINGS = [*SETTINGS, *(pytest.param(s, marks=pytest.mark.slow) for s in MORE_SETTINGS)]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: save_random_model(config(), tmp_path_factory.mktemp(name))
        for name, config in BASES.items()
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="training would take the GPU")
@pytest.mark.parametrize("setting", ALL_SETTINGS, ids=str)
def test_the_plan_is_what_training_takes_on_a_cpu(
    setting: Setting, bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(bases[setting.base], tmp_path, setting.recipe())
    planned, measured = Planner(recipe).parts().total, measured_on_cpu(recipe)
    print(f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE_CPU)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("setting", [*SETTINGS, *MORE_SETTINGS], ids=str)
def test_the_plan_is_what_training_takes_on_a_gpu(
    setting: Setting, bases: dict[str, Path], tmp_path: Path
) -> None:
    recipe = recipe_for(bases[setting.base], tmp_path, setting.recipe())
    planned = Planner(recipe).parts().total - FRAMEWORK_RESERVE_BYTES
    measured = measured_on_gpu(recipe)
    print(f"planned {planned / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB")
    assert planned == pytest.approx(measured, rel=TOLERANCE_GPU)

"""SafeTrainer works with any trainer: here TRL's for preferences, which `ptp train` does not offer."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefixtune_cli.errors import TrainingError
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.stop import StopRequest
from prefixtune_cli.train.trainer import SafeTrainer, StopTraining

PAIRS = [
    {"prompt": f"Say red, number {i}.", "chosen": " RED", "rejected": " blue"} for i in range(8)
]


class SafeDPOTrainer(SafeTrainer, DPOTrainer):
    pass


def trainer_for(base: Path, out: Path, **arguments: Any) -> SafeDPOTrainer:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = DPOConfig(
        output_dir=str(out), max_steps=4, per_device_train_batch_size=2, save_steps=100, save_total_limit=2,
        learning_rate=1e-2, use_cpu=True, report_to="none", disable_tqdm=True, bf16=False,
        activation_checkpointing=False, logging_nan_inf_filter=False, **arguments,
    )  # fmt: skip
    run_dir = RunDir(out)
    stop = StopRequest(run_dir)
    return SafeDPOTrainer(
        run_dir=run_dir,
        origin=lambda row: f"pairs.jsonl:{row + 1}",
        processes=Processes(),
        stop=stop,
        save_minutes=None,
        group_by_length=False,
        model=get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)),
        args=config,
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


def trained(trainer: SafeTrainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_a_stop_seals_a_checkpoint_from_which_the_same_weights_come(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = trainer_for(random_base, tmp_path / "whole")
    whole.train()
    stopped = trainer_for(random_base, tmp_path / "run")
    plain = SafeTrainer.plain_training_step

    def with_a_signal(self: SafeTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step == 2:
            stopped._stop.number = signal.SIGTERM
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(SafeTrainer, "plain_training_step", with_a_signal)
        with pytest.raises(StopTraining):
            stopped.train()
    run_dir = RunDir(tmp_path / "run")
    checkpoint, damaged = run_dir.newest_whole_checkpoint()
    assert (checkpoint, damaged) == (run_dir.path / "checkpoint-3", [])
    assert not run_dir.checkpoint_part.exists()
    resumed = trainer_for(random_base, tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    one, other = trained(whole), trained(resumed)
    assert {name for name in one if not torch.equal(one[name], other[name])} == set()
    assert any(not torch.equal(one[name], value) for name, value in trained(stopped).items())


def test_a_loss_that_is_not_finite_ends_the_run(random_base: Path, tmp_path: Path) -> None:
    trainer = trainer_for(random_base, tmp_path / "run")
    with torch.no_grad():
        next(p for p in trainer.model.parameters() if p.requires_grad).fill_(float("nan"))
    with pytest.raises(TrainingError, match="The loss became nan at step 1"):
        trainer.train()

"""TRL's SFTTrainer, made safe: checkpoints appear whole or not at all, and a bad loss stops the run."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from transformers.training_args import OptimizerNames
from trl import SFTConfig, SFTTrainer

from prefixtune_cli.errors import RecipeError, TrainingError
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir

ROW = "row"
_PART = ".checkpoint.part"


def training_arguments(recipe: Recipe, run_dir: RunDir) -> SFTConfig:
    """The recipe in the terms of TRL.

    Raises:
        RecipeError: transformers does not know the optimizer.
    """
    known = [str(name.value) for name in OptimizerNames]
    if recipe.train.optimizer not in known:
        near = get_close_matches(recipe.train.optimizer, known, n=3)
        hint = f"Did you mean {' or '.join(near)}?" if near else f"They are {', '.join(known)}."
        raise RecipeError(
            f"train.optimizer must be one of transformers' optimizers, got {recipe.train.optimizer!r}. {hint}"
        )
    section = recipe.train
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir.tracker_logs)
    on_gpu = torch.cuda.is_available()
    # Flash attention takes the rows of a batch end to end, without padding; a prefix in the cache does not.
    flash = recipe.model.attention.startswith("flash_attention")
    padding_free = flash and recipe.adapter.method != "prefix-tuning"
    arguments = SFTConfig(
        output_dir=str(run_dir.path),
        max_length=recipe.data.max_length if section.packing else None,  # rows are cut already
        packing=section.packing,
        padding_free=padding_free,
        num_train_epochs=section.epochs,
        max_steps=section.max_steps or -1,
        per_device_train_batch_size=section.batch_size,
        per_device_eval_batch_size=recipe.evaluate.batch_size,
        gradient_accumulation_steps=section.gradient_accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.schedule,
        warmup_steps=section.warmup_ratio,
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim=section.optimizer,
        gradient_checkpointing=section.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False}
        if section.gradient_checkpointing
        else None,
        bf16=recipe.model.bits != 32,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=section.seed,
        data_seed=section.seed,
        logging_steps=section.log_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps,
        save_strategy="steps",
        save_steps=section.save_steps or 0.1,  # a fraction is one of the run's steps
        save_total_limit=section.keep_checkpoints,
        report_to=section.track,
        run_name=run_dir.path.name,
        disable_tqdm=True,
        remove_unused_columns=True,
        label_names=["labels"],
    )
    # Without a launcher, transformers would spread a batch over all GPUs by DataParallel.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


class SafeTrainer(SFTTrainer):
    """SFTTrainer whose checkpoints are renamed into place, and which stops at a loss that is not finite.

    Args:
        run_dir: where checkpoints go.
        origin: file and line of a row, for the error.
        **arguments: those of SFTTrainer.
    """

    def __init__(self, *, run_dir: RunDir, origin: Callable[[int], str], **arguments: Any) -> None:
        self._run_dir = run_dir
        self._origin = origin
        self._saving = False
        super().__init__(**arguments)
        collate: Any = self.data_collator  # type: ignore[has-type]

        def collate_and_remember(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(examples)
            if ROW in examples[0]:
                batch[ROW] = torch.tensor([example[ROW] for example in examples])
            return batch

        self.data_collator = collate_and_remember

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        rows = inputs.pop(ROW, None)
        loss: torch.Tensor = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):
            origins = "packed, so that its rows are not known"
            if rows is not None:
                origins = "; ".join(self._origin(row) for row in rows.tolist())
            raise TrainingError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}. "
                f"The batch was {origins}. Try a lower "
                f"--learning-rate (it is {self.args.learning_rate:g}), --set train.max_grad_norm=0.5, or --bits 32; "
                "look at those rows with `ptp inspect-data`."
            )
        return loss

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        inputs.pop(ROW, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def finished_at(self, checkpoint: Path) -> int | None:
        """The last step, with its weights loaded, where `checkpoint` is that of the last step.

        transformers would train one more step where the last step is not the end of an epoch.
        """
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] < state["max_steps"]:
            return None
        self._load_from_checkpoint(str(checkpoint))
        return int(state["global_step"])

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card: the run directory describes itself."""

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir.path / _PART) if self._saving else str(self._run_dir.path)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        part = self._run_dir.path / _PART
        shutil.rmtree(part, ignore_errors=True)
        self._saving = True
        try:
            super()._save_checkpoint(model, trial)
            for folder in part.iterdir():
                final = self._run_dir.path / folder.name
                shutil.rmtree(final, ignore_errors=True)
                os.replace(folder, final)
        finally:
            self._saving = False
            shutil.rmtree(part, ignore_errors=True)
        for old in self._run_dir.checkpoints()[: -self.args.save_total_limit]:
            shutil.rmtree(old, ignore_errors=True)


def latest_checkpoint(run_dir: RunDir) -> Path | None:
    """The newest complete checkpoint."""
    found = run_dir.checkpoints()
    return found[-1] if found else None

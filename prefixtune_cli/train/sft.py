"""TRL's SFTTrainer, made safe, and the recipe in its terms."""

from __future__ import annotations

import os
from typing import Any

from trl import SFTConfig, SFTTrainer

from prefixtune_cli.parallel.devices import device
from prefixtune_cli.parallel.sharding import deepspeed_settings
from prefixtune_cli.recipe.schema import IN_FRONT, IN_THE_CACHE, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.trainer import SafeTrainer


class SafeSFTTrainer(SafeTrainer, SFTTrainer):
    """SFTTrainer, made safe."""


def training_arguments(recipe: Recipe, run_dir: RunDir) -> SFTConfig:
    """The recipe in TRL's terms; if there are several processes, their group must exist already."""
    # Flash attention can take the rows of a batch end to end, without padding, but not after a prefix in the cache.
    flash = recipe.model.attention.startswith("flash_attention")
    padding_free = flash and recipe.adapter.method not in IN_THE_CACHE | IN_FRONT
    return SFTConfig(
        **shared_arguments(recipe, run_dir),
        max_length=recipe.data.max_length
        if recipe.train.packing
        else None,  # the rows are cut already
        packing=recipe.train.packing,
        padding_free=padding_free,
        remove_unused_columns=True,
    )


def shared_arguments(recipe: Recipe, run_dir: RunDir) -> dict[str, Any]:
    """The arguments that all of TRL's trainers have."""
    section = recipe.train
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(run_dir.tracker_logs)
    on_gpu = device(recipe.model.device).type == "cuda"
    return dict(
        output_dir=str(run_dir.path),
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
        activation_checkpointing=section.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False}
        if section.gradient_checkpointing
        else None,
        bf16=recipe.model.bits != 32,
        use_cpu=not on_gpu,
        dataloader_pin_memory=on_gpu,
        seed=section.seed,
        data_seed=section.seed,
        logging_steps=section.log_steps,
        logging_first_step=True,  # the loss at the start, to compare with
        logging_nan_inf_filter=False,
        eval_strategy="steps" if section.eval_steps else "no",
        eval_steps=section.eval_steps,
        save_strategy="steps",
        save_steps=section.save_steps or 0.1,  # a fraction counts as a share of the run's steps
        save_total_limit=section.keep_checkpoints,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,
        deepspeed=deepspeed_settings(section.parallel),
        report_to=section.track,
        run_name=run_dir.path.name,
        disable_tqdm=True,
        label_names=["labels"],
    )

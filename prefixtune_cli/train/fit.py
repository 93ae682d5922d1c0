"""Trains from the newest whole checkpoint, with a batch that fits, until the last step or a signal."""

from __future__ import annotations

import contextlib
import gc
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)

from prefixtune_cli.errors import ModelError, ResourceError, TrainingError
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, step_of
from prefixtune_cli.train import preference, sft
from prefixtune_cli.train.basis import Basis
from prefixtune_cli.train.callbacks import Journal, LossWatch, WeightWatch
from prefixtune_cli.train.checks import does_not_fit
from prefixtune_cli.train.loss_plot import draw_loss
from prefixtune_cli.train.preference import Reference
from prefixtune_cli.train.prepare import Data
from prefixtune_cli.train.sft import SafeSFTTrainer
from prefixtune_cli.train.start import Start
from prefixtune_cli.train.stop import StopRequest
from prefixtune_cli.train.trainer import SafeTrainer, StopTraining
from prefixtune_cli.train.trial import OutOfMemory, Trial


@dataclass(frozen=True)
class Job:
    """One run: its recipe, folder, data and start, and its processes, stop request and reporter."""

    recipe: Recipe
    run_dir: RunDir
    data: Data
    resume: bool
    processes: Processes
    stop: StopRequest
    reporter: Reporter
    start: Start | None = None


def fit(
    job: Job,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference | None,
) -> tuple[PeftModel | PreTrainedModel, int]:
    """Train the model; pairs of answers are compared with their `reference`.

    Returns:
        The model, sharded if the recipe says so, and the number of finished steps.

    Raises:
        ResourceError: the longest batch does not fit in memory; the message says what helps most.
        Interrupted: a signal came, and a checkpoint is saved.
        TrainingError: the loss is not finite, or the wrong weights changed.
    """
    processes, recipe = job.processes, job.recipe
    checkpoint = processes.told(_checkpoint(job) if processes.leads else None)
    if checkpoint is not None and not all(processes.gathered(checkpoint.exists())):
        raise ResourceError(
            f"Not all nodes see {checkpoint}. Give an --out on a file system that they share."
        )
    while True:
        try:
            trainer = _trainer(job, recipe, model, tokenizer, reference, checkpoint)
        except ValueError as error:  # TRL's, for an adapter that its fused loss would ignore
            raise ModelError(
                f"Method {recipe.adapter.method} cannot be trained on this base: {error}"
            ) from error
        try:
            return trainer.model, _run(trainer, checkpoint, job)
        except OutOfMemory:
            recipe, model = _smaller(recipe, job.reporter), trainer.model
        del trainer
        gc.collect()  # the trainer has cycles, and holds DDP's buckets


def _checkpoint(job: Job) -> Path | None:
    """The checkpoint to continue from, None for the start; drops the metrics that were logged after it."""
    if not job.resume:
        return None
    checkpoint, damaged = job.run_dir.newest_whole_checkpoint()
    for sentence in damaged:
        job.reporter.warning(sentence)
    where = f"from {checkpoint.name}" if checkpoint else "from the start: it has no checkpoint yet"
    job.reporter.notice(f"Resuming {job.run_dir.path} {where}.")
    job.run_dir.truncate_metrics(step_of(checkpoint) if checkpoint else 0)
    return checkpoint


def _trainer(
    job: Job,
    recipe: Recipe,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: Reference | None,
    checkpoint: Path | None = None,
) -> SafeTrainer:
    """The trainer for `recipe`; its batches may be smaller than those of the job."""
    run_dir, data, processes = job.run_dir, job.data, job.processes
    arguments = (sft if reference is None else preference).training_arguments(recipe, run_dir)
    _warm_up_more_than_one_step(arguments, len(data.train), processes.size)
    given = dict(
        run_dir=run_dir,
        origin=data.origin,
        processes=processes,
        stop=job.stop,
        save_minutes=recipe.train.save_minutes,
        group_by_length=recipe.train.group_by_length,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if arguments.eval_steps else None,
        processing_class=tokenizer,
    )
    trainer: SafeTrainer
    with _adapter_in_float32(model):
        if reference is None:
            trainer = SafeSFTTrainer(**given)
        else:
            given |= dict(reference=reference, reporter=job.reporter)
            trainer = preference.trainer_of(recipe, **given)
    if Basis.is_for(recipe.adapter):
        trainer.add_callback(Basis(trainer, job.reporter, checkpoint))
    for callback in (
        Trial(trainer),
        Journal(run_dir, job.reporter, writes=processes.leads),
        WeightWatch(),
        LossWatch(trainer.losses, job.reporter),
    ):
        trainer.add_callback(callback)
    trainer.remove_callback(PrinterCallback)  # the journal reports
    if processes.size > 1:  # each process draws its own dropout
        torch.manual_seed(recipe.train.seed + processes.rank)
    return trainer


def _warm_up_more_than_one_step(arguments: TrainingArguments, rows: int, processes: int) -> None:
    """Turn warm-up off if there is only one step, because that step would have a learning rate of zero."""
    batch = (
        arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * processes
    )
    in_one = arguments.max_steps < 0 and rows * math.ceil(arguments.num_train_epochs) <= batch
    if arguments.max_steps == 1 or in_one:
        arguments.warmup_steps = 0


def _run(trainer: SafeTrainer, checkpoint: Path | None, job: Job) -> int:
    stop = job.stop
    if checkpoint is not None and (last := trainer.finished_at(checkpoint)) is not None:
        return last
    try:
        with stop.put_off():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except (StopTraining, TrainingError) as end:
        if trainer.processes.leads:
            draw_loss(job.run_dir)
        if isinstance(end, TrainingError):
            raise
        step, steps = trainer.state.global_step, trainer.state.max_steps
        saved = "a checkpoint is saved" if step else "nothing is lost"
        where = f"at step {step} of {steps}" if steps else "before the first step"
        raise stop.stopped(end.number, f"{where}; {saved}") from None
    if trainer.processes.leads:
        draw_loss(job.run_dir)
    # A signal may have come in the last step, or while it was saved.
    if number := trainer.processes.agree(stop.number)[0]:
        raise stop.stopped(number, "after the last step; the weights are saved")
    return int(trainer.state.global_step)


def _smaller(recipe: Recipe, reporter: Reporter) -> Recipe:
    """The recipe with half the rows in a forward pass, and as many rows in an optimizer step as before."""
    section = recipe.train
    too_small = section.batch_size // 2 < recipe.least_batch
    if not section.auto_batch or section.batch_size % 2 or too_small:
        raise does_not_fit(recipe)
    halved = {
        "batch_size": section.batch_size // 2,
        "gradient_accumulation": section.gradient_accumulation * 2,
    }
    reporter.warning(
        f"The longest batch of {section.batch_size} rows does not fit in memory. Training with --batch-size "
        f"{halved['batch_size']} --gradient-accumulation {halved['gradient_accumulation']} instead, so that a step "
        "has as many rows as before."
    )
    return recipe.model_copy(update={"train": section.model_copy(update=halved)})


@contextlib.contextmanager
def _adapter_in_float32(model: PeftModel | PreTrainedModel) -> Iterator[None]:
    """Undo TRL's cast of a quantized base's adapter to bfloat16 within the block, in which small updates vanish."""
    weights = [(p, p.data) for p in model.parameters() if p.requires_grad]
    yield
    for parameter, before in weights:
        if parameter.dtype != torch.float32:
            parameter.data = before.to(parameter.device, torch.float32)

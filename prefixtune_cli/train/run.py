"""`train`: a recipe goes in, a run directory comes out. Reads from top to bottom."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed
from trl import SFTConfig

from prefixtune_cli import model as models
from prefixtune_cli.errors import Interrupted
from prefixtune_cli.evaluate.held_out import EXACT_MATCH_RULE, Score, score
from prefixtune_cli.parallel.devices import check_device
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.load import dump
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, write_atomically, write_json
from prefixtune_cli.tokenizer import check_base, load_tokenizer
from prefixtune_cli.train.callbacks import Journal, StopRequest, WeightWatch, peak_memory_gib
from prefixtune_cli.train.checks import (
    check_disk,
    check_resumable,
    check_same_data,
    check_tracker,
    told_in_words,
)
from prefixtune_cli.train.environment import describe_environment
from prefixtune_cli.train.loss_plot import draw_loss
from prefixtune_cli.train.prepare import Data, prepare_data
from prefixtune_cli.train.trainer import SafeTrainer, latest_checkpoint, training_arguments

HELD_OUT = "held-out"


@dataclass(frozen=True)
class Summary:
    """How a run ended: summary.json, and what `ptp train` prints."""

    run: str
    base: Score
    adapter: Score
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    steps: int
    held_out_rows: int

    def to_json(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "base": self.base.to_json(),
            "adapter": self.adapter.to_json(),
            "exact_match_rule": EXACT_MATCH_RULE,
            "peak_memory_gib": peak_memory_gib(),
        }


def train(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Summary:
    """Train as the recipe says.

    Args:
        recipe: all settings. `recipe.out` is the run directory; None derives a name.
        resume: go on with the run in that directory, from its newest checkpoint.
        overwrite: delete a run that is in that directory already.
        reporter: is told what happens.

    Raises:
        PtpError: see `errors`; everything that can be checked is checked before the base model loads.
    """
    reporter = reporter or Silent()
    run_dir = RunDir(recipe.out or Path("runs") / recipe.run_name)
    recipe = recipe.model_copy(update={"out": str(run_dir.path)})
    check_device(recipe.model.device)
    check_tracker(recipe.train.track)
    if resume:
        check_resumable(run_dir, recipe)
    else:
        run_dir.check_free(overwrite=overwrite)
    check_base(recipe.model)
    arguments = training_arguments(recipe, run_dir)
    tokenizer = load_tokenizer(recipe.model)
    data = prepare_data(recipe, tokenizer, reporter)
    if resume:
        check_same_data(run_dir, data)

    with told_in_words(run_dir):
        reporter.notice(f"Loading {recipe.model.name}.")
        set_seed(recipe.train.seed)
        base = models.load_base(recipe.model, trainable=recipe.adapter.method == "full")
        model = models.attach(base, recipe.adapter)
        if not resume:
            _open(run_dir, recipe, data, overwrite)
        kept = recipe.train.keep_checkpoints + 2 - len(run_dir.checkpoints())
        check_disk(run_dir.path, _checkpoint_bytes(model) * max(kept, 1))

        def judge(who: str) -> tuple[Score, list[str]]:
            return score(
                model,
                tokenizer,
                data.held_out,
                data.questions,
                recipe.evaluate,
                end_id=data.end_id,
                name=who,
                reporter=reporter,
            )

        # Full fine-tuning leaves no base to score afterwards.
        before = None if isinstance(model, PeftModel) else judge("base")
        steps = _fit(arguments, model, tokenizer, data, run_dir, resume, reporter)
        _save_adapter(model, tokenizer, run_dir)
        if before is None:
            with models.without_adapter(model):
                before = judge("base")
        return _conclude(run_dir, model, data, before, judge("adapter"), steps)


def _open(run_dir: RunDir, recipe: Recipe, data: Data, overwrite: bool) -> None:
    """Make the run directory; the recipe is written last, as its presence means that there is a run."""
    run_dir.create(overwrite=overwrite)
    write_json(run_dir.environment, describe_environment(data.fingerprints))
    if recipe.data.chat_template is not None:
        source = Path(recipe.data.chat_template).expanduser()
        write_atomically(run_dir.chat_template, source.read_bytes())
    write_atomically(run_dir.recipe, dump(recipe))


def _fit(
    arguments: SFTConfig,
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    run_dir: RunDir,
    resume: bool,
    reporter: Reporter,
) -> int:
    """Train, from the newest checkpoint where there is one to resume; return the number of steps."""
    stop = StopRequest()
    checkpoint = latest_checkpoint(run_dir) if resume else None
    if resume:
        where = (
            f"from {checkpoint.name}" if checkpoint else "from the start: it has no checkpoint yet"
        )
        reporter.notice(f"Resuming {run_dir.path} {where}.")
        run_dir.truncate_metrics(int(checkpoint.name.split("-")[1]) if checkpoint else 0)
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    epochs = math.ceil(arguments.num_train_epochs)
    if arguments.max_steps == 1 or (arguments.max_steps < 0 and len(data.train) * epochs <= batch):
        arguments.warmup_steps = 0  # else the only step would have a learning rate of zero
    trainer = SafeTrainer(
        run_dir=run_dir,
        origin=data.origin,
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.held_out if arguments.eval_steps else None,
        processing_class=tokenizer,
        callbacks=[Journal(run_dir, reporter, stop), WeightWatch()],
    )
    trainer.remove_callback(PrinterCallback)  # the journal reports
    _keep_adapter_in_fp32(model)
    if checkpoint is not None and (last := trainer.finished_at(checkpoint)) is not None:
        return last
    with _signals(stop):
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    draw_loss(run_dir)
    if trainer.state.global_step < trainer.state.max_steps:
        raise Interrupted(
            f"Stopped by {stop.signal_name} at step {trainer.state.global_step} of {trainer.state.max_steps}; a "
            f"checkpoint is saved. To go on, type: {run_dir.resume_command}"
        )
    return int(trainer.state.global_step)


def _keep_adapter_in_fp32(model: PeftModel | PreTrainedModel) -> None:
    """TRL casts the adapter of a quantized base to bfloat16, in which small updates vanish."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


@contextmanager
def _signals(stop: StopRequest) -> Iterator[None]:
    """Within the block SIGINT and SIGTERM ask for a stop; a second one acts at once."""
    before: dict[int, Any] = {}

    def request(number: int, frame: Any) -> None:
        stop(signal.Signals(number).name)
        signal.signal(number, before[number])

    try:
        for wanted in (signal.SIGINT, signal.SIGTERM):
            before[wanted] = signal.signal(wanted, request)
    except ValueError:  # not the main thread, where signals are somebody else's business
        before = {}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _save_adapter(
    model: PeftModel | PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run_dir: RunDir
) -> None:
    part = run_dir.path / ".adapter.part"
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part)
    if not isinstance(model, PeftModel):
        tokenizer.save_pretrained(part)
    shutil.rmtree(run_dir.adapter, ignore_errors=True)
    os.replace(part, run_dir.adapter)


def _conclude(
    run_dir: RunDir,
    model: PeftModel | PreTrainedModel,
    data: Data,
    base: tuple[Score, list[str]],
    adapter: tuple[Score, list[str]],
    steps: int,
) -> Summary:
    parameters = {id(p): p for p in model.parameters()}.values()
    summary = Summary(
        run=str(run_dir.path),
        base=base[0],
        adapter=adapter[0],
        trainable_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        total_parameters=sum(_elements(p) for p in parameters),
        adapter_bytes=sum(f.stat().st_size for f in run_dir.adapter.glob("*.safetensors")),
        steps=steps,
        held_out_rows=len(data.held_out),
    )
    answers = (
        {"answer": q.answer, "base": b, "adapter": a}
        for q, b, a in zip(data.questions, base[1], adapter[1], strict=True)
    )
    write_atomically(
        run_dir.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers)
    )
    write_json(
        run_dir.eval_result(HELD_OUT), {"base": base[0].to_json(), "adapter": adapter[0].to_json()}
    )
    write_json(run_dir.summary, summary.to_json())
    return summary


def _elements(parameter: Any) -> int:
    """The number of weights; bitsandbytes packs two 4-bit ones into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())


def _checkpoint_bytes(model: PeftModel | PreTrainedModel) -> int:
    """The trained weights and AdamW's two moments, in float32."""
    return 3 * 4 * sum(int(p.numel()) for p in model.parameters() if p.requires_grad)

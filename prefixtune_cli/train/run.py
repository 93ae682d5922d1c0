"""`train`: a recipe goes in, a run directory comes out. Reads from top to bottom."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from prefixtune_cli import model as models
from prefixtune_cli.adapter_folder import attach_trained
from prefixtune_cli.agreement import check_generation
from prefixtune_cli.evaluate.subjects import hash_of_base
from prefixtune_cli.lock import locked
from prefixtune_cli.optimizer import check_optimizer
from prefixtune_cli.parallel.devices import count_of, device, processes_here
from prefixtune_cli.parallel.launch import end_with_the_launcher
from prefixtune_cli.parallel.processes import Processes, inside_a_launcher, joined
from prefixtune_cli.parallel.sharding import adapter_at_hand, reshard, shard
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.load import dump
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, write_atomically, write_json
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.tokenizer import check_base, load_tokenizer
from prefixtune_cli.train.callbacks import forget_peak_memory, peak_memory_gib
from prefixtune_cli.train.checks import (
    check_disk,
    check_packing,
    check_parallel,
    check_resumable,
    check_same_run,
    check_tracker,
    told_in_words,
    why_not_resumable,
)
from prefixtune_cli.train.environment import describe_environment
from prefixtune_cli.train.fit import Job, fit
from prefixtune_cli.train.judge import Judge
from prefixtune_cli.train.loss_plot import draw_loss
from prefixtune_cli.train.prefix import start_at_rows
from prefixtune_cli.train.prepare import Data, prepare_data
from prefixtune_cli.train.start import Start, find_start
from prefixtune_cli.train.stop import StopRequest
from prefixtune_cli.train.summary import Summary, both_fell_warning, conclude, not_better_warning


def train(
    recipe: Recipe,
    *,
    resume: bool | str = False,
    overwrite: bool = False,
    bases: SharedBase | None = None,
    reporter: Reporter | None = None,
) -> Summary:
    """Train as the recipe says. If a run has several processes, each calls this with the same recipe.

    Args:
        recipe: all settings. `recipe.out` is the run directory; None derives a name.
        resume: continue the run in that directory from its newest checkpoint; `auto` does so if there is a run, and
            otherwise starts one.
        overwrite: delete an earlier run in that directory.
        bases: lends the base, if one process does several runs in turn; it does not change the runs.
        reporter: hears what happens.

    Raises:
        PtpError: see `errors`; everything that can be checked is checked before the base model loads.
    """
    run_dir = RunDir(recipe.folder)
    recipe = recipe.model_copy(update={"out": str(run_dir.path)})
    gpus = recipe.train.gpus
    if isinstance(gpus, int) and not inside_a_launcher():
        processes_here(gpus, recipe.model.device)
    stop = StopRequest(run_dir)
    with (
        stop.listening(),
        told_in_words(run_dir, stop),
        joined(count_of(gpus)) as processes,
        contextlib.ExitStack() as lock,
    ):
        end_with_the_launcher()
        reporter = reporter if reporter and processes.leads else Silent()
        if resume == "auto" and run_dir.finished:
            reporter.notice(f"The run in {run_dir.path} is finished already.")
            return Summary.read(run_dir)
        ready = processes.first_on_each_node(
            lambda: _prepare(recipe, run_dir, resume, overwrite, processes, reporter, lock)
        )
        processes.form_group(device(recipe.model.device))
        resuming, recipe = processes.told((ready.resume, ready.recipe))
        with _base(recipe, processes, bases) as load:
            job = Job(recipe, run_dir, ready.data, resuming, processes, stop, reporter, ready.start)
            return _train(job, load, bases, overwrite=overwrite)


@dataclass(frozen=True)
class _Ready:
    """What is known before the base model loads."""

    recipe: Recipe  # with a learning rate
    data: Data
    resume: bool
    start: Start | None


def _prepare(
    recipe: Recipe,
    run_dir: RunDir,
    resume: bool | str,
    overwrite: bool,
    processes: Processes,
    reporter: Reporter,
    lock: contextlib.ExitStack,
) -> _Ready:
    """Check everything, and read the data; only the leader locks and checks the run directory."""
    if processes.leads:
        lock.enter_context(locked(run_dir.path))
    check_optimizer(recipe.train.optimizer)
    check_tracker(recipe.train.track)
    check_parallel(recipe.train.parallel, processes.size)
    check_base(recipe.model)
    start = find_start(recipe, run_dir, reporter)
    if start is not None:  # an unfinished run will have other checkpoints
        section = recipe.train.model_copy(update={"start_from": start.given})
        recipe = recipe.model_copy(update={"train": section})
    recipe = models.with_learning_rate(recipe, reporter)
    resuming = run_dir.recipe.exists() if resume == "auto" else bool(resume)
    if processes.leads and resuming:
        check_resumable(run_dir, recipe)
    elif processes.leads:
        run_dir.check_free(overwrite=overwrite)
    models.check_precision(
        recipe.model, recipe.adapter.method, sharded=_is_to_be_sharded(recipe, processes)
    )
    models.check_method(recipe.model, recipe.adapter)
    if not resuming and (why := why_not_resumable(recipe)) is not None:
        reporter.warning(f"This run cannot be resumed if it is stopped: {why}.")
    check_packing(recipe)
    tokenizer = load_tokenizer(recipe.model, start.folder if start else None)
    data = prepare_data(recipe, tokenizer, reporter)
    if processes.leads and resuming:
        check_same_run(run_dir, data, processes.size, start)
    return _Ready(recipe, data, resuming, start)


@contextlib.contextmanager
def _base(
    recipe: Recipe, processes: Processes, bases: SharedBase | None
) -> Iterator[Callable[[], PreTrainedModel]]:
    """Within the block, a function loads or borrows the base."""
    whole, sharded = recipe.adapter.method == "full", _is_to_be_sharded(recipe, processes)
    with contextlib.ExitStack() as lent:

        def load() -> PreTrainedModel:
            if bases is not None and not sharded and not whole:
                return lent.enter_context(bases.lent(recipe.model))
            if bases is not None:
                bases.release()
            return models.load_base(recipe.model, trainable=whole, sharded=sharded)

        yield load


def _train(
    job: Job, load: Callable[[], PreTrainedModel], bases: SharedBase | None, *, overwrite: bool
) -> Summary:
    """Load, train and score; all processes do it together."""
    forget_peak_memory()
    started = time.monotonic()
    recipe, run_dir, data, start = job.recipe, job.run_dir, job.data, job.start
    processes, reporter = job.processes, job.reporter
    models.tell_loading(recipe.model, reporter)
    tokenizer = load_tokenizer(recipe.model, start.folder if start else None)
    whole = recipe.adapter.method == "full"
    base = load()
    set_seed(recipe.train.seed)  # after `load`, which uses random numbers only if it really loads
    model: PeftModel | PreTrainedModel
    if start is not None:
        model = attach_trained(base, recipe.adapter, start.folder)
    else:
        model = models.attach(base, recipe.adapter)
        start_at_rows(model, recipe.adapter, data.train, recipe.train.seed)
    trained, total = _counted(model)
    if isinstance(model, PeftModel) and recipe.train.parallel == "fsdp":
        shard(model, processes.size, device(recipe.model.device))
    if processes.leads:
        if not job.resume:
            _open(job, overwrite=overwrite)
        job.stop.begun = True
        if run_dir.chat_template.exists():
            tokenizer.chat_template = run_dir.chat_template.read_text(encoding="utf-8-sig")
        kept = recipe.train.keep_checkpoints + 2 - len(run_dir.checkpoints())
        # The trained weights and AdamW's two moments, in float32.
        check_disk(run_dir.path, 3 * 4 * trained * max(kept, 1))

    judge = Judge(job, tokenizer, bases)
    # Full fine-tuning leaves no base to score afterwards, and training leaves no start.
    before = judge.score(model, "base") if whole else None
    of_start = judge.score(model, "start")[0] if start is not None else None
    reference = judge.reference(model) if recipe.on_preferences else None
    model, steps = fit(job, model, tokenizer, reference)
    _save_adapter(model, tokenizer, run_dir, processes)
    _check_generation(model, job)
    before = before or judge.score(model, "base")
    after = judge.score(model, "adapter")
    preferences = judge.preferences(model, reference) if reference is not None else None
    moved = judge.divergence(model) if preferences is not None else None
    summary = Summary(
        run=str(run_dir.path),
        base=before[0],
        adapter=after[0],
        trainable_parameters=trained,
        total_parameters=total,
        adapter_bytes=sum(f.stat().st_size for f in run_dir.adapter.glob("*.safetensors")),
        steps=steps,
        held_out_rows=len(data.held_out),
        peak_memory_gib=max(processes.gathered(peak_memory_gib())),
        model=recipe.model.name,
        method=recipe.adapter.method,
        start=start.given if start else None,
        of_start=of_start,
        started=_created(run_dir) if processes.leads else None,
        finished=_now(),
        seconds=round(time.monotonic() - started, 1),
        why_no_exact_match=data.questions.why_none,
        answer_pattern=recipe.evaluate.answer_pattern,
        example=data.example,
        preferences=preferences,
        divergence=moved,
    )
    if processes.leads:
        of_base, of_adapter = summary.losses
        than = summary.compared_with
        if summary.verdict != "better":
            reporter.warning(not_better_warning(recipe, run_dir, summary))
        if preferences is not None and preferences.both_fell:
            reporter.warning(both_fell_warning(preferences))
        draw_loss(run_dir, base=of_base, adapter=(steps, of_adapter), than=than)
        conclude(run_dir, data, before, after, summary)
    if bases is not None and isinstance(model, PeftModel):
        models.detach(model)
    return summary


def _is_to_be_sharded(recipe: Recipe, processes: Processes) -> bool:
    return recipe.train.parallel in ("fsdp", "deepspeed-zero3") and processes.size > 1


def _open(job: Job, *, overwrite: bool) -> None:
    """Make the run directory; write the recipe last, as its presence means that there is a run."""
    run_dir, recipe, start = job.run_dir, job.recipe, job.start
    run_dir.create(overwrite=overwrite)
    about = describe_environment(job.data.fingerprints, job.processes.size)
    about = {"created": _now(), **about, "base_sha256": hash_of_base(recipe.model)}
    if start is not None:
        about["start"] = {"folder": str(start.folder), "sha256": start.sha256}
    write_json(run_dir.environment, about)
    if recipe.data.chat_template is not None:
        source = Path(recipe.data.chat_template).expanduser()
        write_atomically(run_dir.chat_template, source.read_bytes())
    write_atomically(run_dir.recipe, dump(recipe))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _created(run_dir: RunDir) -> str | None:
    """The time at which the run was first started."""
    about: dict[str, Any] = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    return about.get("created")


def _save_adapter(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    run_dir: RunDir,
    processes: Processes,
) -> None:
    """Write the adapter folder, with the tokenizer and its template; sharded weights give the same plain folder."""
    part = run_dir.path / ".adapter.part"
    reshard(model)
    with adapter_at_hand(model):
        if processes.leads:
            shutil.rmtree(part, ignore_errors=True)
            # The embedding and the output layer belong to the base, even if an adapter acts on them.
            whole = {"save_embedding_layers": False} if isinstance(model, PeftModel) else {}
            model.save_pretrained(part, **whole)
            models.drop_model_card(part)
    if processes.leads:
        tokenizer.save_pretrained(part)
        run_dir.place(part, run_dir.adapter)
    processes.wait()


def _check_generation(model: PeftModel | PreTrainedModel, job: Job) -> None:
    """Raise ModelError if the trained model, on a held-out row, does not generate what it computes."""
    data = job.data
    asked = data.questions.asked
    prompt = asked[0].prompt if asked else data.held_out[0]["input_ids"]
    then = f"type {job.run_dir.resume_command}: what is trained is kept."
    if (untold := check_generation(model, prompt, then=then)) is not None:
        job.reporter.notice(f"Did not check that the model generates what it computes: {untold}.")


def _counted(model: PeftModel | PreTrainedModel) -> tuple[int, int]:
    """The number of trained weights and of all weights, before they are sharded."""
    weights = {id(p): p for p in model.parameters()}.values()
    return sum(int(p.numel()) for p in weights if p.requires_grad), sum(map(_elements, weights))


def _elements(parameter: Any) -> int:
    """The number of weights; bitsandbytes packs two 4-bit ones into a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else int(parameter.numel())

"""Checks before the base model loads, and plain words for a full memory, a full disk or a lost process."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import PreTrainedModel, masking_utils

from prefixtune_cli import model as models
from prefixtune_cli.errors import (
    LostWorker,
    ModelError,
    PtpError,
    ResourceError,
    RunDirError,
    UsageError,
    first_line,
)
from prefixtune_cli.model import peft_config
from prefixtune_cli.parallel.processes import inside_a_launcher, says_that_one_is_lost
from prefixtune_cli.peft_methods import why_final
from prefixtune_cli.recipe.load import difference, resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.prepare import Data
from prefixtune_cli.train.start import Start
from prefixtune_cli.train.stop import StopRequest

# Layers of these kinds see only the part of a row that their mask allows.
MASKED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def check_tracker(name: str) -> None:
    """Raise ResourceError if the experiment tracker is not installed."""
    if name != "none" and find_spec(name) is None:
        raise ResourceError(
            f"train.track is {name}, but {name} is not installed. Type: pip install 'prefixtune-cli[{name}]'"
        )


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Raise ResourceError if the disk has less than `needed_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ResourceError(
            f"The run needs {needed_bytes / 2**20:,.1f} MiB for checkpoints and the adapter, but {folder} has only "
            f"{free / 2**20:,.1f} MiB free. Free some space, give --out on another disk, or type --keep 1."
        )


def check_parallel(how: str, processes: int) -> None:
    """Raise if the recipe shards the model but the run has one process, or if DeepSpeed is needed but missing."""
    if how == "ddp":
        return
    if processes == 1:
        raise UsageError(
            f"train.parallel {how} spreads a model over several processes, but this run has one. Give --gpus N (with "
            "--device cpu, N processes on the CPU), or leave out --parallel."
        )
    if how.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise ResourceError(
            f"train.parallel is {how}, but DeepSpeed is not installed. Type: pip install 'prefixtune-cli[deepspeed]'"
        )


def check_packing(recipe: Recipe) -> None:
    """Raise ModelError if examples that are packed into one row would see each other.

    Positions start again at 0 with each example, and transformers makes the mask from them, for every attention
    kernel. But some models do not pass them on, and a recurrent state or a convolution ignores masks. A model without
    weights is enough to see this.
    """
    if not recipe.train.packing:
        return
    base = models.skeleton(recipe.model)
    kinds = set(getattr(base.config.get_text_config(), "layer_types", None) or ())
    seen = _masks_by_position(base)
    if getattr(base, "_is_stateful", False) or kinds - MASKED_LAYERS:
        why = "some of its layers are not attention with a mask, and carry one example over into the next"
    elif not all(seen):
        why = "its attention makes the mask without the positions, which start again with each example"
    elif not seen:
        why = "its attention does not make the mask by transformers' masking_utils"
    else:
        return
    raise ModelError(
        f"train.packing does not work with {recipe.model.name} ({type(base).__name__}): {why}, so examples that share "
        "a row would see each other. Type --no-packing; --set train.group_by_length=true saves padding, too."
    )


def _masks_by_position(base: PreTrainedModel) -> list[bool]:
    """For each mask that a model on the meta device asks for, whether only the positions determine it."""
    seen: list[bool] = []
    original = masking_utils._preprocess_mask_arguments

    def look(
        config: Any, inputs: Any, mask: Any, cache: Any, positions: Any, *args: Any, **kwargs: Any
    ) -> Any:
        seen.append(positions is not None and mask is None and cache is None)
        return original(config, inputs, mask, cache, None, *args, **kwargs)

    base.config.pad_token_id = None  # or transformers would search the tokens for it
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    masking_utils._preprocess_mask_arguments = look
    try:
        with torch.no_grad(), suppress(Exception):  # the masks come first; layers may need content
            base.eval()(input_ids=tokens, position_ids=tokens, use_cache=False)
    finally:
        masking_utils._preprocess_mask_arguments = original
    return seen


@contextmanager
def told_in_words(run_dir: RunDir, stop: StopRequest) -> Iterator[None]:
    """Within the block, raise errors in our words for a full memory, a full disk and a lost process."""
    try:
        yield
    except PtpError:
        raise
    except Exception as error:
        if should_reduce_batch_size(error):  # a GPU's memory, or this machine's
            raise ResourceError(
                "Out of memory. What helps most comes first: --gradient-checkpointing, a smaller "
                "--batch-size with more --gradient-accumulation, a smaller --max-length, --bits 4."
            ) from error
        if inside_a_launcher() and says_that_one_is_lost(error):
            if stop.number:  # the other process ended by it before this one could
                raise stop.stopped(stop.number, "together with another process") from error
            raise LostWorker(
                f"This process has lost the others, or could not reach them: {first_line(error)}"
            ) from error
        said = "No space left" in str(error) or "Disk quota" in str(error)
        if run_dir.path.exists() and (said or shutil.disk_usage(run_dir.path).free < 2**16):
            raise ResourceError(
                f"No space is left for {run_dir.path}. Whole checkpoints are kept: free some space and type "
                f"{stop.command}"
            ) from error
        raise


def does_not_fit(recipe: Recipe) -> ResourceError:
    """The error for a batch that does not fit, with the change that helps most by the plan."""
    from prefixtune_cli.plan import remedies

    section = recipe.train
    found = remedies(recipe)
    helps = (
        f"By `ptp plan`, {found[0].flag} helps most."
        if found
        else "It needs a smaller base, or a larger GPU: see `ptp plan`."
    )
    rows = "pairs of answers" if recipe.kind == "pairs" else "rows"
    smaller = (
        "--auto-batch finds a batch that fits."
        if section.batch_size // 2 >= recipe.least_batch
        else ""
    )
    return ResourceError(
        f"The longest batch ({section.batch_size} {rows} of up to {recipe.data.max_length} tokens) does not fit in "
        f"memory. {helps} {smaller}".rstrip()
    )


def check_resumable(run_dir: RunDir, recipe: Recipe) -> None:
    """Raise RunDirError if there is no run to continue, it has another recipe, or its checkpoints do not suffice."""
    run_dir.check_resumable()
    saved = resolve(str(run_dir.recipe)).model_copy(update={"out": recipe.out})
    if changed := difference(saved, recipe):
        raise RunDirError(
            f"The run in {run_dir.path} was started with another recipe, so it cannot be resumed with this one:\n"
            + "\n".join(f"  {line}" for line in changed)
            + f"\nType {run_dir.resume_command} alone, or give the changed run another --out."
        )
    if run_dir.checkpoints() and (why := why_not_resumable(recipe)) is not None:
        raise RunDirError(
            f"The run in {run_dir.path} cannot go on from its checkpoint: {why}. Type --overwrite in place of --resume "
            "to start it again."
        )


def why_not_resumable(recipe: Recipe) -> str | None:
    """Why a run cannot go on from a checkpoint; None if it can."""
    config = peft_config(recipe.adapter)
    return None if config is None else why_final(config)


def check_same_run(run_dir: RunDir, data: Data, processes: int, start: Start | None) -> None:
    """Raise RunDirError if the run was started with other data or another start, or in another number of processes."""
    started = json.loads(run_dir.environment.read_text(encoding="utf-8"))
    if (before := started.get("processes", 1)) != processes:
        raise RunDirError(
            f"The run in {run_dir.path} was started with {before} processes, and is now resumed with "
            f"{processes}, which would change its batches. Resume it with {before} (--gpus, and --nodes "
            "if there are several machines), or start again with another --out."
        )
    if start is not None and (before := started["start"]["sha256"]) != start.sha256:
        raise RunDirError(
            f"The adapter {start.given}, from which the run in {run_dir.path} went on, has changed since (sha256 "
            f"{before[:8]}… then and {start.sha256[:8]}… now), so the run cannot be resumed. Restore it, or start "
            "again with another --out."
        )
    then = started["data"]
    changed = [
        f"  {name}: {now['source']}, {then.get(name, {}).get('rows', '?')} rows then and {now.get('rows', '?')} now"
        for name, now in data.fingerprints.items()
        if then.get(name, {}).get("sha256") != now["sha256"]
    ]
    if changed:
        raise RunDirError(
            f"The data of the run in {run_dir.path} has changed since it was started, so it cannot be resumed:\n"
            + "\n".join(changed)
            + "\nRestore the old content, or start again with another --out."
        )

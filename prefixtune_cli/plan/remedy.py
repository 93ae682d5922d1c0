"""What to change if a recipe does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from prefixtune_cli.errors import PtpError
from prefixtune_cli.plan.planner import Planner, is_for_gpu, with_method
from prefixtune_cli.plan.processes import processes
from prefixtune_cli.recipe.schema import IN_THE_CACHE, PrefixTuningPlus, Recipe

SHORTEST_TOKENS = 128  # no remedy cuts rows to less
FEWER_LAYERS = (16, 8, 4)
Change = tuple[str, Recipe]


@dataclass(frozen=True)
class Remedy:
    """A change of flags, and its effect on memory.

    Attributes:
        flag: what to type instead.
        saves_bytes: how much less than the recipe as it is; None if the change could not be planned.
        total_bytes: the memory with the change; None likewise.
        fits: whether that fits the available memory; None if either is unknown.
    """

    flag: str
    saves_bytes: int | None
    total_bytes: int | None
    fits: bool | None


def remedies(recipe: Recipe, *, available_bytes: int | None = None) -> list[Remedy]:
    """What to change for less memory, best first; [] if there is nothing left to change.

    Changes that fit come first, those that change the results least before the others: checkpointing and smaller
    batches with accumulated gradients do not change them, and fewer bits change them little. Changes that do not fit
    follow, the largest saving first. This never raises: for a base that cannot be planned, the order is fixed.

    Args:
        recipe: the recipe that does not fit.
        available_bytes: memory of each GPU; None takes the smallest of the recipe's GPUs on this machine.
    """
    available = gpu_bytes(recipe) if available_bytes is None else available_bytes
    try:
        found = list(_weighed(recipe, available))
    except Exception:  # a failure here must not hide the error that asks for advice
        return [Remedy(kind[-1][0], None, None, None) for kind in _kinds(recipe) if kind]
    helpful = [remedy for remedy in found if (remedy.saves_bytes or 0) > 0]
    fit = [remedy for remedy in helpful if remedy.fits]
    rest = [remedy for remedy in helpful if not remedy.fits]
    return fit + sorted(rest, key=lambda remedy: remedy.total_bytes or 0)


def gpu_bytes(recipe: Recipe) -> int | None:
    """The memory of the smallest of the recipe's GPUs on this machine; None if it computes on the CPU."""
    if not is_for_gpu(recipe) or not torch.cuda.is_available():
        return None
    there = range(torch.cuda.device_count())
    gpus = recipe.train.gpus
    chosen = gpus if isinstance(gpus, list) else range(processes(recipe.train))
    sizes = [torch.cuda.get_device_properties(n).total_memory for n in chosen if n in there]
    return min(sizes, default=None)


def _weighed(recipe: Recipe, available: int | None) -> Iterator[Remedy]:
    """The smallest change of each kind that fits, or the largest one if none fits."""
    planner = Planner(recipe)
    before = planner.parts().total

    def weigh(kind: list[Change]) -> Remedy | None:
        remedy = None
        for flag, changed in kind if available is not None else kind[-1:]:
            try:
                total = planner.of(changed).parts().total
            except PtpError:  # for example, the base has fewer layers
                continue
            fits = None if available is None else total <= available
            remedy = Remedy(flag, before - total, total, fits)
            if fits:
                break
        return remedy

    found = [remedy for kind in _kinds(recipe) if (remedy := weigh(kind)) is not None]
    for kinds in (_KEEP_RESULTS[:2], _KEEP_RESULTS):
        if any(remedy.fits for remedy in found):
            break
        if (remedy := weigh(_together(recipe, *kinds))) is not None:
            found.append(remedy)
    yield from found


def _kinds(recipe: Recipe) -> list[list[Change]]:
    """The changes by kind. Kinds, and changes within a kind, start with the one that changes least."""
    return [
        _checkpointing(recipe),
        _smaller_batches(recipe),
        _fewer_bits(recipe),
        _shorter(recipe),
        _fewer_layers(recipe),
        _another_method(recipe),
    ]


def _checkpointing(recipe: Recipe) -> list[Change]:
    if recipe.train.gradient_checkpointing or recipe.adapter.method in IN_THE_CACHE:
        return []
    return [("--gradient-checkpointing", _train(recipe, gradient_checkpointing=True))]


def _smaller_batches(recipe: Recipe) -> list[Change]:
    """Half the rows, a quarter, … the fewest; the optimizer step keeps its number of rows."""
    section = recipe.train
    rows, all_rows = section.batch_size, section.batch_size * section.gradient_accumulation
    found = []
    while rows > recipe.least_batch:
        rows = max(recipe.least_batch, rows // 2 if rows % 2 == 0 else 1)
        times = all_rows // rows
        changed = _train(recipe, batch_size=rows, gradient_accumulation=times)
        found.append((f"--batch-size {rows} --gradient-accumulation {times}", changed))
    return found


def _fewer_bits(recipe: Recipe) -> list[Change]:
    if recipe.adapter.method == "full":
        return []
    return [
        (
            f"--bits {bits}",
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"bits": bits})}),
        )
        for bits in (16, 8, 4)
        if bits < recipe.model.bits
    ]


def _shorter(recipe: Recipe) -> list[Change]:
    found, tokens = [], recipe.data.max_length // 2
    while tokens >= SHORTEST_TOKENS:
        data = recipe.data.model_copy(update={"max_length": tokens})
        found.append((f"--max-length {tokens}", recipe.model_copy(update={"data": data})))
        tokens //= 2
    return found


def _fewer_layers(recipe: Recipe) -> list[Change]:
    """Layers below the adapted ones save no activations."""
    if not isinstance(recipe.adapter, PrefixTuningPlus) or recipe.adapter.layers != "all":
        return []
    found = []
    for count in FEWER_LAYERS:
        adapter = recipe.adapter.model_copy(update={"layers": f"last:{count}"})
        found.append((f"--layers last:{count}", recipe.model_copy(update={"adapter": adapter})))
    return found


def _another_method(recipe: Recipe) -> list[Change]:
    if recipe.adapter.method == "prefix-tuning-plus":
        return []
    return [("--method prefix-tuning-plus", with_method(recipe, "prefix-tuning-plus"))]


def _together(recipe: Recipe, *kinds: Callable[[Recipe], list[Change]]) -> list[Change]:
    """The largest changes of the first kinds, with each change of the last kind; [] if that is only one change."""
    flags: list[str] = []
    for kind in kinds[:-1]:
        if found := kind(recipe):
            flag, recipe = found[-1]
            flags.append(flag)
    last = kinds[-1](recipe)
    if flags and last:
        return [(" ".join([*flags, flag]), changed) for flag, changed in last]
    return [(" ".join(flags), recipe)] if len(flags) > 1 else []


def _train(recipe: Recipe, **changes: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=changes)})


# Combined if no single change is enough.
_KEEP_RESULTS = (_checkpointing, _smaller_batches, _fewer_bits)

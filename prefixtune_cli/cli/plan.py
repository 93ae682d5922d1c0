"""`ptp plan`: tells how much memory a recipe takes, and whether it fits, without loading weights."""

from __future__ import annotations

import math
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.cli.flags import FLAGS, Flag, panel
from prefixtune_cli.errors import ModelError, RecipeError, UsageError

if TYPE_CHECKING:
    from prefixtune_cli.plan import MethodPlan, Remedy
    from prefixtune_cli.recipe.schema import Recipe

GIB = 2**30
GPU_MEMORY = panel(
    "Run",
    Flag(
        "--gpu-memory",
        type=float,
        metavar="GIB",
        help="Memory of each GPU, if it is not a GPU of this machine.",
    ),
)
SHOWN_REMEDIES = 4
PARTS = {
    "weights": "base weights",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "logits": "logits",
    "reserve": "framework reserve",
}


def plan(
    given: Annotated[arguments.Given, typer_options.takes(*FLAGS, *GPU_MEMORY)],
    *,
    gpu_memory: float | None = None,
    as_json: bool = False,
) -> None:
    """Tell how much memory `ptp train` with the same flags takes, by part and by method, and what fits.

    Loads no weights and reads no data: it takes rows to be as long as --max-length.
    """
    if gpu_memory is not None and not 0 < gpu_memory < math.inf:
        raise UsageError(f"--gpu-memory must be above 0, in GiB, got {gpu_memory:g}.")
    settings = given.recipe()
    if gpu_memory is not None:
        on_gpu = settings.model.model_copy(update={"device": "cuda"})
        settings = settings.model_copy(update={"model": on_gpu})

    from prefixtune_cli.cli import console
    from prefixtune_cli.recipe.aliases import resolve

    lookup.check_names_base(settings)
    resolve(settings.model.name)
    console.quiet_libraries()
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="peft")
    found = _found(settings, gpu_memory)
    if as_json:
        console.print_json(found)
    else:
        _print(settings, found)


def _found(recipe: Recipe, gpu_memory_gib: float | None) -> dict[str, Any]:
    """Everything that is printed, in JSON's types."""
    from prefixtune_cli.plan import Planner, gpu_bytes, methods_beside, remedies, with_method
    from prefixtune_cli.plan.processes import processes

    available = gpu_bytes(recipe) if gpu_memory_gib is None else int(gpu_memory_gib * GIB)
    plans: list[dict[str, Any]] = []
    problems: dict[str, str] = {}
    for method in methods_beside(recipe):
        try:
            planner = Planner(with_method(recipe, method))
            row = _row(planner.plan())
            if available is not None:
                row["fits"] = row["total_bytes"] <= available
                row["largest_batch"] = planner.largest_batch(available)
            plans.append(row)
        except (ModelError, RecipeError) as error:
            if method == recipe.adapter.method:
                raise
            problems[method] = str(error)
    chosen = next(row for row in plans if row["method"] == recipe.adapter.method)
    advice: list[Remedy] = []
    if available is not None and not chosen["fits"]:
        advice = remedies(recipe, available_bytes=available)
    return {
        "model": recipe.model.name,
        "method": recipe.adapter.method,
        "objective": recipe.train.objective,
        "batch_size": recipe.train.batch_size,
        "max_length": recipe.data.max_length,
        "gpus": processes(recipe.train),
        "parallel": recipe.train.parallel,
        "available_bytes": available,
        "plans": plans,
        "problems": problems,
        "remedies": [asdict(remedy) for remedy in advice],
    }


def _row(plan: MethodPlan) -> dict[str, Any]:
    """One method's plan, with its totals."""
    checkpointed = plan.checkpointed
    return {
        "method": plan.method,
        "bits": plan.bits,
        "bytes": asdict(plan.parts),
        "total_bytes": plan.total,
        "without_checkpointing": {**asdict(plan.plain), "total": plan.plain.total},
        "with_checkpointing": None
        if checkpointed is None
        else {**asdict(checkpointed), "total": checkpointed.total},
    }


def _print(recipe: Recipe, found: dict[str, Any]) -> None:
    from prefixtune_cli.cli import console

    plans = found["plans"]
    rows = [
        [name, *(_gib(plan["bytes"][part]) for plan in plans)]
        for part, name in PARTS.items()
        if any(plan["bytes"][part] for plan in plans)
    ]
    rows.append(["total", *(_gib(plan["total_bytes"]) for plan in plans)])
    for setting in ("without", "with"):
        for part in ("activations", "total"):
            cells = (_cell(plan[f"{setting}_checkpointing"], part) for plan in plans)
            rows.append([f"{part} {setting} checkpointing", *cells])
    if found["available_bytes"] is not None:
        rows.append(["fits", *("yes" if plan["fits"] else "no" for plan in plans)])
        rows.append(["largest batch", *(str(plan["largest_batch"]) for plan in plans)])
    per = f" on each of {found['gpus']} GPUs ({found['parallel']})" if found["gpus"] > 1 else ""
    what = "pairs of answers, each two rows" if recipe.kind == "pairs" else "rows"
    console.say(
        f"GiB{per} for {recipe.model.name} with {found['batch_size']} {what} of {found['max_length']} tokens a forward "
        "pass, at the fullest moment of a step:\n"
    )
    console.print_table(["", *(plan["method"] for plan in plans)], rows, by_column=True)
    console.say("\nShorter rows take less.")
    for method, problem in found["problems"].items():
        console.notice(f"Without {method}: {problem}")
    for line in _verdict(recipe, found):
        console.say(line)


def _verdict(recipe: Recipe, found: dict[str, Any]) -> list[str]:
    """Sentences that say whether the recipe fits, and if not, what to change."""
    available = found["available_bytes"]
    if available is None:
        where = "for a CPU" if recipe.model.device != "cuda" else "for a GPU"
        return [
            f"No GPU is named, and none is here: this is {where}. For one, type --gpu-memory GIB."
        ]
    chosen = next(plan for plan in found["plans"] if plan["method"] == found["method"])
    fits = "fits" if chosen["fits"] else "does not fit"
    rows, row = chosen["largest_batch"], "pair" if recipe.kind == "pairs" else "row"
    from prefixtune_cli.plan import MOST_ROWS

    largest = f"{rows} or more" if rows == MOST_ROWS else str(rows)
    lines = [
        f"{found['method']} {fits} a GPU of {_gib(available)} GiB: it takes {_gib(chosen['total_bytes'])} GiB. "
        + (
            f"The largest batch is {largest} {row}{'s' * (rows > 1)}."
            if rows
            else f"Not even one {row} fits."
        )
    ]
    if not chosen["fits"]:
        advice = found["remedies"][:SHOWN_REMEDIES]
        lines.append("What to change:" if advice else "No flag helps: take a smaller base.")
        lines += [f"  {_remedy_line(remedy)}" for remedy in advice]
    return lines


def _remedy_line(remedy: dict[str, Any]) -> str:
    if remedy["total_bytes"] is None:
        return str(remedy["flag"])
    verdict = "fits" if remedy["fits"] else "does not fit yet"
    return f"{remedy['flag']}   {_gib(remedy['total_bytes'])} GiB, {verdict}"


def _cell(parts: dict[str, int] | None, part: str) -> str:
    return "-" if parts is None else _gib(parts[part])


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"

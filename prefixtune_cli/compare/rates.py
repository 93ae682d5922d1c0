"""`ptp train --find-learning-rate`: short runs at a few learning rates before the long run, all on one loaded base."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory

from prefixtune_cli import model as models
from prefixtune_cli.compare.contest import NEVER, learning_rates
from prefixtune_cli.errors import TrainingError
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.tokenizer import check_base
from prefixtune_cli.train import train

RATES = 5  # each √10 times the one before; the recipe's own is in the middle
STEPS = 30
LAST = 10  # the mean loss of so many last steps is compared


def find_learning_rate(recipe: Recipe, bases: SharedBase, reporter: Reporter) -> Recipe:
    """The recipe with the best of a few learning rates around its own, or around its method's default.

    Each rate is tried in a short run with a whole schedule. The training loss of the last steps decides: their rows are
    new to the run, and the held-out rows have no part in the choice.

    Args:
        recipe: of a run of one process.
        bases: lends the base to all of these runs and to the one after them.
        reporter: hears each rate with its loss.

    Raises:
        PtpError: whatever `train` raises. A rate at which the loss is not a number is not chosen, and is no error.
        TrainingError: the loss is not a number at any of the rates.
    """
    check_base(recipe.model)
    recipe = models.with_learning_rate(recipe)
    rates = learning_rates(recipe, RATES)
    steps = min(STEPS, recipe.train.max_steps or STEPS)
    losses = {}
    with TemporaryDirectory(prefix="ptp-rates-") as folder:
        for done, rate in enumerate(rates):
            reporter.progress("learning rates", done, len(rates), {})
            losses[rate] = _loss(_at(recipe, rate), steps, Path(folder) / f"{rate:g}", bases)
            said = f"{losses[rate]:.4f}" if math.isfinite(losses[rate]) else "not a number"
            reporter.notice(f"learning rate {rate:g}: training loss {said} after {steps} steps")
    reporter.progress("learning rates", len(rates), len(rates), {})
    best = min(rates, key=losses.__getitem__)
    if not math.isfinite(losses[best]):
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise TrainingError(
            f"The loss is not a number at any of the rates {tried}. Begin with a lower one: --find-learning-rate "
            f"--learning-rate {rates[0] / 10:g}"
        )
    end = {rates[0]: "lowest", rates[-1]: "highest"}.get(best)
    edge = f" It is the {end} of them, so a better one may lie beyond." if end else ""
    reporter.notice(f"Training with --learning-rate {best:g}.{edge}")
    return _at(recipe, best)


def _at(recipe: Recipe, rate: float) -> Recipe:
    return recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"learning_rate": rate})}
    )


def _loss(recipe: Recipe, steps: int, out: Path, bases: SharedBase) -> float:
    """The mean training loss of the last steps of a short run; infinite where it is not a number."""
    short = {
        "max_steps": steps,
        "log_steps": 1,
        "eval_steps": None,
        "save_steps": NEVER,
        "save_minutes": None,
        "track": "none",
    }
    judged = {"max_rows": 1, "max_new_tokens": 1}
    run = recipe.model_copy(
        update={
            "train": recipe.train.model_copy(update=short),
            "evaluate": recipe.evaluate.model_copy(update=judged),
            "out": str(out),
        }
    )
    try:
        train(run, bases=bases)
    except TrainingError:
        return math.inf
    losses = [row["loss"] for row in RunDir(out).read_metrics() if "loss" in row]
    return fmean(losses[-LAST:])

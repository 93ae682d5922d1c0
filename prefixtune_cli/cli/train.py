"""`ptp train`: a recipe goes in, a run directory comes out."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.cli.flags import FLAGS
from prefixtune_cli.errors import LAUNCHER_PID, UsageError

if TYPE_CHECKING:
    from prefixtune_cli.evaluate.preferences import Preferences
    from prefixtune_cli.recipe.schema import DataSection, Recipe
    from prefixtune_cli.train import Summary

WORSE = 4  # the exit code of a finished and saved run whose adapter is worse than its base


def train(
    given: Annotated[arguments.Given, typer_options.takes(*FLAGS)],
    *,
    resume: str | None = None,
    overwrite: bool = False,
    find_learning_rate: bool = False,
    nodes: int | None = None,
    node_rank: int | None = None,
    rendezvous: str | None = None,
    as_json: bool = False,
) -> None:
    """Fine-tune a base model on your data.

    A flag wins over --set, which wins over the recipe, which wins over the default. The exit code is 4 if the adapter
    turns out worse than its base.
    """
    settings = given.recipe()
    if resume not in (None, "auto", "must"):
        raise UsageError(f"--resume takes no value, or auto, got --resume {resume}.")

    if find_learning_rate and (resume is not None or settings.train.gpus not in (None, 1)):
        raise UsageError(
            "--find-learning-rate is for a new run of one process. Leave out --resume and --gpus; for a run on several "
            "GPUs, give the rate that it finds as --learning-rate."
        )
    if find_learning_rate and settings.on_preferences:
        raise UsageError(
            f"--find-learning-rate does not try rates for objective {settings.train.objective} yet. Give "
            "--learning-rate, or leave both out."
        )
    _check(settings, resume, overwrite)
    if _launches(settings, nodes, node_rank, rendezvous):
        _exit_by_verdict(_saved_verdict(settings))
        return
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter

    with console.importing():
        console.quiet_libraries()
        from prefixtune_cli import train as training
        from prefixtune_cli.parallel.processes import leads
        from prefixtune_cli.shared_base import SharedBase

    bases = None
    with reporter() as shown:
        if find_learning_rate:
            from prefixtune_cli.compare.rates import find_learning_rate as found

            bases = SharedBase()
            settings = found(settings, bases, shown)
        summary = training.train(
            settings,
            resume=resume if resume == "auto" else resume is not None,
            overwrite=overwrite,
            bases=bases,
            reporter=shown,
        )
    if not leads():
        return
    if as_json:
        console.print_json(summary.to_json())
    else:
        _print_summary(summary, settings.data)
    from prefixtune_cli.parallel.processes import inside_a_launcher

    if not inside_a_launcher():  # a launcher would take this code for a failure
        _exit_by_verdict(summary.verdict)


def _saved_verdict(settings: Recipe) -> str | None:
    """The verdict of a run whose processes have ended."""
    import json

    from prefixtune_cli.run_dir import RunDir

    summary = RunDir(settings.folder).summary
    found: dict[str, str] = json.loads(summary.read_text("utf-8")) if summary.exists() else {}
    return found.get("verdict")


def _exit_by_verdict(verdict: str | None) -> None:
    if verdict == "worse":
        raise typer.Exit(WORSE)


def _check(settings: Recipe, resume: str | None, overwrite: bool) -> None:
    """Refuse inputs that do not exist and a folder that is taken, on rank 0 only, before the libraries load."""
    if (
        LAUNCHER_PID in os.environ
        or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0"
    ):
        return
    from prefixtune_cli.lock import locked
    from prefixtune_cli.run_dir import RunDir

    lookup.check(settings)
    run_dir = RunDir(settings.folder)
    with locked(run_dir.path, shared=True):  # other launchers of the run check it at the same time
        if resume is None or (resume == "auto" and not run_dir.recipe.exists()):
            run_dir.check_free(overwrite=overwrite)
        elif resume == "must":
            run_dir.check_resumable()


def _launches(
    settings: Recipe, count: int | None, rank: int | None, rendezvous: str | None
) -> bool:
    """Start the run's processes, if it has several and no launcher has started them; return whether we did."""
    train, wanted = settings.train, settings.model.device
    if (train.gpus, count, rank, rendezvous) == (None, None, None, None):
        return False
    from prefixtune_cli.parallel.devices import device, processes_here, show_only
    from prefixtune_cli.parallel.processes import inside_a_launcher

    if inside_a_launcher(of_nodes=count is not None):
        return False
    from prefixtune_cli.parallel import launch
    from prefixtune_cli.parallel.nodes import nodes
    from prefixtune_cli.run_dir import RunDir

    machines = nodes(count, rank, rendezvous)
    workers = processes_here(train.gpus, wanted)
    show_only(train.gpus)
    if workers * machines.count == 1:
        return False
    on_gpu = device(wanted).type == "cuda"
    run_dir = RunDir(settings.folder)
    launch.launch(
        sys.argv[1:], workers, machines, on_gpu=on_gpu, advice=lambda: run_dir.how_to_go_on
    )
    return True


def _print_summary(summary: Summary, data: DataSection) -> None:
    from prefixtune_cli.cli import console

    def percent(fraction: float | None) -> str:
        return "-" if fraction is None else f"{100 * fraction:.1f} %"

    share = 100 * summary.trainable_parameters / summary.total_parameters
    console.say(
        f"Trained {summary.trainable_parameters:,} of {summary.total_parameters:,} parameters ({share:.2f} %) "
        f"in {summary.steps} steps; the adapter takes {summary.adapter_bytes / 2**20:.2f} MiB."
    )
    if summary.start is not None:
        console.say(f"It went on from {summary.start}.")
    preferences = summary.preferences
    if preferences is not None:
        _print_preferences(preferences)
        console.say(f"\nThe {preferences.words[0]} answers by themselves:\n")
    else:
        console.say(f"On {summary.held_out_rows} held-out rows:\n")
    console.print_table(
        ["", "loss", "exact match"],
        [
            [name, f"{score.loss:.4f}", percent(score.exact_match)]
            for name, score in summary.scores.items()
        ],
    )
    if (moved := summary.divergence) is not None:
        console.say(
            f"\nOn these answers the adapter is {moved.value:.3f} nats a token away from the base (KL divergence, 95 % "
            f"interval {moved.low:.3f} to {moved.high:.3f})."
        )
    said = summary.why_no_exact_match
    if summary.answer_pattern is not None:
        from prefixtune_cli.evaluate.matching import rule_sentence

        said = rule_sentence(summary.answer_pattern)
    if said is not None:
        console.say(f"\n{said}")
    console.say(f"\nThe run is in {summary.run}. Next:\n")
    for command in _next_commands(summary, data):
        console.say(f"  {shlex.join(command)}")
    if data.eval is None and not (data.train or "").startswith("sample:"):
        run = shlex.quote(summary.run)
        console.say(f"\nWith test data of your own: ptp eval --run {run} --data FILE")


def _print_preferences(found: Preferences) -> None:
    from prefixtune_cli.cli import console

    unit = "nats per token" if found.is_per_token else "nats"
    rows, (better, worse) = found.rows, found.words
    console.say(f"On {found.pairs} held-out {rows} (mean log-probabilities in {unit}):\n")
    console.print_table(
        ["", f"{better} is likelier", better, worse],
        [
            [name, f"{100 * one.accuracy:.1f} %", f"{one.chosen:.2f}", f"{one.rejected:.2f}"]
            for name, one in (
                ("base", found.base),
                ("start", found.start),
                ("adapter", found.adapter),
            )
            if one is not None
        ],
    )
    against = found.compared_with
    more, reward, margin = found.accuracy_difference, found.reward_interval, found.margin_interval
    by = "adapter's reward" if found.is_per_token else f"implicit reward against the {against}"
    what, of = ("the chosen answer", "the pairs")
    if found.of_labelled:
        console.say(
            "\nEach desirable answer is compared with each undesirable one; the likelier one is so per token."
        )
        what, of = "the desirable answer", "these pairs"
    console.say(
        f"\nDifference from the {against}: {100 * more.value:+.1f} points (95 % interval {100 * more.low:+.1f} to "
        f"{100 * more.high:+.1f}). By the {by}, {what} is ahead in {100 * found.reward_accuracy:.1f} % of "
        f"{of} ({100 * reward.low:.1f} to {100 * reward.high:.1f}), by a margin of {found.margin:+.3f} "
        f"({margin.low:+.3f} to {margin.high:+.3f}). {found.title}'s loss is {found.loss:.4f}, the {against}'s "
        f"{found.reference_loss:.4f}."
    )


def _next_commands(summary: Summary, data: DataSection) -> Iterator[list[str]]:
    """The commands to type next, ready to paste."""
    run = ["--run", summary.run]
    yield ["ptp", "chat", *run]
    if asked := [part for name, text in summary.example.items() for part in (f"--{name}", text)]:
        yield ["ptp", "generate", *run, *asked]
        yield ["ptp", "generate", *run, *asked, "--no-adapter"]
    if (data.train or "").startswith("sample:"):
        if summary.preferences is None:
            yield ["ptp", "eval", *run, "--bench", "quickstart"]
    elif data.eval is not None:
        yield ["ptp", "eval", *run, "--data", data.eval]

"""`ptp compare`: methods, or finished runs, against each other."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.cli.flags import FLAGS, Flag, panel
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from prefixtune_cli.compare.comparison import Comparison
    from prefixtune_cli.compare.contest import Settings

# Flags of `ptp train` that `ptp compare` does not have, as it decides them itself.
WITHOUT = (
    "method", "feature_map", "resume", "overwrite", "nodes", "node_rank", "rendezvous", "parallel",
    "keep", "save_steps", "save_minutes", "track", "auto_batch", "find_learning_rate", "start_from",
)  # fmt: skip
CONTEST = panel(
    "Contest",
    Flag(
        "--methods",
        metavar="NAME,…",
        help="Names as for --method, also as in lora(r=8,alpha=16); the others are compared with the first.",
        offers="adapter.method",
    ),
    Flag("--seeds", type=int, help="Runs of each method: 3."),
    Flag(
        "--sweep",
        type=int,
        help="Learning rates of each method, around its default: 3. 1 is the default alone.",
    ),
    Flag("--few-shot", type=int, metavar="K", help="Train on K examples of each class."),
    Flag(
        "--feature-maps",
        metavar="NAME,…",
        help="Try each of these feature maps of Prefix-Tuning+.",
        offers="adapter.feature_map",
    ),
    Flag(
        "--grid",
        type=list[str],
        metavar="KEY=VALUE,…",
        help="Any recipe key with several values, as in adapter.layers=all,last:8. Repeatable.",
    ),
    Flag("--ood", metavar="DATA", help="Data of another distribution to test on."),
    Flag("--text", metavar="FILE", help="Unrelated text to measure forgetting on."),
    Flag(
        "--speed/--no-speed",
        type=bool,
        help="Costs alone, on random weights and without data; or no costs.",
    ),
    Flag("--rounds", type=int, help="How often costs are measured: 5."),
    Flag(
        "--prompt-tokens",
        type=int,
        help="The prompt's tokens for first token, decoding and cache: 2,048, or what the base takes.",
    ),
    Flag("--prompts", type=int, help="Prompts that are answered at once: 1."),
    Flag("--adapters", type=int, help="Adapters that are active at once: 1."),
)
RESULTS = panel(
    "Results",
    Flag("--out -o", metavar="FOLDER", help="Else compare/<model>-<data>."),
    Flag("--anyway", type=bool, help="Compare runs of different data, bases or budgets."),
    Flag("--workers", type=int, help="Processes; else one a GPU, or a core."),
    Flag("--markdown", type=bool, help="Print the table in Markdown."),
)


def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Finished run directories.", show_default=False),
    ] = None,
    *,
    given: Annotated[arguments.Given, typer_options.takes(*FLAGS, *CONTEST, *RESULTS, but=WITHOUT)],
    anyway: bool = False,
    markdown: bool = False,
    as_json: bool = False,
) -> None:
    """Compare methods on your data, or runs that are finished.

    Each method is trained on the same rows for the same number of steps, at the best of as many learning rates.
    The same command goes on where an earlier one stopped.
    """
    if runs:
        _refuse([name for name in given if name != "out"], "finished runs")
        found, folder = _of_runs(runs, anyway, given.get("out"))
    elif anyway:
        raise UsageError("--anyway is for finished runs. Leave it out, or give run directories.")
    elif given.get("speed"):
        of_training = ("seeds", "sweep", "few_shot", "ood", "text", "data", "eval_data")
        _refuse([name for name in of_training if name in given], "--speed")
        found, folder = _speed(given)
    else:
        found, folder = _trained(given)
    _print(found, markdown=markdown, as_json=as_json)
    _write(found, folder)
    if found.failed:
        raise typer.Exit(1)


def _refuse(names: list[str], where: str) -> None:
    if names:
        flag = f"--{names[0].replace('_', '-')}"
        raise UsageError(f"{flag} has no meaning for {where}. Leave it out.")


def _of_runs(runs: list[str], anyway: bool, out: str | None) -> tuple[Comparison, Path]:
    """Compare finished runs, without a heavy import."""
    from dataclasses import replace
    from pathlib import Path

    from prefixtune_cli.compare.folder import check_folder
    from prefixtune_cli.compare.runs import read_runs

    found = read_runs(runs, anyway=anyway, command=_command())
    folder = Path(out) if out else Path("compare") / found.name
    check_folder(folder)
    return replace(found, name=folder.name), folder


def _speed(given: arguments.Given) -> tuple[Comparison, Path]:
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.compare.contest import entries
    from prefixtune_cli.recipe.aliases import resolve

    settings = _settings(given)
    for entry in entries(settings):
        lookup.check_names_base(entry.recipe)
        resolve(entry.recipe.model.name)
    console.quiet_libraries()
    from prefixtune_cli.compare.costs import compare_costs

    with reporter() as shown:
        return compare_costs(settings, shown)


def _trained(given: arguments.Given) -> tuple[Comparison, Path]:
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.compare.contest import entries
    from prefixtune_cli.compare.folder import check_folder
    from prefixtune_cli.data.locate import check_text

    settings = _settings(given)
    recipe = entries(settings)[0].recipe
    lookup.check(recipe, settings.ood)
    if settings.text is not None:
        check_text(settings.text)
    check_folder(settings.folder(recipe))
    console.quiet_libraries()
    from prefixtune_cli.compare.run import compare as compare_methods

    with reporter() as shown:
        return compare_methods(settings, shown, begin=console.quiet_libraries)


def _settings(given: arguments.Given) -> Settings:
    """What was typed, as a record."""
    from dataclasses import fields

    from prefixtune_cli.compare.contest import Settings
    from prefixtune_cli.compare.grids import parse_grids, split

    asked = {one.name: given[one.name] for one in fields(Settings) if one.name in given}
    if "methods" in given:
        asked["methods"] = split(given["methods"])
    grids: dict[str, list[Any]] = {}
    if "feature_maps" in given:
        grids["adapter.feature_map"] = list(arguments.names([given["feature_maps"]]))
    grids.update(parse_grids(given.get("grid", ()), speed=bool(given.get("speed"))))
    return Settings(
        sets=given.get("set", ()),
        flags=given.settings,
        grids=grids,
        command=_command(),
        **asked,
    )


def _command() -> str:
    return shlex.join(["ptp", *sys.argv[1:]])


def _print(found: Comparison, *, markdown: bool, as_json: bool) -> None:
    from prefixtune_cli.cli import console
    from prefixtune_cli.compare import legend, table

    if as_json:
        console.print_json(found.to_json())
        return
    if markdown:
        print(table.markdown(found))
        return
    console.print_table(*table.columns(found))
    console.say("")
    for line in legend.legend(found):
        console.say(line)


def _write(found: Comparison, folder: Path) -> None:
    """Write the files; with finished runs, the pictures take longer than all the rest, so this comes last."""
    from prefixtune_cli.cli import console
    from prefixtune_cli.report import publish

    written = publish(found, folder)
    console.notice(f"Written to {folder}: {', '.join(file.name for file in written)}.")

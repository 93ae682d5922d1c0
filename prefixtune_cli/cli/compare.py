"""`ptp compare`: methods, or finished runs, against each other."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prefixtune_cli.cli import chosen, options, typed
from prefixtune_cli.cli.train import train
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from prefixtune_cli.compare.comparison import Comparison
    from prefixtune_cli.compare.contest import Settings

CONTEST, RESULTS = "Contest", "Results"
# Of `ptp train`: what a comparison decides itself.
WITHOUT = (
    "method", "feature_map", "out", "resume", "overwrite", "nodes", "node_rank", "rendezvous",
    "parallel", "keep", "save_steps", "save_minutes", "track", "auto_batch",
)  # fmt: skip
OF_A_CONTEST = ("methods", "seeds", "sweep", "few_shot", "feature_maps", "grid", "ood", "text")


@options.with_flags_of(train, WITHOUT)
def compare(
    runs: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RUN]...", help="Finished run directories.", show_default=False),
    ] = None,
    methods: Annotated[
        str | None,
        options.option(
            "--methods",
            panel=CONTEST,
            metavar="NAME,…",
            help="Names as for --method, also as in lora(r=8,alpha=16); the others are compared with the first.",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        options.option("--seeds", panel=CONTEST, metavar="N", help="Runs of each method: 3."),
    ] = None,
    sweep: Annotated[
        int | None,
        options.option(
            "--sweep",
            panel=CONTEST,
            metavar="N",
            help="Learning rates of each method, around its default: 3. 1 is the default alone.",
        ),
    ] = None,
    few_shot: Annotated[
        int | None,
        options.option(
            "--few-shot", panel=CONTEST, metavar="K", help="Train on K examples of each class."
        ),
    ] = None,
    feature_maps: Annotated[
        str | None,
        options.option(
            "--feature-maps",
            panel=CONTEST,
            metavar="NAME,…",
            help="Of Prefix-Tuning+, each of these.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        options.option(
            "--grid",
            panel=CONTEST,
            metavar="KEY=VALUE,…",
            help="Any recipe key with several values, as in adapter.layers=all,last:8. Repeatable.",
        ),
    ] = None,
    ood: Annotated[
        str | None,
        options.option(
            "--ood", panel=CONTEST, metavar="DATA", help="Data of another distribution to test on."
        ),
    ] = None,
    text: Annotated[
        str | None,
        options.option(
            "--text", panel=CONTEST, metavar="FILE", help="Unrelated text to measure forgetting on."
        ),
    ] = None,
    speed: Annotated[
        bool | None,
        options.option(
            "--speed/--no-speed",
            panel=CONTEST,
            help="Costs alone, on random weights and without data; or no costs.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        options.option("--rounds", panel=CONTEST, metavar="N", help="Of measuring costs: 5."),
    ] = None,
    prompt_tokens: Annotated[
        int | None,
        options.option(
            "--prompt-tokens",
            panel=CONTEST,
            metavar="N",
            help="Of the prompt for first token, decoding and cache: 2,048, or what the base takes.",
        ),
    ] = None,
    prompts: Annotated[
        int | None,
        options.option(
            "--prompts", panel=CONTEST, metavar="N", help="Prompts that are answered at once: 1."
        ),
    ] = None,
    adapters: Annotated[
        int | None,
        options.option(
            "--adapters", panel=CONTEST, metavar="N", help="Adapters that are active at once: 1."
        ),
    ] = None,
    anyway: Annotated[
        bool,
        options.option(
            "--anyway", panel=RESULTS, help="Compare runs of different data, bases or budgets."
        ),
    ] = False,
    workers: Annotated[
        int | None,
        options.option(
            "--workers", panel=RESULTS, metavar="N", help="Processes; else one a GPU, or a core."
        ),
    ] = None,
    out: Annotated[
        str | None,
        options.option(
            "--out", "-o", panel=RESULTS, metavar="FOLDER", help="Else compare/<model>-<data>."
        ),
    ] = None,
    markdown: Annotated[
        bool, options.option("--markdown", panel=RESULTS, help="Print the table in Markdown.")
    ] = False,
    **flags: Any,
) -> None:
    """Compare methods on your data, or runs that are finished.

    Each method is trained on the same rows for the same number of steps, at the best of as many learning rates.
    The same command goes on where an earlier one stopped.
    """
    given = {**locals(), **flags}
    if runs:
        costs = ("speed", "rounds", "prompt_tokens", "prompts", "adapters")
        others = ("recipe", "sets", *costs, "workers", *typed.KEYS)
        _refuse(given, (*OF_A_CONTEST, *others), "finished runs", ("out",))
        found, folder = _of_runs(runs, anyway, out)
    elif anyway:
        raise UsageError("--anyway is for finished runs. Leave it out, or give run directories.")
    elif speed:
        _refuse(
            given, ("seeds", "sweep", "few_shot", "ood", "text", "data", "eval_data"), "--speed"
        )
        found, folder = _speed(given)
    else:
        found, folder = _trained(given)
    _print(found, markdown=markdown, as_json=flags["as_json"])
    _write(found, folder)
    if found.failed:
        raise typer.Exit(1)


def _refuse(
    given: dict[str, Any], names: tuple[str, ...], where: str, but: tuple[str, ...] = ()
) -> None:
    extra = [name for name in names if given.get(name) is not None and name not in but]
    if extra:
        flag = "--" + {"sets": "set"}.get(extra[0], extra[0].replace("_", "-"))
        raise UsageError(f"{flag} has no meaning for {where}. Leave it out.")


def _of_runs(runs: list[str], anyway: bool, out: str | None) -> tuple[Comparison, Path]:
    """Finished runs: nothing heavy is imported."""
    from dataclasses import replace
    from pathlib import Path

    from prefixtune_cli.compare.folder import check_folder
    from prefixtune_cli.compare.runs import read_runs

    found = read_runs(runs, anyway=anyway)
    folder = Path(out) if out else Path("compare") / found.name
    check_folder(folder)
    return replace(found, name=folder.name, command=_command()), folder


def _speed(given: dict[str, Any]) -> tuple[Comparison, Path]:
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.compare.contest import entries
    from prefixtune_cli.recipe.aliases import resolve

    settings = _settings(given)
    for entry in entries(settings):
        chosen.check_names_base(entry.recipe)
        resolve(entry.recipe.model.name)
    console.quiet_libraries()
    from prefixtune_cli.compare.costs import compare_costs

    with reporter() as shown:
        return compare_costs(settings, shown)


def _trained(given: dict[str, Any]) -> tuple[Comparison, Path]:
    from prefixtune_cli.cli import console
    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.compare.contest import entries
    from prefixtune_cli.compare.folder import check_folder
    from prefixtune_cli.data.locate import check_text

    settings = _settings(given)
    recipe = entries(settings)[0].recipe
    chosen.check(recipe, settings.ood)
    if settings.text is not None:
        check_text(settings.text)
    check_folder(settings.folder(recipe))
    console.quiet_libraries()
    from prefixtune_cli.compare.run import compare as compare_methods

    with reporter() as shown:
        return compare_methods(settings, shown, begin=console.quiet_libraries)


def _settings(given: dict[str, Any]) -> Settings:
    """What was typed, as a contest takes it."""
    from prefixtune_cli.compare.contest import Settings, Typed, parse_grids, split

    grids: dict[str, list[Any]] = {}
    if given["feature_maps"] is not None:
        grids["adapter.feature_map"] = list(typed.names([given["feature_maps"]]))
    grids.update(parse_grids(given["grid"] or (), speed=bool(given["speed"])))
    chosen: dict[str, Any] = {}
    if given["methods"] is not None:
        chosen["methods"] = split(given["methods"])
    for name in (
        "seeds",
        "sweep",
        "few_shot",
        "ood",
        "text",
        "rounds",
        "prompt_tokens",
        "prompts",
        "adapters",
        "out",
        "workers",
    ):
        if given[name] is not None:
            chosen[name] = given[name]
    return Settings(
        typed=Typed(given["recipe"], given["sets"] or (), typed.overrides({**given, "out": None})),
        grids=grids,
        speed=given["speed"] is not False,
        command=_command(),
        **chosen,
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
    """What is made of the results; drawing takes longer than all the rest where runs are finished."""
    from prefixtune_cli.cli import console
    from prefixtune_cli.report import publish

    written = publish(found, folder)
    console.notice(f"Written to {folder}: {', '.join(file.name for file in written)}.")

"""`ptp eval`: compares base and adapter on benchmarks and own data."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.cli.flags import Flag, panel
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from prefixtune_cli.evaluate.settings import Settings

OF_A_BASE = ("bits", "device", "revision", "attention", "trust_remote_code")
OF_DATA = ("format", "map", "answer_pattern", "chat_template")
FLAGS = (
    *panel(
        "Who is evaluated",
        Flag(
            "--run",
            type=list[str],
            metavar="FOLDER",
            help="A run of `ptp train`; default: the newest finished one, without --model and --adapter. Repeatable.",
        ),
        Flag(
            "--model -m",
            help="A base by itself, or the adapters' base if they do not name it: tiny, an alias, a folder, a GGUF "
            "file, or a hub id.",
            offers="model.name",
        ),
        Flag(
            "--adapter",
            type=list[str],
            metavar="FOLDER",
            help="An adapter folder, on the base that it names. Repeatable.",
        ),
        Flag("--no-base", type=bool, help="Skip the base, and so the comparison with it."),
    ),
    *OF_A_BASE,
    *panel(
        "On what",
        Flag(
            "--bench -b",
            type=list[str],
            metavar="NAME,…",
            help="quickstart, forgetting, or any task, group or tag of lm-eval.",
        ),
        Flag(
            "--data -d",
            type=list[str],
            metavar="DATA",
            help="Your own test data, in any format of `ptp train`. Repeatable.",
        ),
        Flag("--text", metavar="FILE", help="The text to measure forgetting on."),
        Flag(
            "--bench-data",
            type=list[str],
            metavar="NAME=PATH",
            help="A local copy of a benchmark's data, as in mmlu=/data/mmlu. Repeatable.",
        ),
        Flag("--list", type=bool, help="List the benchmarks, and stop."),
    ),
    *OF_DATA,
    *panel(
        "How",
        Flag("--limit", type=int, help="The most items of each task."),
        Flag(
            "--num-fewshot",
            type=int,
            help="Examples before each question; default: the task's own number.",
        ),
        Flag(
            "--batch-size",
            metavar="N",
            help="Sequences a forward pass, or auto. A batch that does not fit is halved.",
        ),
        Flag(
            "--apply-chat-template",
            type=bool,
            help="Render the benchmarks' prompts with the model's chat template.",
        ),
        Flag(
            "--confirm-run-unsafe-code",
            type=bool,
            help="Allow tasks that run code written by the model.",
            called="runs_code",
        ),
        Flag("--cache", metavar="FOLDER", help="The folder for finished requests."),
        Flag("--no-cache", type=bool, help="Keep no finished requests."),
    ),
    *panel(
        "Results",
        Flag(
            "--out -o",
            metavar="FOLDER",
            help="Results go to its eval/; default: to the run's eval/, or that of runs/<model>-eval.",
        ),
        Flag(
            "--all",
            type=bool,
            help="Show the tasks of a group, too, also with --list.",
            called="show_all",
        ),
        Flag("--markdown", type=bool, help="Print the table in Markdown."),
    ),
    "as_json",
)


def eval(
    pattern: Annotated[
        str | None,
        typer.Argument(help="With --list: a part of a name, or a glob.", show_default=False),
    ] = None,
    *,
    given: Annotated[arguments.Given, typer_options.takes(*FLAGS)],
    show_all: bool = False,
    markdown: bool = False,
    as_json: bool = False,
) -> None:
    """Evaluate a base and its adapters on benchmarks and on your data, with an interval for the difference.

    Benchmarks, with their prompts, examples and metrics, are lm-eval's. Finished requests are kept on disk, so an
    interrupted evaluation can go on where it stopped.
    """
    batch_size = _batch_size(given.get("batch_size", "auto"))
    if "no_cache" in given and "cache" in given:
        raise UsageError("--cache and --no-cache contradict each other. Give one of them.")
    if pattern is not None and "list" not in given:
        if os.path.exists(pattern):
            arguments.check_extra("eval", [pattern], ("--run", "--data"))
        listing = shlex.join(["ptp", "eval", "--list", pattern])
        raise UsageError(f"What is {pattern!r}? To list benchmarks, type: {listing}")
    from prefixtune_cli.cli import console, eval_table

    if "list" in given:
        eval_table.print_benchmarks(pattern or "*", show_all=show_all, as_json=as_json)
        return
    from prefixtune_cli.cli.reporter import reporter

    settings = _settings(given, batch_size)
    settings.check()
    console.quiet_libraries()
    from prefixtune_cli.evaluate.run import evaluate

    with reporter() as shown:
        found = evaluate(settings, shown)
    eval_table.print_found(found, show_all=show_all, markdown=markdown, as_json=as_json)
    if found.failures:
        raise typer.Exit(1)


def _settings(given: arguments.Given, batch_size: int | None) -> Settings:
    """The settings of an evaluation, from what was typed."""
    from pathlib import Path

    from prefixtune_cli.evaluate.answer_cache import default_folder
    from prefixtune_cli.evaluate.settings import Settings

    of_base = given.settings.get("model", {})
    who = lookup.several(given.get("run"), given.get("model"), given.get("adapter"), **of_base)
    cache = Path(given["cache"]).expanduser() if given.get("cache") else default_folder()
    as_typed = ("text", "limit", "num_fewshot", "apply_chat_template", "runs_code")
    return Settings(
        who=tuple(who),
        data_settings=given.settings.get("data", {}),
        judging=given.settings.get("evaluate", {}),
        base="no_base" not in given,
        benches=arguments.names(given.get("bench", [])),
        data=tuple(given.get("data", ())),
        bench_data=arguments.parse_pairs("--bench-data", given.get("bench_data", [])),
        batch_size=batch_size,
        cache=None if "no_cache" in given else cache,
        out=Path(given["out"]) if given.get("out") else None,
        **{name: given[name] for name in as_typed if name in given},
    )


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"--batch-size must be auto, or a number of at least 1, got {given!r}.")
    return int(given)

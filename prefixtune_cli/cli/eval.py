"""`ptp eval`: benchmarks and own data, base against adapter."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from prefixtune_cli.cli import chosen, options, typed
from prefixtune_cli.errors import UsageError

WHO, WHAT, HOW, RESULTS = "Who is evaluated", "On what", "How", "Results"


def eval(
    pattern: Annotated[
        str | None,
        typer.Argument(help="With --list: a part of a name, or a glob.", show_default=False),
    ] = None,
    runs: Annotated[
        list[str] | None,
        options.option(
            "--run",
            panel=WHO,
            metavar="FOLDER",
            help="A run of `ptp train`; else, without --model and --adapter, the newest finished one. Repeatable.",
        ),
    ] = None,
    model: Annotated[
        str | None,
        options.option(
            "--model",
            "-m",
            panel=WHO,
            metavar="NAME",
            help="A base by itself, or the adapters' where they do not name it: tiny, an alias, a folder, a GGUF file, "
            "or a hub id.",
        ),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        options.option(
            "--adapter",
            panel=WHO,
            metavar="FOLDER",
            help="An adapter folder, on the base that it names. Repeatable.",
        ),
    ] = None,
    no_base: Annotated[
        bool, options.option("--no-base", panel=WHO, help="Skip the base: nothing to compare with.")
    ] = False,
    bits: options.Bits = None,
    device: options.Device = None,
    revision: options.Revision = None,
    attention: options.Attention = None,
    trust_remote_code: options.TrustRemoteCode = None,
    bench: Annotated[
        list[str] | None,
        options.option(
            "--bench",
            "-b",
            panel=WHAT,
            metavar="NAME,…",
            help="quickstart, forgetting, or any task, group or tag of lm-eval.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        options.option(
            "--data",
            "-d",
            panel=WHAT,
            metavar="DATA",
            help="Your own test data, in any format of `ptp train`. Repeatable.",
        ),
    ] = None,
    text: Annotated[
        str | None,
        options.option(
            "--text", panel=WHAT, metavar="FILE", help="The text that forgetting is measured on."
        ),
    ] = None,
    bench_data: Annotated[
        list[str] | None,
        options.option(
            "--bench-data",
            panel=WHAT,
            metavar="NAME=PATH",
            help="A local copy of a benchmark's data, as in mmlu=/data/mmlu. Repeatable.",
        ),
    ] = None,
    format: options.Format = None,
    map: options.Map = None,
    answer_pattern: options.AnswerPattern = None,
    chat_template: options.ChatTemplate = None,
    list_them: Annotated[
        bool, options.option("--list", panel=WHAT, help="List the benchmarks, and stop.")
    ] = False,
    limit: Annotated[
        int | None,
        options.option("--limit", panel=HOW, metavar="N", help="Most items of each task."),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        options.option(
            "--num-fewshot",
            panel=HOW,
            metavar="N",
            help="Examples before each question; else the task's own number.",
        ),
    ] = None,
    batch_size: Annotated[
        str,
        options.option(
            "--batch-size",
            panel=HOW,
            metavar="N",
            help="Sequences a forward pass, or auto. What does not fit is halved.",
        ),
    ] = "auto",
    apply_chat_template: Annotated[
        bool,
        options.option(
            "--apply-chat-template",
            panel=HOW,
            help="Render the benchmarks' prompts by the model's chat template.",
        ),
    ] = False,
    runs_code: Annotated[
        bool,
        options.option(
            "--confirm-run-unsafe-code",
            panel=HOW,
            help="Allow tasks that run code which the model writes.",
        ),
    ] = False,
    cache: Annotated[
        str | None,
        options.option(
            "--cache", panel=HOW, metavar="FOLDER", help="Where finished requests are kept."
        ),
    ] = None,
    no_cache: Annotated[
        bool, options.option("--no-cache", panel=HOW, help="Keep no finished requests.")
    ] = False,
    out: Annotated[
        str | None,
        options.option(
            "--out",
            "-o",
            panel=RESULTS,
            metavar="FOLDER",
            help="Results go to its eval/; else to the run's, or runs/<model>-eval's.",
        ),
    ] = None,
    show_all: Annotated[
        bool,
        options.option("--all", panel=RESULTS, help="Show, and list, the tasks of a group, too."),
    ] = False,
    markdown: Annotated[
        bool, options.option("--markdown", panel=RESULTS, help="Print the table in Markdown.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Evaluate a base and its adapters on benchmarks and on your data, with the interval of the difference.

    Benchmarks are lm-eval's, and its prompts, examples and metrics. Finished requests are kept on disk, so an
    interrupted evaluation goes on where it stopped.
    """
    flags = typed.overrides(
        {
            "bits": bits,
            "device": device,
            "revision": revision,
            "attention": attention,
            "trust_remote_code": trust_remote_code,
            "format": format,
            "map": map,
            "answer_pattern": answer_pattern,
            "chat_template": chat_template,
        }
    )
    size = _batch_size(batch_size)
    if no_cache and cache is not None:
        raise UsageError("--cache and --no-cache exclude each other. Give one.")
    if pattern is not None and not list_them:
        if os.path.exists(pattern):
            typed.check_extra("eval", [pattern], ("--run", "--data"))
        listing = shlex.join(["ptp", "eval", "--list", pattern])
        raise UsageError(f"What is {pattern!r}? To list benchmarks: {listing}")
    from prefixtune_cli.cli import console, eval_table

    if list_them:
        eval_table.print_benchmarks(pattern or "*", show_all=show_all, as_json=as_json)
        return
    from pathlib import Path

    from prefixtune_cli.cli.reporter import reporter
    from prefixtune_cli.evaluate.answer_cache import default_folder
    from prefixtune_cli.evaluate.settings import Settings

    settings = Settings(
        who=tuple(chosen.several(runs, model, adapters, **flags.get("model", {}))),
        data_settings=flags.get("data", {}),
        judging=flags.get("evaluate", {}),
        base=not no_base,
        benches=typed.names(bench or []),
        data=tuple(data or ()),
        text=text,
        bench_data=typed.parse_pairs("--bench-data", bench_data or []),
        limit=limit,
        num_fewshot=num_fewshot,
        batch_size=size,
        apply_chat_template=apply_chat_template,
        runs_code=runs_code,
        cache=None if no_cache else Path(cache).expanduser() if cache else default_folder(),
        out=Path(out) if out else None,
    )
    settings.check()
    console.quiet_libraries()
    from prefixtune_cli.evaluate.run import evaluate

    with reporter() as shown:
        found = evaluate(settings, shown)
    eval_table.print_found(found, show_all=show_all, markdown=markdown, as_json=as_json)
    if found.failures:
        raise typer.Exit(1)


def _batch_size(given: str) -> int | None:
    if given == "auto":
        return None
    if not given.isdecimal() or int(given) < 1:
        raise UsageError(f"--batch-size must be auto or a number from 1 on, got {given!r}.")
    return int(given)

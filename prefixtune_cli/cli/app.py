"""`ptp`: the table of commands, and how an error is reported."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from prefixtune_cli.cli import (
    arguments,
    chat,
    compare,
    console,
    eval,
    generate,
    help,
    inspect_data,
    merge,
    merge_info,
    models,
    plan,
    recipe_schema,
    recipes,
    runs,
    train,
    typer_options,
)
from prefixtune_cli.errors import LAUNCHER_PID, Interrupted, LostWorker, PtpError, ResourceError

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "plan": plan.plan,
    "eval": eval.eval,
    "compare": compare.compare,
    "inspect-data": inspect_data.inspect_data,
    "merge-info": merge_info.merge_info,
    "generate": generate.generate,
    "chat": chat.chat,
    "merge": merge.merge,
    "runs": runs.runs,
    "recipes": recipes.recipes,
    "recipe-schema": recipe_schema.recipe_schema,
    "models": models.models,
}


@functools.cache
def _built(name: str) -> Any:
    """A command with its flags."""
    alone = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    alone.command(name, cls=help.Command)(typer_options.for_typer(COMMANDS[name]))
    return typer.main.get_command(alone)


class Ptp(help.Group):
    """The commands, each built when it is called; checks and changes arguments before Typer sees them."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        return _built(cmd_name) if cmd_name in COMMANDS else super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        arguments.check_text(args)
        return super().parse_args(ctx, arguments.with_resume_value(args))


app = typer.Typer(
    cls=Ptp,
    name="ptp",
    help="Fine-tune large language models by Prefix-Tuning+.",
    epilog="`ptp COMMAND --help` explains a command. PTP_TRACEBACK=1 shows where an error comes from. "
    "Exit codes: 0 done, 1 failed, 2 wrong input (a flag, a value or a recipe).",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=help.SETTINGS,
)
for _name, _command in COMMANDS.items():  # for `ptp --help`, without flags, which need the schema
    app.command(_name, help=inspect.getdoc(_command))(lambda: None)


def _print_version(wanted: bool) -> None:
    if wanted:
        from prefixtune_cli import __version__

        print(f"ptp {__version__}")
        raise typer.Exit


@app.callback()
def _ptp(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run `ptp`. A `PtpError` prints its message, without a traceback, and sets the exit code."""
    if LAUNCHER_PID in os.environ:
        _end_quietly_while_starting()
    try:
        app(prog_name="ptp")
    except PtpError as error:
        if os.environ.get("PTP_TRACEBACK"):
            raise
        sys.exit(_tell(error))
    except OSError as error:
        # No other code has explained it: a name too long, another user's folder.
        if error.filename is None or os.environ.get("PTP_TRACEBACK"):
            raise
        why = f"{error.filename} cannot be used: {error.strerror}."
        sys.exit(_tell(ResourceError(f"{why} PTP_TRACEBACK=1 shows where.")))


def _tell(error: PtpError) -> int:
    """Print why the command ends, once for all processes of a run; return the exit code."""
    follows = "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0"
    launched = LAUNCHER_PID in os.environ
    if isinstance(error, Interrupted) and follows:
        return 0  # rank 0 says it
    # A requested stop is not an error. If a process that `ptp` started has lost the others, the launcher says why.
    is_error = not isinstance(error, Interrupted) and (
        follows or not (launched and isinstance(error, LostWorker))
    )
    said = " ".join([str(error), *getattr(error, "__notes__", ())])
    (console.error if is_error else console.notice)(said)
    return error.exit_code


def _end_quietly_while_starting() -> None:
    """Have this process, which `ptp` started, end at a signal before it has begun, with the exit code it has later."""
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0), (signal.SIGUSR1, 0)):
        signal.signal(number, lambda *_, code=code: os._exit(code))

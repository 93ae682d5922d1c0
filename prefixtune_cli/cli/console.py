"""Prints what the user reads: results on stdout, everything else on stderr.

rich is imported only when something is printed. It leaves out colours if NO_COLOR is set or the output is not a
terminal. At a terminal, lines wrap between words; elsewhere they do not wrap.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
import textwrap
from collections.abc import Iterator, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 10_000


def _console(*, stderr: bool) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPED_WIDTH
    return Console(stderr=stderr, width=width, soft_wrap=True, highlight=False)


@cache
def stdout() -> Console:
    """For results."""
    return _console(stderr=False)


@cache
def stderr() -> Console:
    """For progress and notices."""
    return _console(stderr=True)


def quiet_libraries() -> None:
    """Hide the libraries' progress bars, deprecations and hints from the user."""
    import logging
    import warnings

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    for name in ("bitsandbytes", "lm_eval"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="peft")

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within the block, libraries are imported without garbage collection, and later collections skip their objects.

    A collection that visits them takes a third of a second, and they never become garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # At the exit, Triton prints all of its objects that were not collected.
        atexit.register(gc.unfreeze)
        gc.enable()


def say(text: str, *, style: str = "") -> None:
    """Print something on stdout that belongs to a result."""
    _print(stdout(), text, style)


def notice(text: str) -> None:
    """Print something on stderr that the user may skip."""
    _print(stderr(), text, "dim")


def warning(text: str) -> None:
    """Print something on stderr that the user should know."""
    _print(stderr(), text, label="warning: ", label_style="bold yellow")


def error(text: str) -> None:
    """Print on stderr why the command fails."""
    _print(stderr(), text, label="error: ", label_style="bold red")


def _print(
    out: Console, text: str, style: str = "", *, label: str = "", label_style: str = ""
) -> None:
    """Print text. At a terminal, its lines wrap at spaces, except for commands, so that they can be pasted."""
    from rich.text import Text

    shown = f"{label}{text}"
    if out.is_terminal and not _is_command(text):
        shown = "\n".join(_wrapped(line, out.width) for line in shown.split("\n"))
    told = Text(shown, style=style)
    told.stylize(label_style, 0, len(label))
    out.print(told, soft_wrap=True)


def _is_command(text: str) -> bool:
    return text.lstrip().startswith("ptp ")


def _wrapped(line: str, width: int) -> str:
    text = line.lstrip("- ")
    if not text or _is_command(text):
        return line
    return textwrap.fill(
        line,
        width,
        subsequent_indent=" " * (len(line) - len(text)),
        break_long_words=False,
        break_on_hyphens=False,
    )


def print_json(value: Any) -> None:
    """Print a result as plain JSON on stdout, for another program."""
    from prefixtune_cli.run_dir import to_json

    print(to_json(value))


def print_table(
    columns: list[str],
    rows: list[list[str]],
    *,
    optional: Sequence[str] = (),
    by_column: bool = False,
) -> None:
    """Print a result for people: a table without rules, which `cut` and `grep` can read too.

    Args:
        columns: the head.
        rows: each has one cell a column.
        optional: columns that a narrow terminal may leave out, the first one first.
        by_column: whether a column, not a row, describes one thing, to be kept together on a narrow terminal.
    """
    from prefixtune_cli.cli.table import lay_out

    tables, left_out = lay_out(
        [columns, *rows], stdout().width, optional=optional, by_column=by_column
    )
    for i, (title, table) in enumerate(tables):
        if title:
            say(f"\n{title}" if i else title, style="bold")
        stdout().print(table, soft_wrap=False)
    if left_out:
        notice(f"Left out, as the terminal is narrow: {', '.join(left_out)}.")

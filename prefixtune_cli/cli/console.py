"""What the user reads: results on stdout, everything else on stderr.

rich is imported when something is printed, not when a command's file is. It leaves colours out where
NO_COLOR is set or nobody is at a terminal; there, lines are not wrapped either.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import sys
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

PIPED_WIDTH = 10_000


def _console(*, stderr: bool, width: int | None = None) -> Console:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = width or (None if stream.isatty() else PIPED_WIDTH)
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
    """Keep the bars, deprecations and hints of the libraries out of what the user reads."""
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
    """Within the block torch and the like are imported, and no garbage collection looks through what they make.

    Nor does a later one: it would take a third of a second each time, and nothing of it ever becomes garbage.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Triton looks at the exit for what of its own was not collected, and prints it all.
        atexit.register(gc.unfreeze)
        gc.enable()


def notice(text: str) -> None:
    """Say something on stderr that the user may skip."""
    stderr().print(text, markup=False, style="dim")


def warning(text: str) -> None:
    """Say something on stderr that the user should know."""
    _labelled("warning", "yellow", text)


def error(text: str) -> None:
    """Say on stderr why the command fails."""
    _labelled("error", "red", text)


def print_json(value: Any) -> None:
    """Print a result for another program: plain JSON on stdout."""
    from prefixtune_cli.run_dir import to_json

    print(to_json(value))


def print_table(columns: list[str], rows: list[list[str]], *, whole: bool = False) -> None:
    """Print a result for people: a table without rules, which `cut` and `grep` read as well.

    Args:
        columns: the head.
        rows: as many cells each.
        whole: no cell is folded or cut; what is too wide for the terminal runs on in its next line.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    out = _console(stderr=False, width=PIPED_WIDTH) if whole else stdout()
    out.print(table, soft_wrap=False)


def _labelled(label: str, colour: str, text: str) -> None:
    from rich.text import Text

    stderr().print(Text.assemble((f"{label}: ", f"bold {colour}"), text))

"""How `ptp` explains itself: help in sections, whole at every width.

It is plain text, so that rich is not imported, which takes 70 ms of the quarter of a second in which help answers.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from prefixtune_cli.cli import arguments

WIDEST = 120
BESIDE = 30  # a longer flag has a line of its own, above what it does
SETTINGS: dict[str, Any] = {
    "help_option_names": ["--help", "-h"],
    "max_content_width": WIDEST,
    "token_normalize_func": lambda name: name.replace("_", "-"),  # --batch_size is --batch-size
}


class Group(TyperGroup):
    """`ptp --help`: each command with the whole first paragraph of its help."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            told = {n: (c.help or "").split("\n\n")[0] for n, c in self.commands.items()}
            _write(formatter, list(told.items()))


class Command(TyperCommand):
    """A command: its help has the flags by their panels, and names of other tools' flags are answered with ours."""

    allow_extra_args = True  # so that we can say where they belong

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {flag for p in self.get_params(ctx) for flag in (*p.opts, *p.secondary_opts)}
        if not ctx.resilient_parsing:  # as the shell's completion is
            arguments.check_flags(str(self.name), args, flags)
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            arguments.check_extra(str(self.name), ctx.args, flags)
            for p in self.get_params(ctx):
                arguments.check_filled(p.opts[0], ctx.params.get(p.name))
        return rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                kind = "Options" if parameter.param_type_name == "option" else "Arguments"
                panel = getattr(parameter, "rich_help_panel", None) or kind
                sections.setdefault(panel, []).append(record)
        for panel, records in sections.items():
            with formatter.section(panel):
                _write(formatter, records)


def _write(formatter: Any, told: Sequence[tuple[str, str]]) -> None:
    """Names beside what they mean, which wraps at spaces alone: a flag's hyphens are no place to break."""
    names = min(max(len(name) for name, _ in told), BESIDE)
    margin = " " * formatter.current_indent
    width = max(formatter.width - names - len(margin) - 2, 20)
    wrapper = textwrap.TextWrapper(width, break_on_hyphens=False, break_long_words=False)
    for name, meaning in told:
        lines = wrapper.wrap(" ".join(meaning.split())) or [""]
        if len(name) > names:
            formatter.write(f"{margin}{name}\n")
            name = ""
        for line in lines:
            formatter.write(f"{margin}{name:{names}}  {line}".rstrip() + "\n")
            name = ""

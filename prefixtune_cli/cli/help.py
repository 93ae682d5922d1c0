"""Prints help: in sections, and complete at every width.

It is plain text: importing rich would add 70 ms, and help answers in a quarter of a second.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from typer.core import TyperCommand, TyperGroup

from prefixtune_cli.cli import arguments

WIDEST = 120
BESIDE = 30  # characters; a longer flag gets its own line, above its description
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
    """A command. Its help groups the flags by panel; if a flag of another tool is typed, it names ours."""

    allow_extra_args = True  # so that `check_extra` can say which flag they belong to

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{**settings, "rich_markup_mode": None})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags = {flag for p in self.get_params(ctx) for flag in (*p.opts, *p.secondary_opts)}
        if not ctx.resilient_parsing:  # which the shell's completion sets
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
    """Write names beside their meanings, which wrap only at spaces, so that a flag does not break at a hyphen."""
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

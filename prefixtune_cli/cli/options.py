"""How Typer sees a flag of the table in `flags`, and the options that `generate` and `chat` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from prefixtune_cli.cli.flags import FLAGS, Flag
from prefixtune_cli.cli.typed import Given

METAVARS = {int: "N", float: "X", str: "NAME"}


def option(
    *names: str, panel: str, help: str, metavar: str | None = None, offers: str | None = None
) -> Any:
    """An option of one command alone; `offers` is a recipe's key whose values the shell's completion offers."""
    return typer.Option(
        *names,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=_values_of(offers),
    )


def _values_of(key: str | None) -> Callable[[str], list[str]]:
    """What the shell's completion offers behind a flag; where that is nothing, it offers files."""

    def offered(incomplete: str) -> list[str]:
        if key is None:
            return []
        from prefixtune_cli.recipe.settings import values

        before, comma, last = incomplete.rpartition(",")  # of a list
        return [f"{before}{comma}{value}" for value in values(key) if value.startswith(last)]

    return offered


@dataclass(frozen=True)
class Takes:
    """Stands in the annotation of a parameter that holds what is typed of these flags, as `Given`."""

    flags: tuple[Flag, ...]


def takes(*flags: Flag | str, but: Collection[str] = ()) -> Takes:
    """The flags that a command takes: entries, or those of the table by their parameters' names.

    Of two of one name the last is meant. Where the command has a parameter of that name as well, it holds the flag.
    """
    found = [BY_NAME[flag] if isinstance(flag, str) else flag for flag in flags]
    by_name = {flag.parameter: flag for flag in found if flag.parameter not in but}
    return Takes(tuple(by_name.values()))


def for_typer(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer reads it: its flags spelled out, of which `Takes` and plain parameters stand for entries.

    This reads the schema, which takes time: it is done when the command is called.
    """
    own = inspect.signature(command, eval_str=True).parameters
    groups = {
        name: mark.flags
        for name, parameter in own.items()
        for mark in getattr(parameter.annotation, "__metadata__", ())
        if isinstance(mark, Takes)
    }
    taken = {flag.parameter: flag for flags in groups.values() for flag in flags}

    def spelled_out() -> Iterator[inspect.Parameter]:
        for name, parameter in own.items():
            if name in groups:
                for flag in groups[name]:
                    default = own[flag.parameter].default if flag.parameter in own else None
                    yield _parameter(flag, default, tells_default="recipe" in taken)
            elif hasattr(parameter.annotation, "__metadata__"):
                yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            elif name not in taken:
                yield _parameter(BY_NAME[name], parameter.default)

    def run(**values: Any) -> None:
        for name, flags in groups.items():
            held = [flag for flag in flags if flag.parameter not in own]
            values[name] = Given({flag: values.pop(flag.parameter) for flag in held})
        command(**values)

    run.__signature__ = inspect.Signature(list(spelled_out()))  # type: ignore[attr-defined]
    run.__doc__ = command.__doc__
    return run


def _parameter(flag: Flag, default: Any, *, tells_default: bool = False) -> inspect.Parameter:
    """A flag as a parameter for Typer; help tells the recipe's default where it is a recipe that is set."""
    kind, help = flag.type, flag.help or ""
    if flag.key is not None:
        from prefixtune_cli.recipe import settings

        kind, help = settings.kind(flag.key), help or settings.told(flag.key)
        if tells_default and (usual := settings.default(flag.key)):
            help += f"  [default: {usual}]"
    made = option(
        *flag.names.split(),
        panel=flag.panel,
        help=help,
        metavar=flag.metavar or METAVARS.get(kind),
        offers=flag.offers or flag.key,
    )
    return inspect.Parameter(
        flag.parameter,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[kind | None, made],
    )


BY_NAME = {flag.parameter: flag for flag in FLAGS}

# What `generate` and `chat` share.
Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="A run of `ptp train`; else, without --model and --adapter, the newest finished one.",
    ),
]
AdapterFolder = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="An adapter folder, on the base that it names."
    ),
]
NoAdapter = Annotated[
    bool, typer.Option("--no-adapter", help="The base alone, to see what the adapter changes.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="The longest answer.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option("--top-p", metavar="X", help="Sample from the likeliest tokens of this mass."),
]
SamplingSeed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="Seed of the sampling.")
]

"""How Typer sees a flag of the table in `flag_table`, and the options that `generate` and `chat` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import typer

from prefixtune_cli.cli.arguments import Given
from prefixtune_cli.cli.flag_table import FLAGS, Flag

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


def takes(*flags: Flag | str, but: Collection[str] = ()) -> tuple[Flag, ...]:
    """The flags of a command, for the annotation of its parameter `given`, which holds what was typed of them.

    Args:
        flags: entries, or parameters' names of the table's; of two for one parameter the last is meant, in place of
            the first.
        but: parameters' names of those that are left out.
    """
    found = [BY_NAME[flag] if isinstance(flag, str) else flag for flag in flags]
    return tuple({f.parameter: f for f in found if f.parameter not in but}.values())


def for_typer(command: Callable[..., None]) -> Callable[..., None]:
    """A command as Typer reads it: its flags spelled out.

    A parameter without an annotation of Typer's is a flag: one that `given` takes, or else the table's of that name.
    This reads the schema, which takes time: it is done when the command is called.
    """
    own = inspect.signature(command, eval_str=True).parameters
    taken: tuple[Flag, ...] = own["given"].annotation.__metadata__[0] if "given" in own else ()
    names = [flag.parameter for flag in taken]

    def spelled_out() -> Iterator[inspect.Parameter]:
        for name, parameter in own.items():
            if name == "given":
                for flag in taken:
                    default = own[flag.parameter].default if flag.parameter in own else None
                    yield _parameter(flag, default, tells_default="recipe" in names)
            elif hasattr(parameter.annotation, "__metadata__"):
                yield parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            elif name not in names:
                yield _parameter(BY_NAME[name], parameter.default)

    def run(**values: Any) -> None:
        held = [flag for flag in taken if flag.parameter not in own]
        given = Given({flag: values.pop(flag.parameter, None) for flag in held})
        command(**values, **({"given": given} if "given" in own else {}))

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

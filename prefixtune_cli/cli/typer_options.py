"""Turns flags of `flags` into Typer's options; also has the options that `generate` and `chat` share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any

import typer

from prefixtune_cli.cli.arguments import Given
from prefixtune_cli.cli.flags import FLAGS, Flag

METAVARS = {int: "N", float: "X", str: "NAME"}


def option(
    *names: str, panel: str, help: str, metavar: str | None = None, offers: str | None = None
) -> Any:
    """An option of Typer's; the shell's completion offers the values of the recipe's key `offers`."""
    return typer.Option(
        *names,
        help=help,
        metavar=metavar,
        rich_help_panel=panel,
        show_default=False,
        autocompletion=_values_of(offers),
    )


def _values_of(key: str | None) -> Callable[[str], list[str]]:
    """What the shell's completion offers after a flag; if that is nothing, the shell offers files."""

    def offered(incomplete: str) -> list[str]:
        if key is None:
            return []
        from prefixtune_cli.recipe.settings import values

        before, comma, last = incomplete.rpartition(",")  # of a list
        return [f"{before}{comma}{value}" for value in values(key) if value.startswith(last)]

    return offered


def takes(*flags: Flag | str, but: Collection[str] = ()) -> tuple[Flag, ...]:
    """The flags of a command, for the annotation of its parameter `given`, which gets their typed values.

    Args:
        flags: flags, or parameter names of flags in the table. If two have one parameter, the last replaces the first.
        but: parameter names of flags to leave out.
    """
    found = [BY_NAME[flag] if isinstance(flag, str) else flag for flag in flags]
    return tuple({f.parameter: f for f in found if f.parameter not in but}.values())


def for_typer(command: Callable[..., None]) -> Callable[..., None]:
    """A command for Typer, with one parameter for each of its flags.

    A parameter that has no annotation of Typer's is a flag: one of those that `given` takes, or the table's flag of
    that name. This reads the schema, which takes time, so it runs only when the command is called.
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
    """A flag as a parameter for Typer; if `tells_default`, its help has the recipe's default."""
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

# The options that `generate` and `chat` share.
Run = Annotated[
    str | None,
    typer.Option(
        "--run",
        metavar="FOLDER",
        help="A run of `ptp train`; default: the newest finished one, without --model and --adapter.",
    ),
]
AdapterFolder = Annotated[
    str | None,
    typer.Option(
        "--adapter", metavar="FOLDER", help="An adapter folder, on the base that it names."
    ),
]
NoAdapter = Annotated[
    bool, typer.Option("--no-adapter", help="Only the base, to see what the adapter changes.")
]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system message.")]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", help="The most tokens of an answer.")
]
Temperature = Annotated[
    float, typer.Option("--temperature", metavar="X", help="0 takes the likeliest token.")
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="X",
        help="Sample from the likeliest tokens that make up this probability.",
    ),
]
SamplingSeed = Annotated[
    int, typer.Option("--seed", min=0, max=2**32 - 1, metavar="N", help="The seed for sampling.")
]

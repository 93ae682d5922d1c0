"""`ptp inspect-data`: shows what the model will see of the data, and which tokens are trained."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from prefixtune_cli.cli import arguments, lookup, typer_options
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from rich.text import Text

    from prefixtune_cli.data.inspect import Example, Inspection

OPEN, CLOSE = "⟦", "⟧"
FLAGS = (
    "data", "format", "map", "train_on", "max_length", "on_long", "chat_template", "recipe", "set",
    "model", "revision", "trust_remote_code", "seed", "objective", "start_from", "first_tokens",
)  # fmt: skip


def inspect_data(
    source: Annotated[
        str | None,
        typer.Argument(metavar="[DATA]", help="The same as --data.", show_default=False),
    ] = None,
    *,
    given: Annotated[arguments.Given, typer_options.takes(*FLAGS)],
    examples: Annotated[
        int, typer.Option("--examples", "-n", min=0, metavar="N", help="Rows to show.")
    ] = 3,
    as_json: bool = False,
) -> None:
    """Show examples as the model sees them, with trained and masked tokens, and statistics.

    Loads only the tokenizer, and needs no GPU.
    """
    if source is not None:
        if source != (data := given.get("data", source)):
            raise UsageError(f"DATA is given twice, {source!r} and --data {data!r}. Give one.")
        given.settings.setdefault("data", {})["train"] = source
    from prefixtune_cli.cli import console
    from prefixtune_cli.pointed import point_at_start
    from prefixtune_cli.recipe.aliases import resolve
    from prefixtune_cli.tokenizer import check_data, load_tokenizer

    settings = given.recipe()
    if settings.data.train is None:
        raise UsageError("No data is given. Type: ptp inspect-data FILE (or sample:NAME).")
    lookup.check_data(settings)
    resolve(settings.model.name)
    if not settings.names_base:
        console.notice(
            "These are tokens of tiny, the toy inside ptp. Give the base that you will train with --model NAME."
        )
    console.quiet_libraries()
    from prefixtune_cli.data import inspect
    from prefixtune_cli.data.load import load_rows
    from prefixtune_cli.data.tokenized_data import tokenize

    rows = load_rows(settings.data.train, settings.data, settings.kind)
    start = settings.train.start_from
    tokenizer = load_tokenizer(settings.model, start and point_at_start(start).folder)
    tokenized = tokenize(rows, tokenizer, settings.data, settings.train.first_tokens)
    inspect.check(tokenized, tokenizer)
    check_data(settings.model, tokenizer, tokenized)
    found = inspect.inspect(tokenized, tokenizer, examples=examples, seed=settings.train.seed)
    if as_json:
        console.print_json(found.as_json())
        return
    _print(found)


def _print(found: Inspection) -> None:
    from prefixtune_cli.cli import console
    from prefixtune_cli.data.inspect import facts, warnings

    out = console.stdout()
    marks = not out.is_terminal or out.no_color
    for text in found.notices:
        console.notice(text)
    for shown in found.examples:
        other = shown.rejected
        if shown.desirable is not None:
            said = ", desirable" if shown.desirable else ", undesirable"
        else:
            said = ", chosen" if other else ""
        console.say(f"── {shown.origin}{said}: {_counts(shown)}", style="bold")
        out.print(_coloured(shown, marks=marks))
        if other is not None:
            console.say(f"── rejected: {_counts(other)}", style="bold")
            out.print(_coloured(other, marks=marks))
        out.print()
    how = f"between {OPEN} and {CLOSE}" if marks else "on green"
    legend = f"Tokens {how} are trained; the others are masked."
    console.say(legend, style="dim")
    for line in facts(found.statistics):
        console.say(line)
    for line in warnings(found.statistics):
        console.warning(line)


def _counts(shown: Example) -> str:
    cut = f", cut from {shown.length}" if shown.length > shown.tokens else ""
    return f"{shown.tokens} tokens{cut}, {shown.trained_tokens} trained"


def _coloured(shown: Example, *, marks: bool) -> Text:
    """The example's text: trained spans are on green, or with `marks` in brackets."""
    from rich.text import Text

    text = Text()
    for piece, trained in shown.spans:
        if marks:
            text.append(f"{OPEN}{piece}{CLOSE}" if trained else piece)
        else:
            text.append(piece, style="bold black on green" if trained else "dim")
    return text

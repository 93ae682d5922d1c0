"""Finds what --run, --adapter and --model name, and checks that bases and data exist, before the libraries load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import ModelError, UsageError

if TYPE_CHECKING:
    from prefixtune_cli.pointed import Pointed
    from prefixtune_cli.recipe.schema import Recipe


def several(
    runs: Sequence[str] | None,
    model: str | None,
    adapters: Sequence[str] | None,
    *,
    needs_base: bool = True,
    chat_template: str | None = None,
    **settings: Any,
) -> list[Pointed]:
    """All that was named; if nothing was, the newest finished run, with a notice that says so.

    Args:
        runs, model, adapters: as typed.
        needs_base: whether the base must exist.
        chat_template: a file that must exist.
        **settings: the model section's settings; None if not typed.

    Raises:
        PtpError: see `pointed.choose`; or a base does not exist.
    """
    from prefixtune_cli.cli import console
    from prefixtune_cli.data.locate import check_exists
    from prefixtune_cli.pointed import choose
    from prefixtune_cli.recipe.aliases import resolve
    from prefixtune_cli.tokenizer import check_is_there

    if chat_template is not None:
        check_exists("The chat template", chat_template)
    typed = {key: value for key, value in settings.items() if value is not None}
    found = choose(runs=runs or (), model=model, adapters=adapters or (), typed=typed)
    for one in found if needs_base else ():
        try:
            check_is_there(one.base)
        except ModelError as error:
            if one.folder is None or model is not None:
                raise
            raise ModelError(
                f"{error} It is the base of {one.given}; if it has moved, give its new place with --model."
            ) from None
    if model is not None and not needs_base:  # check the name only
        resolve(model)
    for text in (text for one in found for text in one.notices):
        console.notice(text)
    return found


def one(run: str | None, model: str | None, adapter: str | None, **settings: Any) -> Pointed:
    """Like `several`, for a command that takes one."""
    [found] = several([run] if run else [], model, [adapter] if adapter else [], **settings)
    return found


def check_names_base(recipe: Recipe) -> None:
    """Raise UsageError if the recipe names no base: the default is only a toy."""
    if not recipe.names_base:
        raise UsageError(
            "No base model is given. Type --model NAME: an alias of `ptp models`, a folder, a GGUF file or a hub id; "
            "or --model tiny, the toy inside ptp, to try things out."
        )


def check(recipe: Recipe, *more: str | None) -> None:
    """Refuse a recipe whose base or files do not exist, and `more` data that does not exist.

    Raises:
        UsageError: the recipe has no data, or names no base.
        ModelError, DataError: the base or the data does not exist.
    """
    from prefixtune_cli.tokenizer import check_is_there

    check_data(recipe, *more)
    check_names_base(recipe)
    try:
        check_is_there(recipe.model)
    except ModelError as error:
        if (start := recipe.train.start_from) is None:
            raise
        raise ModelError(
            f"{error} If it is the base of {start} and has moved, give its new place with --model."
        ) from None


def check_data(recipe: Recipe, *more: str | None) -> None:
    """Like `check`, for the data only."""
    from prefixtune_cli.data.locate import check_exists, check_sources, named

    data = recipe.data
    check_sources(named(data.train), data.eval, *more)
    if data.chat_template is not None:
        check_exists("The chat template", data.chat_template)

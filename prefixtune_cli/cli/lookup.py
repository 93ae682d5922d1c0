"""What --run, --adapter and --model point at, said aloud where it was not typed; and checks before libraries load."""

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
    """All that is pointed at, else the newest finished run.

    Args:
        runs, model, adapters: as they were typed.
        needs_base: the base has to be there.
        chat_template: a file that has to be there.
        **settings: the model section's, None where not typed.

    Raises:
        PtpError: see `pointed.choose`; or a base is not there.
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
                f"{error} It is the base of {one.given}: where it has moved, type its new place with --model."
            ) from None
    if model is not None and not needs_base:  # of a base without its weights
        resolve(model)
    for text in (text for one in found for text in one.notices):
        console.notice(text)
    return found


def one(run: str | None, model: str | None, adapter: str | None, **settings: Any) -> Pointed:
    """The same, where it is one."""
    [found] = several([run] if run else [], model, [adapter] if adapter else [], **settings)
    return found


def check_names_base(recipe: Recipe) -> None:
    """Raise UsageError where nobody has said which base is meant: the built-in one is a toy."""
    if not recipe.names_base:
        raise UsageError(
            "No base model is given. Type --model NAME: an alias of `ptp models`, a folder, a GGUF file or a hub id; "
            "or --model tiny, the toy that comes inside ptp, to try things out."
        )


def check(recipe: Recipe, *more: str | None) -> None:
    """Refuse a recipe whose base or files are not there, and `more` data that is not.

    Raises:
        UsageError: the recipe has no data, or names no base.
        ModelError, DataError: one of them is missing.
    """
    from prefixtune_cli.tokenizer import check_is_there

    check_data(recipe, *more)
    check_names_base(recipe)
    check_is_there(recipe.model)


def check_data(recipe: Recipe, *more: str | None) -> None:
    """The same, as far as it is data."""
    from prefixtune_cli.data.locate import check_exists, check_sources, named

    data = recipe.data
    check_sources(named(data.train), data.eval, *more)
    if data.chat_template is not None:
        check_exists("The chat template", data.chat_template)

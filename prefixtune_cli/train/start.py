"""The trained adapter that a run goes on from: found, and checked before the base loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from prefixtune_cli.adapter_folder import check_goes_on
from prefixtune_cli.errors import AdapterError, ModelError, RunDirError
from prefixtune_cli.evaluate.subjects import hash_of_base, hash_of_folder
from prefixtune_cli.pointed import Pointed, base_key, point_at_start
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir


@dataclass(frozen=True)
class Start:
    """A trained adapter.

    Attributes:
        given: the run or the folder, as typed; for an unfinished run, the checkpoint that was chosen.
        folder: the adapter's.
        sha256: of its weights, settings and tokenizer.
    """

    given: str
    folder: Path
    sha256: str


def find_start(recipe: Recipe, run_dir: RunDir, reporter: Reporter) -> Start | None:
    """The adapter that a run goes on from; None if it begins with a fresh one. No weight is loaded.

    Raises:
        AdapterError, RunDirError: there is no adapter, or it does not fit the recipe.
    """
    if recipe.train.start_from is None:
        return None
    found = point_at_start(recipe.train.start_from)
    assert found.folder is not None
    for text in found.notices:
        reporter.notice(text)
    if found.folder.resolve().is_relative_to(run_dir.path.resolve()):
        raise RunDirError(
            f"The run would be written over the adapter that it goes on from, {found.given}. Give another --out."
        )
    if found.method != recipe.adapter.method:
        raise AdapterError(
            f"The adapter in {found.folder} is of method {found.method}, so training cannot go on from it with method "
            f"{recipe.adapter.method}. Type --method {found.method}, or leave --from out."
        )
    _check_base(found, recipe, reporter)
    check_goes_on(recipe.model, recipe.adapter, found.folder)
    reporter.notice(f"Going on from the adapter in {found.folder}.")
    return Start(found.given, found.folder, hash_of_folder(found.folder))


def _check_base(found: Pointed, recipe: Recipe, reporter: Reporter) -> None:
    """Refuse a base that is not the adapter's own, as far as its own is still there."""
    own, here = found.model, recipe.model
    if found.recipe is not None and (bits := found.recipe.model.bits) != here.bits:
        reporter.warning(
            f"The adapter in {found.folder} was trained on its base with {bits} bits, and goes on with {here.bits}. "
            f"Type --bits {bits} to keep them."
        )
    if own is None or base_key(own) == base_key(here):
        return
    try:
        same = hash_of_base(own) == hash_of_base(here)
    except ModelError:
        reporter.warning(
            f"The base of the adapter in {found.folder}, {own.name}, is not there, so whether {here.name} is the same "
            "one is not checked."
        )
        return
    if not same:
        raise AdapterError(
            f"The adapter in {found.folder} belongs to the base {own.name}, so training cannot go on from it on "
            f"{here.name}. Leave --model out, or leave --from out."
        )

"""`--methods` and `--grid` as they are typed: methods with settings of their own, and keys with several values."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prefixtune_cli.errors import UsageError
from prefixtune_cli.recipe import read
from prefixtune_cli.recipe.schema import canonical

# The keys and sections that no grid may vary, as all contestants share them, and what to type instead.
NO_GRID = {
    "train.seed": "--seeds sets it",
    "train.gpus": "--workers sets it",
    "train.parallel": "a cell is one process",
    "train.track": "a comparison has its own report",
    "out": "--out sets it",
    "model": "compare runs on several bases one by one",
    "data": "compare on several data sets one by one, or with --ood",
    "evaluate": "all contestants are judged alike",
}
# The keys, beside the adapter's, that costs depend on: where costs alone are measured, a grid may vary them.
OF_A_COST = (
    "model.name",
    "model.bits",
    "model.attention",
    "data.max_length",
    "train.batch_size",
    "train.gradient_checkpointing",
    "train.optimizer",
)


def parse_grids(given: Iterable[str], *, speed: bool = False) -> dict[str, list[Any]]:
    """`--grid adapter.layers=all,last:8` as {key: values}. A list is one value, as in `[0,1],[4,5]`.

    Args:
        given: what was typed.
        speed: costs alone are measured, so that the keys are the adapter's and OF_A_COST.

    Raises:
        UsageError: the text has another form, a key is given twice, or a comparison cannot vary the key.
    """
    grids: dict[str, list[Any]] = {}
    for text in given:
        key, equals, values = text.partition("=")
        key = key.strip()
        if not equals or not values.strip() or key.count(".") < 1:
            raise UsageError(
                f"--grid takes section.key=value,value, as in adapter.layers=all,last:8, got {text!r}"
            )
        if speed and not key.startswith("adapter.") and key not in OF_A_COST:
            raise UsageError(
                f"--speed takes no --grid {key}: what is measured does not depend on it. Type a setting of the "
                f"adapter, such as adapter.r, or one of {', '.join(OF_A_COST)}."
            )
        fixed = NO_GRID.get(key) or NO_GRID.get(key.partition(".")[0])
        if fixed and not speed:
            raise UsageError(f"--grid {key} makes no fair comparison: {fixed}.")
        if key in grids:
            raise UsageError(f"--grid {key} is given twice. Give all of its values at once.")
        grids[key] = [read.parse_value(part, f"--grid {key}") for part in split(values)]
    return grids


def split(text: str) -> list[str]:
    """The parts between commas; a comma within brackets does not count."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def parse_method(method: str) -> tuple[str, dict[str, Any]]:
    """`lora(r=8)` as the method's name and the settings of its adapter.

    Raises:
        UsageError: the text has another form.
    """
    name, bracket, inside = method.partition("(")
    if bracket and not inside.endswith(")"):
        raise UsageError(
            f"--methods takes names such as lora, or lora(r=8,alpha=16), got {method!r}"
        )
    settings: dict[str, Any] = {}
    for part in split(inside.removesuffix(")")):
        key, equals, value = part.partition("=")
        if not (key.strip() and equals and value.strip()):
            raise UsageError(f"--methods takes settings as in lora(r=8,alpha=16), got {method!r}")
        settings[key.strip()] = read.parse_value(value, f"--methods {method}")
    return canonical(name.strip()), settings

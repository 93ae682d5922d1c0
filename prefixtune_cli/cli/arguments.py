"""Parses and checks what was typed: values for a recipe, forms such as FIELD=COLUMN, and wrong arguments."""

from __future__ import annotations

import io
import itertools
import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.cli.flags import FLAGS, Flag
from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from prefixtune_cli.recipe.schema import Recipe


class Given(dict[str, Any]):
    """The typed flags' values, by the names of their parameters (`lora_r` for --lora-r); others are left out.

    Attributes:
        settings: the values of flags that set a recipe, nested as a recipe is: `{"adapter": {"r": 4}}`.
    """

    def __init__(self, values: Mapping[Flag, Any]) -> None:
        """Take the value of each flag, None if it was not typed.

        Raises:
            UsageError: `--map` does not have the form FIELD=COLUMN.
        """
        typed = {flag: value for flag, value in values.items() if value is not None}
        super().__init__({flag.parameter: value for flag, value in typed.items()})
        self.settings: dict[str, Any] = {}
        for flag, value in typed.items():
            if flag.key is not None:
                *sections, last = flag.key.split(".")
                inner = self.settings
                for section in sections:
                    inner = inner.setdefault(section, {})
                inner[last] = PARSERS[flag.key](value) if flag.key in PARSERS else value

    def recipe(self) -> Recipe:
        """The recipe, from --recipe, --set, the flags and what --from brings.

        Raises:
            RecipeError: see `load.resolve`.
            AdapterError, RunDirError: see `pointed.point_at_start`.
        """
        from prefixtune_cli.pointed import settings_of_start
        from prefixtune_cli.recipe import load

        given = self.get("recipe"), self.get("set", ()), self.settings
        return load.resolve(*given, of_start=settings_of_start)


def parse_map(given: list[str]) -> dict[str, str]:
    """`--map prompt=question,completion=answer`, once or several times, as a mapping."""
    pairs = [pair.partition("=") for text in given for pair in text.split(",")]
    for left, equals, right in pairs:
        if not (left.strip() and equals and right.strip()):
            raise UsageError(
                f"--map takes FIELD=COLUMN,…, as in prompt=question,completion=answer, got {','.join(given)!r}"
            )
    fields = [left.strip() for left, _, _ in pairs]
    repeated = [field for field in fields if fields.count(field) > 1]
    if repeated:
        raise UsageError(
            f"--map names the field {repeated[0]!r} twice, in {','.join(given)!r}. Name one column for it."
        )
    return {left.strip(): right for left, _, right in pairs}  # a column's name may have spaces


def names(given: list[str]) -> tuple[str, ...]:
    """`--bench a,b --bench c` as names, each once."""
    found = [name.strip() for text in given for name in text.split(",")]
    return tuple(dict.fromkeys(name for name in found if name))


def parse_pairs(flag: str, given: list[str]) -> dict[str, str]:
    """`--bench-data mmlu=PATH`, once or several times, as a mapping; a path may hold commas and equal signs."""
    pairs = [text.partition("=") for text in given]
    for (name, equals, path), text in zip(pairs, given, strict=True):
        if not (name.strip() and equals and path.strip()):
            raise UsageError(f"{flag} takes NAME=PATH, as in mmlu=/data/mmlu, got {text!r}")
    return {name.strip(): path.strip() for name, _, path in pairs}


def parse_layers(given: str) -> str | list[int]:
    """`--layers 0,1,5` as a list; `all` and `last:4` stay as they are."""
    numbers = given.strip("[] ").split(",")
    return [int(n) for n in numbers] if all(n.strip().isdecimal() for n in numbers) else given


def parse_gpus(given: str) -> int | str | list[int]:
    """`--gpus 4` as a number, `--gpus 0,2` or `--gpus 1,` as a list; `auto` stays as it is."""
    if given.strip().isdecimal():
        return int(given)
    numbers = [part for part in given.strip("[] ").split(",") if part.strip()]
    return (
        [int(n) for n in numbers]
        if numbers and all(n.strip().isdecimal() for n in numbers)
        else given
    )


def check_flags(command: str, given: Sequence[str], known: Collection[str]) -> None:
    """Raise UsageError if flags have names from other tools; the message lists all of them with our names.

    Args:
        command: the name of the command.
        given: its arguments.
        known: its own flags, with their hyphens.
    """
    names = [text.partition("=")[0] for text in given if text.startswith("--") and len(text) > 2]
    names = [name for name in names if name.replace("_", "-") not in known]
    told = [said for name in dict.fromkeys(names) if (said := _in_our_words(name, known))]
    if told:
        head = f"`ptp {command}` has other names: " if len(told) > 1 else ""
        raise UsageError(f"{head}{' '.join(told)}")


def _in_our_words(name: str, known: Collection[str]) -> str:
    """A sentence about another tool's flag; empty if we do not know it, or this command has no such flag."""
    from prefixtune_cli.recipe.foreign import counterpart, note, why_needless

    bare = name.removeprefix("--")
    if reason := why_needless(bare):
        return f"{name} has no counterpart: {reason}."
    theirs = counterpart(bare)
    if theirs is None:
        return ""
    ours = theirs if theirs.startswith("--") else _as_flag(theirs, known)
    return f"{name} is {ours} here{note(bare)}." if ours.split()[0] in known else ""


def _as_flag(setting: str, known: Collection[str]) -> str:
    """`train.max_steps` as `--steps`, `model.bits=4` as `--bits 4`; a setting without a flag as `--set KEY=VALUE`."""
    key, _, value = setting.partition("=")
    flag = next((flag.name for flag in FLAGS if flag.key == key), None)
    if flag not in known:
        return f"--set {key}={value or 'VALUE'}"
    return f"{flag} {value}".rstrip()


def check_extra(command: str, extra: Sequence[str], known: Collection[str]) -> None:
    """Raise UsageError if a command gets an argument that it does not take; the message names the right flag."""
    if not extra:
        return
    text = extra[0]
    if text.lower() in ("true", "false"):
        raise UsageError(
            f"What is {text!r}? A switch takes no value: typing it turns it on. To turn it off, leave it out."
        )
    is_trained = any(
        os.path.isfile(Path(text) / file) for file in ("recipe.yaml", "adapter_config.json")
    )
    trained = "--run" if "--run" in known else "--from"
    flag = "--recipe" if text.endswith((".yaml", ".yml")) else trained if is_trained else "--data"
    is_file = os.path.exists(text) or (Path(text).suffix and " " not in text)
    if "--prompt" in known and not is_file:
        flag = "--prompt"
    if flag not in known:
        raise UsageError(
            f"`ptp {command}` takes no {text!r}. `ptp {command} --help` shows what it takes."
        )
    raise UsageError(
        f"What is {text!r}? Type: {shlex.join(['ptp', command, flag, text])}"
        + (" (and the rest after it)" if len(extra) > 1 else "")
    )


def check_filled(name: str, value: Any) -> None:
    """Raise UsageError if the value of a flag or an argument is empty but must not be."""
    given = value if isinstance(value, list | tuple) else [value]
    if "" in given and name not in MAY_BE_EMPTY:
        raise UsageError(f"{name} is empty. Is its value a shell variable that is not set?")


def with_resume_value(given: list[str]) -> list[str]:
    """The arguments, with `--resume must` for a bare `--resume`: in Typer, an option cannot omit its value."""
    return [
        "--resume=must" if text == "--resume" and after not in ("auto", "must") else text
        for text, after in itertools.zip_longest(given, given[1:])
    ]


def check_text(given: list[str]) -> None:
    """Raise UsageError if an argument is not UTF-8; Python stores such bytes as halves of surrogate pairs."""
    for text in given:
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UsageError(
                f"The argument {os.fsencode(text)!r} is not UTF-8. Type it in a terminal that uses UTF-8, or "
                "convert it: iconv -f latin1 -t utf-8. If it is the name of a file, rename the file."
            ) from None


def stdin_text(read: Callable[[], str]) -> str:
    """The text that `read` gets from stdin.

    Raises:
        UsageError: it is not UTF-8; later text can still be read.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        sys.stdin.reconfigure(errors="surrogateescape")
    text = read()
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"stdin is not UTF-8: it has byte 0x{ord(text[error.start]) & 0xFF:02x} after "
            f"{text[max(0, error.start - 20) : error.start]!r}. Convert it: iconv -f latin1 -t utf-8."
        ) from None
    return text


MAY_BE_EMPTY = ("--prompt", "--system", "--answer-pattern")
PARSERS: dict[str, Callable[[Any], Any]] = {
    "data.map": parse_map,
    "adapter.layers": parse_layers,
    "train.gpus": parse_gpus,
}

"""The format of a file, from the names of its columns and from `--map`.

A wrong guess costs a whole training. So if columns may be meant in two ways, they are refused, with the lines to type.
"""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Collection, Mapping

from prefixtune_cli.data.format import FORMATS, KINDS, LABELLED, PAIRS, Format, by_values, fitting
from prefixtune_cli.data.lines import Row
from prefixtune_cli.errors import DataError, OtherRowsError
from prefixtune_cli.recipe.schema import DataSection, Kind

# The fields of all formats. In a row, only the optional ones may be missing.
_ALL = (*FORMATS.values(), *PAIRS.values(), *LABELLED.values())
OPTIONAL = {name for format in _ALL for name in format.optional}
COLUMNS = dict.fromkeys(name for format in _ALL for name in format.columns)
FIELDS = (*COLUMNS, *sorted(OPTIONAL))
# Words in the names of columns that hold answers, questions, and facts about a row.
ANSWERS = {
    "answer", "category", "chosen", "class", "completion", "emotion", "gold", "intent", "label", "output", "rating",
    "reply", "response", "sentiment", "solution", "stars", "summary", "tag", "target", "topic", "translation",
}  # fmt: skip
QUESTIONS = {
    "comment", "content", "context", "document", "headline", "input", "instruction", "message", "post", "prompt",
    "query", "question", "request", "review", "sentence", "text", "tweet", "utterance",
}  # fmt: skip
ABOUT = {
    "author", "date", "dump", "file", "hash", "id", "idx", "index", "lang", "language", "license", "meta",
    "metadata", "name", "origin", "path", "source", "split", "subset", "time", "timestamp", "title", "unnamed", "url",
}  # fmt: skip


def rename(row: Row, mapping: Mapping[str, str], where: str) -> Row:
    """The row with its columns renamed by {field: column}; other columns stay.

    Raises:
        OtherRowsError: the columns of both answers of a pair, or of the label, are missing.
        DataError: the column of a field that every row needs is missing.
    """
    if not mapping:
        return row
    absent = [f for f, column in mapping.items() if column not in row and f not in OPTIONAL]
    if absent:
        own = mapping.keys() & {"chosen", "rejected", "label"}
        kind = OtherRowsError if own and own <= {*absent} else DataError
        raise missing(absent[0], mapping[absent[0]], row, where, kind)
    kept = {name: value for name, value in row.items() if name not in mapping.values()}
    return kept | {field: row[column] for field, column in mapping.items() if column in row}


def missing(
    field: str,
    column: str,
    columns: Collection[str],
    where: str,
    kind: type[DataError] = DataError,
) -> DataError:
    """The error for a column that `--map` names and the file does not have."""
    near = difflib.get_close_matches(column, columns, n=1)
    return kind(
        f"{where}: --map {field}={column} names a column that is missing; the columns are "
        f"{', '.join(columns) or 'none'}. "
        + (
            f"Did you mean --map {shlex.quote(f'{field}={near[0]}')}?"
            if near
            else "The form is --map FIELD=COLUMN."
        )
    )


def check_map(mapping: Mapping[str, str]) -> None:
    """Raise DataError for a field that no format has, with a suggestion."""
    for field, column in mapping.items():
        if field in FIELDS:
            continue
        near = difflib.get_close_matches(field.lower(), FIELDS, n=1)
        turned = [(column, field)] if column in FIELDS else []
        meant = [(near[0], column)] if near else turned
        hint = f" Did you mean --map {meant[0][0]}={meant[0][1]}?" if meant else ""
        raise DataError(
            f"--map {field}={column}: there is no field {field!r}. The form is --map FIELD=COLUMN, and the fields "
            f"are {', '.join(FIELDS)}.{hint}"
        )


def recognise(
    row: Row, mapping: Mapping[str, str], forced: str, where: str, *, kind: Kind = "answers"
) -> Format:
    """The format of rows like this one. The columns that `--map` names decide first.

    Args:
        row: one row, already renamed, or the columns of several rows with a value of each.
        mapping: {field: column}, already checked.
        forced: the format's name, or `auto`.
        where: file and line of the row.
        kind: of the rows that are wanted.

    Raises:
        OtherRowsError: the rows are of another kind.
        DataError: no format fits, the format does not have a mapped field, or a text may be half of a pair.
    """
    if kind == "labelled" and (forced in PAIRS or _are_pairs(row)):
        kind = "pairs"  # of which labelled answers can be made
    known = KINDS[kind]
    others = {f.name: f for formats in KINDS.values() for f in formats.values()}
    others = {name: f for name, f in others.items() if f not in known.values()}
    by_map = fitting(mapping.keys(), known)
    if forced in others and forced not in known:
        raise _of_another_kind(others[forced], kind, row, mapping, where)
    found = fitting(row, known) if kind == "pairs" else by_map or fitting(row, known)
    if forced in known and not (kind == "pairs" and found):
        found = [known[forced]]
    if kind == "answers" and forced == "auto" and (labelled := fitting(row, LABELLED)):
        is_truth = str(row["label"]).strip().lower() in ("true", "false")
        if "label" in mapping or is_truth:
            raise _of_another_kind(labelled[0], kind, row, mapping, where)
    if not found:
        if of_others := fitting(mapping.keys(), others) or fitting(row, others):
            closest = max(of_others, key=lambda format: len(format.columns))
            raise _of_another_kind(closest, kind, row, mapping, where)
        listed = "; ".join(f"{f.name}: {' + '.join(f.columns)}" for f in known.values())
        raise DataError(
            f"{where}: no known format has the columns {', '.join(row) or '(none)'}. The formats are {listed}. "
            f"Name the columns: {MAPS[kind] or _suggestion(row, mapping)}."
        )
    format = found[0]
    lacking = [name for name in format.columns if name not in row]
    if lacking:
        raise DataError(
            f"{where}: the format {format.name} needs the column {lacking[0]!r}; the columns are "
            f"{', '.join(row) or 'none'}. Rename one of them, in the file or with --map {lacking[0]}=COLUMN."
        )
    format = by_values(format, row)
    for field, column in mapping.items():
        if field not in (*format.columns, *format.optional):
            raise DataError(
                f"{where}: --map {field}={column}: the format is {format.name}, which has no field {field!r}; its "
                f"fields are {', '.join((*format.columns, *format.optional))}. Map these, or name another --format."
            )
    if format.name == "text" and forced not in FORMATS and not by_map:
        _refuse_a_pair(row, where)
    return format


def _are_pairs(row: Row) -> bool:
    return bool(fitting(row, PAIRS)) and not fitting(row, LABELLED)


MAPS: Mapping[Kind, str] = {
    "answers": "",
    "pairs": "--map prompt=COLUMN,chosen=COLUMN,rejected=COLUMN",
    "labelled": "--map prompt=COLUMN,completion=COLUMN,label=COLUMN",
}
_LEARN_FROM: Mapping[Kind, str] = {
    "pairs": "--objective dpo, simpo and orpo learn from pairs of answers: prompt, chosen and rejected",
    "labelled": "--objective kto learns from answers that are labelled true or false (prompt, completion and label), "
    "or from pairs of answers (prompt, chosen and rejected)",
}


def _of_another_kind(
    format: Format, wanted: Kind, row: Row, mapping: Mapping[str, str], where: str
) -> OtherRowsError:
    """The error for rows of a kind that is not wanted."""
    what = f"{where}: the format is {format.name} ({' + '.join(format.columns)})"
    if wanted != "answers":
        fits = "type --objective kto" if format.is_labelled else "leave --objective out"
        return OtherRowsError(
            f"{what}, and {_LEARN_FROM[wanted]}. Name their columns, {MAPS[wanted]}, or {fits}."
        )
    if format.is_labelled:
        name = next(name for name, f in LABELLED.items() if f is format)
        return OtherRowsError(
            f"{what}, answers that are labelled, from which `ptp train --objective kto` learns. To learn all of them "
            f"alike: --format {name}."
        )
    return OtherRowsError(
        f"{what}, pairs of answers, from which `ptp train --objective dpo` (simpo, orpo, kto) learns. To use the "
        f"chosen answers alone: {_suggestion(row, mapping)}."
    )


def notices(
    format: Format, columns: Collection[str], numbers: Collection[str], section: DataSection
) -> list[str]:
    """What the user should know about the columns of all rows, by their names in the files.

    Args:
        format: the format of the rows.
        columns: the columns in the files.
        numbers: the format's columns that hold numbers in some row.
        section: format, map and train_on are used.
    """
    how = "forced by --format" if section.format != "auto" else "recognised"
    own = {name: section.map.get(name, name) for name in (*format.columns, *format.optional)}
    used = {name: column for name, column in own.items() if column in columns}
    said = ", ".join(c if c == name else f"{c} as {name}" for name, c in used.items())
    unused = [column for column in columns if column not in used.values()]
    end = f"; not used: {', '.join(column or '(no name)' for column in unused)}." if unused else "."
    told = [f"Format: {format.name} ({how}; columns {said}){end}"]
    if numbers:
        told.append(
            f"Numbers in {' and '.join(own[name] for name in numbers)} are trained as they are written. If they "
            "stand for classes, the names of the classes are learned better."
        )
    if format.layout == "text" and section.train_on == "completion":
        told.append("A text has no completion, so every token of it is trained.")
    return told


def _refuse_a_pair(row: Row, where: str) -> None:
    """Refuse `text` beside a label, an answer or a question: it is most often half of a pair."""
    others = _others(row, "text")
    asked = [name for name in others if _words(name) & QUESTIONS]
    answers = [name for name in others if _words(name) & ANSWERS]
    is_text = (
        len(others) == 1 and isinstance(row[others[0]], str) and not _is_number(row[others[0]])
    )
    alone = others[0] if is_text else None
    if answers:
        pair = ("text", answers[0])
    elif asked:
        pair = (asked[0], "text")
    elif alone is not None:
        pair = ("text", alone)
    else:
        return
    other = pair[0] if pair[1] == "text" else pair[1]
    raise DataError(
        f"{where}: the columns text and {other} may be a question and its answer, or {other} may not be meant for "
        f"training. To learn to answer with {pair[1]}: {_map_of(*pair)}. To learn only the text, as it is: "
        "--format text."
    )


def _suggestion(row: Row, mapping: Mapping[str, str]) -> str:
    """The `--map` that fits these columns best, in the names of the file."""
    own = {mapping.get(name, name): value for name, value in row.items()}
    # In preference data, only the better one of two answers is learned.
    own = {name: value for name, value in own.items() if "rejected" not in _words(name)} or own
    lists = [name for name, value in own.items() if _is_conversation(value)]
    said = [name for name in lists if _words(name) & ANSWERS]
    if len(lists) == 2 and len(said) == 1:
        lists.remove(said[0])
        return _map_of(lists[0], said[0])
    if lists:
        return f"--map {shlex.quote(f'messages={lists[0]}')}"
    others = _others(own, "")
    answers = [name for name in others if _words(name) & ANSWERS]
    answer = answers[0] if answers else others[1] if len(others) == 2 else None
    asked = [name for name in others if name != answer]
    asked = [name for name in asked if _words(name) & QUESTIONS] or asked
    if answer is not None and asked:
        return _map_of(asked[0], answer)
    if len(own) == 1:
        return (
            f"--map {shlex.quote(f'text={others[0]}')}, if it is text"
            if others
            else "--map text=COLUMN"
        )
    return "--map prompt=COLUMN,completion=COLUMN, or --map messages=COLUMN for a list of messages"


def _is_conversation(value: object) -> bool:
    first = value[0] if isinstance(value, list) and value else None
    return isinstance(first, dict) and bool({"role", "from"} & first.keys())


def _others(row: Row, name: str) -> list[str]:
    """The other columns that may be a question or an answer, names of classes before their numbers."""
    found = [
        column
        for column, value in row.items()
        if column != name
        and not _words(column) <= ABOUT
        and (not isinstance(value, (dict, list)) or _words(column) & ANSWERS)
    ]
    return sorted(found, key=lambda column: _is_number(row[column]))


def _is_number(value: object) -> bool:
    return re.fullmatch(r"[-+\d.,]+", str(value)) is not None


def _words(name: str) -> set[str]:
    """`labelText`, `Class Index` and `intents` as {label, text}, {class, index} and {intent}."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^\W\d_a-zA-Z]+", name)
    return {_singular(word.lower()) for word in words}


def _singular(word: str) -> str:
    for plural, end in (("ies", "y"), ("sses", "ss"), ("s", "")):
        if word.endswith(plural) and word.removesuffix(plural) + end in ANSWERS | QUESTIONS | ABOUT:
            return word.removesuffix(plural) + end
    return word


def _map_of(asked: str, answer: str) -> str:
    return f"--map {shlex.quote(f'prompt={asked},completion={answer}')}"

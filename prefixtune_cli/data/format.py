"""The formats that a data set may have, and the three common layouts that rows are converted to.

The layouts are `messages` (as message.py makes them) and `tools`; `prompt` + `completion`, with the messages
`before` them, and `tools`; or `text`. A pair of answers has the chosen one in its layout, and the other one in a column
`rejected` beside it: a completion, or the messages of the whole conversation. A labelled answer has whether it is
`desirable` beside its layout.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from prefixtune_cli.data import message
from prefixtune_cli.data.conversation import ANSWERS
from prefixtune_cli.data.field import named, text, written
from prefixtune_cli.data.lines import Row
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import Kind

Layout = Literal["messages", "prompt-completion", "text"]


@dataclass(frozen=True)
class Format:
    """A format of files: its columns, the layout that it becomes, and the conversion."""

    name: str
    columns: tuple[str, ...]
    layout: Layout
    convert: Callable[[Row, str], Row]
    optional: tuple[str, ...] = ()

    @property
    def is_of_pairs(self) -> bool:
        """Whether a row has a chosen and a rejected answer."""
        return "rejected" in self.columns

    @property
    def is_labelled(self) -> bool:
        """Whether a row says if its answer is desirable."""
        return "label" in self.columns


def _messages(column: str) -> Callable[[Row, str], Row]:
    return lambda row, where: message.conversation(_turns(row, column, where), row, where)


def _turns(row: Row, column: str, where: str, first: int = 1) -> list[Row]:
    """The messages of a column, checked; `first` is the number of its first one."""
    turns = row[column]
    if not isinstance(turns, list) or not turns:
        got = "an empty list" if turns == [] else named(turns)
        raise DataError(
            f"{where}: the column {column!r} must be a list of messages, got {got}. Write "
            '[{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}].'
        )
    return [message.checked(turn, f"{where}, message {i}") for i, turn in enumerate(turns, first)]


def _pair_of_lists(row: Row, where: str) -> Row:
    asked = _turns(row, "prompt", where)
    said = _turns(row, "completion", where, len(asked) + 1)
    return message.conversation([*asked, *said], row, where)


def _preference(row: Row, where: str) -> Row:
    chosen = _pair("prompt", "chosen")(row, where)
    return chosen | {"rejected": written(row, "rejected", where)}


def _preference_of_messages(row: Row, where: str) -> Row:
    asked = _turns(row, "prompt", where)
    said = {name: _turns(row, name, where, len(asked) + 1) for name in ("chosen", "rejected")}
    return _two_answers(asked, said["chosen"], said["rejected"], row, where)


def _preference_of_conversations(row: Row, where: str) -> Row:
    """The prompt is what both conversations begin with, but for their last messages, or a text in its own column."""
    if isinstance(row["chosen"], str) and "prompt" not in row:
        raise DataError(
            f"{where}: the answers are texts, and the column 'prompt' is missing; the columns are {', '.join(row)}. "
            "Name it: --map prompt=COLUMN."
        )
    chosen, rejected = (_turns(row, name, where) for name in ("chosen", "rejected"))
    asked = row.get("prompt")
    if isinstance(asked, str) and asked.strip() and chosen[0]["role"] in ANSWERS:
        question = message.checked({"role": "user", "content": asked}, where)
        return _two_answers([question], chosen, rejected, row, where)
    common = 0
    while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
        common += 1
    if all(turn["role"] in (*ANSWERS, "system") for turn in chosen[:common]):
        raise DataError(
            f"{where}: the columns 'chosen' and 'rejected' do not begin with the same question. Write whole "
            "conversations that differ in their answers alone, or the question in a column prompt."
        )
    return _two_answers(chosen[:common], chosen[common:], rejected[common:], row, where)


def _two_answers(
    asked: list[Row], chosen: list[Row], rejected: list[Row], row: Row, where: str
) -> Row:
    """Both conversations; no answer in their prompt is learned."""
    for name, said in (("chosen", chosen), ("rejected", rejected)):
        if not {*ANSWERS} & {turn["role"] for turn in said}:
            roles = ", ".join(turn["role"] for turn in said)
            raise DataError(
                f"{where}: the column {name!r} has no message of the role assistant behind the prompt (the roles are "
                f"{roles}). Add the answer, or remove the row."
            )
    prompt = _not_learned(asked, len(asked))["messages"]
    return message.conversation([*prompt, *chosen], row, where) | {
        "rejected": message.conversation([*prompt, *rejected], row, where)["messages"]
    }


def _pair(prompt: str, completion: str) -> Callable[[Row, str], Row]:
    def convert(row: Row, where: str) -> Row:
        return {
            "prompt": written(row, prompt, where),
            "completion": written(row, completion, where),
            "before": message.system(row, where),
            "tools": None,
        }

    return convert


def _alpaca(row: Row, where: str) -> Row:
    instruction = text(row, "instruction", where)
    context = text(row, "input", where) if row.get("input") is not None else ""
    return {
        "prompt": f"{instruction}\n\n{context}" if context else instruction,
        "completion": written(row, "output", where),
        "before": [*message.system(row, where), *message.history(row, where)],
        "tools": message.tools(row, where),
    }


# In order of preference, if columns fit more than one.
FORMATS = {
    format.name: format
    for format in (
        Format("messages", ("messages",), "messages", _messages("messages"), ("system", "tools")),
        Format(
            "conversations",
            ("conversations",),
            "messages",
            _messages("conversations"),
            ("system", "tools"),
        ),
        Format(
            "prompt-completion",
            ("prompt", "completion"),
            "prompt-completion",
            _pair("prompt", "completion"),
            ("system",),
        ),
        Format(
            "alpaca",
            ("instruction", "output"),
            "prompt-completion",
            _alpaca,
            ("input", "system", "history", "tools"),
        ),
        Format(
            "question-answer",
            ("question", "answer"),
            "prompt-completion",
            _pair("question", "answer"),
            ("system",),
        ),
        Format("text", ("text",), "text", lambda row, where: {"text": text(row, "text", where)}),
    )
}

# TRL's conversational pairs, recognised by their values. Nothing in the prompt is learned.
PAIR_OF_LISTS = Format(
    "prompt-completion of messages",
    ("prompt", "completion"),
    "messages",
    _pair_of_lists,
    ("system", "tools"),
)
# Pairs of answers, as TRL has them: a prompt and two answers, as texts or as messages, or two conversations with the
# same beginning. The last are met without a column prompt, or with its text beside them.
PREFERENCE = Format(
    "preference",
    ("prompt", "chosen", "rejected"),
    "prompt-completion",
    _preference,
    ("system",),
)
PREFERENCE_OF_MESSAGES = Format(
    "preference of messages",
    PREFERENCE.columns,
    "messages",
    _preference_of_messages,
    ("system", "tools"),
)
PREFERENCE_OF_CONVERSATIONS = Format(
    "preference of conversations",
    ("chosen", "rejected"),
    "messages",
    _preference_of_conversations,
    ("system", "tools"),
)
PAIRS = {f.name: f for f in (PREFERENCE, PREFERENCE_OF_CONVERSATIONS)}


LABELLED_BY = "labelled "


def _labelled(format: Format) -> Format:
    """The same with a label. It speaks of the last answer of a conversation, so no other one is learned."""

    def convert(row: Row, where: str) -> Row:
        found = format.convert(row, where) | {"desirable": _desirable(row["label"], where)}
        return found | _last_answer_alone(found["messages"]) if "messages" in found else found

    columns = (*format.columns, "label")
    return Format(LABELLED_BY + format.name, columns, format.layout, convert, format.optional)


def _desirable(value: Any, where: str) -> bool:
    known = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    if (said := str(value).strip().lower()) not in known:
        raise DataError(
            f"{where}: the column 'label' must say whether the answer is desirable, true or false, got {named(value)}. "
            "Write true or false there, or name another column: --map label=COLUMN."
        )
    return known[said]


# By the name of the format without a label, which --format takes.
LABELLED = {name: _labelled(f) for name, f in FORMATS.items() if name != "text"}
LABELLED_LISTS = _labelled(PAIR_OF_LISTS)
WITH_MESSAGES_IN_PROMPTS = (
    PAIR_OF_LISTS,
    PREFERENCE_OF_MESSAGES,
    PREFERENCE_OF_CONVERSATIONS,
    LABELLED_LISTS,
)
KINDS: Mapping[Kind, Mapping[str, Format]] = {
    "answers": FORMATS,
    "pairs": PAIRS,
    "labelled": LABELLED,
}
READ = {
    f.name: f
    for f in (*FORMATS.values(), *PAIRS.values(), *LABELLED.values(), *WITH_MESSAGES_IN_PROMPTS)
}


def by_values(format: Format, row: Row) -> Format:
    """The format for these values: pairs of lists are conversations, other pairs are texts."""

    def are_lists(*columns: str) -> bool:
        return all(isinstance(row.get(name), list) for name in columns)

    if {*PAIR_OF_LISTS.columns} <= {*format.columns} and are_lists(*PAIR_OF_LISTS.columns):
        return LABELLED_LISTS if format.is_labelled else PAIR_OF_LISTS
    if format is PREFERENCE and are_lists("chosen", "rejected"):
        return PREFERENCE_OF_MESSAGES if are_lists("prompt") else PREFERENCE_OF_CONVERSATIONS
    return format


def fitting(columns: Collection[str], known: Mapping[str, Format] = FORMATS) -> list[Format]:
    """The formats whose columns are all there, the preferred one first."""
    return [format for format in known.values() if set(format.columns) <= set(columns)]


def convert(row: Row, format: Format, where: str, *, needs_assistant: bool) -> Row:
    """One row, already renamed, in its common layout.

    Raises:
        DataError: a column is missing, the row is of another format, or a field is not what it must be.
    """
    missing = [column for column in format.columns if column not in row]
    if missing:
        other = fitting(row, FORMATS | PAIRS)
        if other and missing != ["label"]:
            raise DataError(
                f"{where}: mixed formats. The rows before are {format.name} ({' + '.join(format.columns)}), and this "
                f"one is {other[0].name} ({', '.join(row)}). Give each format a file and a run of its own."
            )
        raise DataError(
            f"{where}: the column {missing[0]!r} is missing; the columns are {', '.join(row) or 'none'}. "
            f"Every row of the format {format.name} needs {' and '.join(format.columns)}."
        )
    converted = format.convert(row, where)
    if needs_assistant and format.layout == "messages":
        turns = converted["messages"]
        if format in (PAIR_OF_LISTS, LABELLED_LISTS):
            asked = len(turns) - len(row["completion"])
            converted |= _not_learned(turns, asked)
            turns = turns[asked:]
        roles = [turn["role"] for turn in turns]
        if not {*ANSWERS} & {*roles}:
            raise DataError(
                f"{where}: no message has the role assistant (the roles are {', '.join(roles)}), so there is nothing "
                "to train on. Add an answer, remove the row, or use --train-on all."
            )
    return converted


def unpaired(row: Row) -> list[Row]:
    """A converted pair as two labelled rows; any other row as it is."""
    if "rejected" not in row:
        return [row]
    answers = "messages" if "messages" in row else "completion"
    rest = {name: value for name, value in row.items() if name != "rejected"}
    both = [
        rest | {answers: row[name], "desirable": name == answers} for name in (answers, "rejected")
    ]
    return [one | _last_answer_alone(one["messages"]) if "messages" in one else one for one in both]


def _last_answer_alone(turns: list[Row]) -> Row:
    """The messages, of which the last answer is learned, with what stands right before it in the same turn."""
    last = max((i for i, turn in enumerate(turns) if turn["role"] in ANSWERS), default=0)
    asked = max((i for i in range(last) if turns[i]["role"] not in ANSWERS), default=0)
    return _not_learned(turns, asked)


def _not_learned(turns: list[Row], asked: int) -> Row:
    """The messages, of which no answer among the first `asked` ones is learned."""
    prompt = [t | {"trained": False} if t["role"] in ANSWERS else t for t in turns[:asked]]
    return {"messages": [*prompt, *turns[asked:]]}


def as_written(row: Row, format: str) -> Row:
    """A converted row in the form of its format. Read and converted again, it is the same.

    A question and an answer with other names become prompt and completion. Two answers of messages stand behind their
    prompt.
    """
    if "text" in row:
        return {"text": row["text"]}
    if "desirable" in row:
        plain = {name: value for name, value in row.items() if name != "desirable"}
        return as_written(plain, format.removeprefix(LABELLED_BY)) | {"label": row["desirable"]}
    tools = {"tools": json.loads(row["tools"])} if row["tools"] else {}
    if "messages" in row:
        turns = {"messages": row["messages"]}
        if "rejected" in row:
            asked = _in_common(row["messages"], row["rejected"])
            turns = {
                "prompt": row["messages"][:asked],
                "chosen": row["messages"][asked:],
                "rejected": row["rejected"][asked:],
            }
        return {k: [message.as_written(turn) for turn in v] for k, v in turns.items()} | tools
    before = row["before"] or []
    said = [turn["content"] for turn in before if turn["role"] != "system"]
    system = {"system": before[0]["content"]} if len(said) < len(before) else {}
    if "rejected" in row:
        answers = {"chosen": row["completion"], "rejected": row["rejected"]}
        return {"prompt": row["prompt"], **answers, **system}
    if format != "alpaca":
        return {"prompt": row["prompt"], "completion": row["completion"], **system}
    history = {"history": [*map(list, zip(said[::2], said[1::2], strict=True))]} if said else {}
    pair = {"instruction": row["prompt"], "output": row["completion"]}
    return {**pair, **system, **history, **tools}


def _in_common(chosen: list[Row], rejected: list[Row]) -> int:
    """The number of turns that may be the prompt of both conversations: equal ones, of which no answer is learned."""

    def last_answer(turns: list[Row]) -> int:
        return max(i for i, turn in enumerate(turns) if turn["role"] in ANSWERS)

    most = min(last_answer(chosen), last_answer(rejected))
    for i, (turn, other) in enumerate(zip(chosen[:most], rejected[:most], strict=True)):
        if turn != other or (turn["role"] in ANSWERS and turn["trained"] is not False):
            return i
    return most

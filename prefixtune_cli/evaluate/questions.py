"""Turns rows into questions for a model, or says why they cannot be questions."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune_cli.data.conversation import Conversation
from prefixtune_cli.data.load import LoadedData
from prefixtune_cli.data.row_encoder import RowEncoder
from prefixtune_cli.errors import DataError
from prefixtune_cli.evaluate.matching import compared_part
from prefixtune_cli.recipe.schema import EvaluateSection

Asked = str | list[dict[str, Any]]  # a prompt in the data's form: a text, or messages

SHORT_PROMPT = 100  # the most characters of a text shown in a command or an error
MARGIN = 1.25  # answers may be longer than the longest reference
LEAVE_OUT = "To compare no part, type --answer-pattern ''."


@dataclass(frozen=True)
class Question:
    """A row in the form that generation needs.

    Attributes:
        prompt: token ids.
        answer: the reference.
        asked: the prompt in the data's form.
        origin: the place of the row, such as `my.jsonl, line 18`.
    """

    prompt: list[int]
    answer: str
    asked: Asked = ""
    origin: str = ""


@dataclass(frozen=True)
class Questions:
    """The rows as questions, in their order; or none, and a sentence that says why.

    `room` is the most tokens of an answer. If worked answers need more than the recipe's number, `notice` says so.
    """

    asked: list[Question]
    room: int
    why_none: str | None = None
    notice: str | None = None


def short_questions(
    rows: LoadedData,
    encoder: RowEncoder,
    evaluation: EvaluateSection,
) -> Questions:
    """The rows as questions; none if a row has no answer, or if more than one answer in twenty is long.

    Args:
        rows: held-out rows.
        encoder: turned the rows into tokens.
        evaluation: an answer of `max_new_tokens` or more is long, unless `answer_pattern` finds the part that counts.

    Raises:
        DataError: there is an `answer_pattern`, but a row has no answer, or the pattern finds nothing in an answer.
    """
    room, pattern = evaluation.max_new_tokens, evaluation.answer_pattern
    if (why := _no_answers(rows)) is not None:
        if pattern is not None:
            raise DataError(f"{why}, so --answer-pattern has nothing to search. {LEAVE_OUT}")
        return Questions([], room, f"No exact match: {why}.")
    found = [
        Question(*encoder.prompt(row), asked(row), rows.row_origin(i))
        for i, row in enumerate(rows.dataset)
    ]
    lengths = sorted(
        len(encoder.tokenizer(q.answer, add_special_tokens=False)["input_ids"]) for q in found
    )
    if pattern is not None:
        _check_references(found, pattern)
        needed = math.ceil(MARGIN * lengths[-1])
        notice = f"Answers may have up to {needed} tokens: the longest reference has {lengths[-1]}."
        return Questions(found, max(room, needed), notice=notice if needed > room else None)
    if lengths[int(0.95 * (len(lengths) - 1))] >= room:
        return Questions(
            [],
            room,
            "No exact match: more than one answer in twenty has more tokens than evaluate.max_new_tokens, which is "
            f"{room}; the longest has {lengths[-1]}. If only a part of each answer counts, name it with "
            "--answer-pattern, as in --answer-pattern '#### (.*)'.",
        )
    return Questions(found, room)


def _no_answers(rows: LoadedData) -> str | None:
    if rows.layout == "text":
        return "the rows are texts, and have no answers"
    without = (i for i, row in enumerate(rows.dataset) if not _has_answer(row))
    first = next(without, None)
    return None if first is None else f"{rows.row_origin(first)} has no answer"


def _check_references(questions: Sequence[Question], pattern: str) -> None:
    lost = [q for q in questions if compared_part(q.answer, pattern) is None]
    if lost:
        answer = lost[0].answer
        shown = repr(answer if len(answer) <= SHORT_PROMPT else f"…{answer[-SHORT_PROMPT:]}")
        more = f", nor in {len(lost) - 1} more of the {len(questions)} answers" if lost[1:] else ""
        raise DataError(
            f"{lost[0].origin}: --answer-pattern {shlex.quote(pattern)} finds nothing in the answer {shown}{more}. "
            f"Give a pattern that fits all answers. {LEAVE_OUT}"
        )


def asked(row: Mapping[str, Any]) -> Asked:
    """A row's prompt in the data's form: everything before the last answer that is trained."""
    if "prompt" in row and not row["before"]:
        return str(row["prompt"])
    conversation = Conversation.of(row)
    return conversation.until(conversation.learned[-1]).messages


def example(rows: LoadedData) -> dict[str, str]:
    """A short `prompt` to try a model with, and the `system` message before it, if any; empty if no row fits."""
    every = (_single_question(row) for row in rows.dataset)
    found = [each for each in every if each and each["prompt"].strip()]
    plain = [each for each in found if each["prompt"].isprintable()]
    short = [each for each in plain if len(each["prompt"]) <= SHORT_PROMPT]
    if short:
        return short[0]
    return min(plain or found, key=lambda each: len(each["prompt"]), default={})


def _single_question(row: Mapping[str, Any]) -> dict[str, str] | None:
    """A row as `ptp generate` takes it on the command line: one question, perhaps with a system message."""
    if "text" in row:
        return {"prompt": " ".join(row["text"].split()[:6])}
    if not _has_answer(row) or Conversation.of(row).tools:
        return None
    before = asked(row)
    if isinstance(before, str):
        return {"prompt": before}
    roles = [message["role"] for message in before]
    if roles not in (["user"], ["system", "user"]):
        return None
    return {
        "prompt" if message["role"] == "user" else "system": message["content"]
        for message in before
    }


def _has_answer(row: Mapping[str, Any]) -> bool:
    return bool(Conversation.of(row).learned)

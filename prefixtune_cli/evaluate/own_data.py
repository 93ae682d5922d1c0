"""A user's own test data: loss, perplexity, exact match if answers are short, and macro-F1 if they are labels.

`prepare` does everything that needs no model, `judge` asks one model, and `compare` makes the table of several models.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.evaluate.confusion_plot import draw_confusion
from prefixtune_cli.evaluate.labels import confusion, label_codes, label_of, macro_f1
from prefixtune_cli.evaluate.losses import (
    Judged,
    check_numbers,
    compared_line,
    loss_items,
    loss_lines,
)
from prefixtune_cli.evaluate.matching import exactly_matches, match_rule, rule_sentence
from prefixtune_cli.evaluate.outcome import Line, Outcome
from prefixtune_cli.evaluate.paired import (
    Floats,
    aggregate_difference,
    aggregate_interval,
    mean_difference,
    mean_interval,
)
from prefixtune_cli.evaluate.questions import Question, short_questions
from prefixtune_cli.evaluate.read_data import ReadData, read_data
from prefixtune_cli.evaluate.scorer import Example, Scorer
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import DataSection, EvaluateSection
from prefixtune_cli.run_dir import json_line

MOST_LABELS = 100  # more distinct answers are not a set of labels


@dataclass(frozen=True)
class OwnData:
    """Test data, ready for a model.

    Attributes:
        name: the name of the evaluation, and of its files.
        read: the rows to judge, and what they are a part of.
        examples: token ids and labels of each row.
        questions: the same rows as prompts with their answers; empty if there are no answers, or if they are long.
            Then `why_none` says which.
        max_new_tokens: the most tokens of an answer; `end_id` ends one.
        pattern: finds the part of an answer that is compared with the reference.
    """

    name: str
    read: ReadData
    examples: list[Example]
    questions: list[Question]
    max_new_tokens: int
    end_id: int | None
    why_none: str | None = None
    pattern: str | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def origin(self, example: int) -> str:
        """Where an example came from."""
        return self.read.rows.row_origin(example)

    @property
    def labels(self) -> list[str]:
        """The distinct answers, sorted, if they are few and occur often enough to be labels; otherwise none."""
        found = sorted({label_of(question, self.pattern) for question in self.questions})
        few = 2 <= len(found) <= MOST_LABELS and len(self.questions) >= 2 * len(found)
        return found if few else []


def prepare(
    source: str,
    section: DataSection,
    evaluation: EvaluateSection,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    *,
    name: str,
    limit: int | None,
) -> OwnData:
    """Load, check and tokenize, before a model loads.

    Args:
        source: a file, a folder, `sample:NAME` or a hub data set id.
        section: says how to read and tokenize; its `train` and `eval` are not used.
        evaluation: gives max_new_tokens and answer_pattern.
        tokenizer: the base's.
        reporter: hears what was found.
        name: the name of the evaluation.
        limit: the most rows, evenly spread; None takes all.

    Raises:
        OtherRowsError: the rows are pairs of answers: see `own_pairs`.
        DataError: the data is missing or wrong, or no row has a token with a loss.
        ResourceError: the hub cannot be reached, or the disk is full.
        UsageError: the limit is below 1.
    """
    read = read_data(source, section, tokenizer, reporter, limit=limit)
    tokenized = read.tokenized
    questions = short_questions(read.rows, tokenized.encoder, evaluation)
    if questions.notice is not None:
        reporter.notice(questions.notice)
    return OwnData(
        name=name,
        read=read,
        examples=tokenized.dataset.select_columns(["input_ids", "labels"]).to_list(),
        questions=questions.asked,
        max_new_tokens=questions.room,
        end_id=tokenized.encoder.end_id,
        why_none=questions.why_none,
        pattern=evaluation.answer_pattern,
    )


def judge(scorer: Scorer, data: OwnData, name: str) -> Judged:
    """Ask one model; `name` is its name in progress messages.

    Raises:
        ModelError: a loss is not a number.
        ResourceError: there is too little memory or disk space.
    """
    losses = scorer.losses(data.examples, task := f"loss of {name}")
    check_numbers([nats for nats, _ in losses], task)
    answers = scorer.answers(
        data.questions,
        f"answers of {name}",
        max_new_tokens=data.max_new_tokens,
        end_id=data.end_id,
    )
    return Judged(losses, answers)


def compare(data: OwnData, judged: Mapping[str, Judged]) -> Outcome:
    """The table; if the base took part, every model is compared with it, otherwise each has its own interval.

    Args:
        data: what `prepare` returned.
        judged: model → what it did; the base is under BASE.
    """
    losses = {model: found.losses for model, found in judged.items()}
    items = loss_items([data.origin(i) for i in range(len(data))], losses)
    record: dict[str, Any] = {"data": data.read.facts, "items": items}
    lines = loss_lines(data.name, losses)
    if not data.questions:
        record["why_no_exact_match"] = str(data.why_none)
        return Outcome(data.name, lines, record, (str(data.why_none),))
    right = {model: _right(data, found.answers) for model, found in judged.items()}
    for i, (item, question) in enumerate(zip(items, data.questions, strict=True)):
        item["reference"] = question.answer
        item["right"] = {model: bool(found[i]) for model, found in right.items()}
    record["exact_match_rule"] = match_rule(data.pattern)
    lines.append(_match_line(data, right))
    notices = [rule_sentence(data.pattern)]
    files: dict[str, str | Callable[[Path], object]] = {
        f"{data.name}.answers.jsonl": _answer_rows(data, judged)
    }
    if labels := data.labels:
        codes = {
            model: label_codes(labels, data.questions, found.answers, data.pattern)
            for model, found in judged.items()
        }
        lines.append(_macro_f1_line(data, codes, len(labels)))
        notices.append(
            f"macro-F1 is the mean F1 of the {len(labels)} labels; any other answer counts as wrong for its reference."
        )
        counts = {model: confusion(found, len(labels)) for model, found in codes.items()}
        files[f"{data.name}.confusion.png"] = lambda path: draw_confusion(path, labels, counts)
    return Outcome(data.name, lines, record, tuple(notices), files)


def _right(data: OwnData, answers: Sequence[str]) -> Floats:
    """1 for a right answer, 0 for a wrong one."""
    pairs = zip(answers, data.questions, strict=True)
    hits = [exactly_matches(answer, q.answer, data.pattern) for answer, q in pairs]
    return np.array(hits, dtype=float)


def _match_line(data: OwnData, right: Mapping[str, Floats]) -> Line:
    """The line of exact match, which is called accuracy if answers are labels."""
    return compared_line(
        data.name,
        "accuracy" if data.labels else "exact match",
        len(data),
        {model: float(found.mean()) for model, found in right.items()},
        lambda a, b: mean_difference([right[b]], [right[a]]),
        lambda a: mean_interval([right[a]]),
        percent=True,
    )


def _macro_f1_line(data: OwnData, codes: Mapping[str, NDArray[np.int64]], labels: int) -> Line:
    def figure(drawn: NDArray[np.int64]) -> float:
        return macro_f1(drawn, labels)

    return compared_line(
        data.name,
        "macro-F1",
        len(data),
        {model: figure(found) for model, found in codes.items()},
        lambda a, b: aggregate_difference(codes[b], codes[a], figure),
        lambda a: aggregate_interval(codes[a], figure),
        percent=True,
    )


def _answer_rows(data: OwnData, judged: Mapping[str, Judged]) -> str:
    """The content of the answers file: one JSON object a row."""
    lines = []
    for i, question in enumerate(data.questions):
        shown = {
            "origin": question.origin,
            "prompt": question.asked,
            "reference": question.answer,
            "answers": {model: found.answers[i] for model, found in judged.items()},
        }
        lines.append(json_line(shown))
    return "".join(lines)

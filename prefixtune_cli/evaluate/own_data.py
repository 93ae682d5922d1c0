"""A user's own test data: loss, perplexity and, where answers are short, exact match; macro-F1 where they are labels.

`prepare` does all that needs no model, `judge` asks one model, and `compare` makes the table of several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.data.encode import end_of_turn_id
from prefixtune_cli.data.inspect import check, warnings
from prefixtune_cli.data.load import LoadedData, load_rows
from prefixtune_cli.data.template import chat_template
from prefixtune_cli.data.tokenize import tokenize
from prefixtune_cli.errors import UsageError
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.confusion_plot import draw_confusion
from prefixtune_cli.evaluate.finished import Finished
from prefixtune_cli.evaluate.held_out import (
    EXACT_MATCH_RULE,
    Example,
    Question,
    evenly_spread,
    exactly_matches,
    final_answer,
    row_answers,
    row_losses,
    short_questions,
)
from prefixtune_cli.evaluate.outcome import BASE, Line, Outcome
from prefixtune_cli.evaluate.paired import (
    Difference,
    Floats,
    Interval,
    Transform,
    aggregate_difference,
    aggregate_interval,
    mean_difference,
    mean_interval,
    ratio_difference,
    ratio_interval,
)
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import DataSection, EvaluateSection

MOST_LABELS = 100  # more distinct answers than these are no set of labels

Losses = Sequence[tuple[float, int]]  # a row's nats and predicted tokens


@dataclass(frozen=True)
class OwnData:
    """Test data, ready for a model.

    Attributes:
        name: of the evaluation; files are named by it.
        rows: the rows that are judged, in the order of the file.
        fingerprint: sha256 of the whole data.
        total: rows of the whole data; `skipped` of the chosen ones have no token with a loss, or were too long.
        examples: token ids and labels of each row.
        questions: the same rows as prompts with their answers; empty where there are none, or long ones.
        max_new_tokens: of an answer, which `end_id` ends.
    """

    name: str
    rows: LoadedData
    fingerprint: str
    total: int
    skipped: int
    examples: list[dict[str, list[int]]]
    questions: list[Question]
    max_new_tokens: int
    end_id: int | None

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def labels(self) -> list[str]:
        """The distinct answers, sorted, where they are few and come back; else none."""
        found = sorted({question.answer.strip() for question in self.questions})
        few = 2 <= len(found) <= MOST_LABELS and len(self.questions) >= 2 * len(found)
        return found if few else []


@dataclass(frozen=True)
class Judged:
    """What one model did: nats and predicted tokens of each row, and its answers where there are questions."""

    losses: Losses
    answers: list[str]


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
        section: how the run's data was read and tokenized; its `train` and `eval` are not used.
        evaluation: max_new_tokens is used.
        tokenizer: the base's.
        reporter: hears what was found.
        name: of the evaluation.
        limit: most rows, evenly spread; None takes all.

    Raises:
        DataError: the data is missing or wrong, or no row has a token with a loss.
        ResourceError: the hub or the disk is the trouble.
        UsageError: a limit below 1.
    """
    check_limit(limit)
    rows = load_rows(source, section)
    fingerprint, total = rows.fingerprint, len(rows)
    if limit is not None:
        rows = rows.select(evenly_spread(total, limit))
    tokenized = tokenize(rows, tokenizer, section)
    for notice in (*rows.notices, *tokenized.notices):
        reporter.notice(notice)
    for warning in warnings(tokenized.statistics):
        reporter.warning(warning)
    check(tokenized, tokenizer)
    kept = rows.select(tokenized.dataset["row"])
    chat = chat_template(tokenizer, section.chat_template) if rows.layout != "text" else None
    return OwnData(
        name=name,
        rows=kept,
        fingerprint=fingerprint,
        total=total,
        skipped=len(rows) - len(kept),
        examples=tokenized.dataset.select_columns(["input_ids", "labels"]).to_list(),
        questions=short_questions(kept, tokenizer, section, evaluation.max_new_tokens),
        max_new_tokens=evaluation.max_new_tokens,
        end_id=end_of_turn_id(tokenizer, chat),
    )


def check_limit(limit: int | None) -> None:
    """Raise UsageError for a limit below 1."""
    if limit is not None and limit < 1:
        raise UsageError(
            f"--limit must be at least 1, got {limit}. Leave it out to evaluate everything."
        )


def judge(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: OwnData,
    *,
    limit: BatchLimit,
    finished: Finished,
    name: str,
    reporter: Reporter,
) -> Judged:
    """Ask one model.

    Args:
        model: the base or the adapted model.
        tokenizer: its tokenizer.
        data: what `prepare` gave.
        limit: of a batch.
        finished: has the model's earlier answers, and keeps new ones as they come.
        name: what the reporter calls the model.
        reporter: is told how far the work is.

    Raises:
        ResourceError: the memory or the disk does not suffice.
    """
    losses = finished_losses(
        model, tokenizer, data.examples, limit, finished, f"loss of {name}", reporter
    )
    requests = [
        {
            "type": "answer",
            "input_ids": question.prompt,
            "max_new_tokens": data.max_new_tokens,
            "end_id": data.end_id,
        }
        for question in data.questions
    ]
    answers = finished.complete(
        requests,
        lambda missing, keep: row_answers(
            model,
            tokenizer,
            data.questions,
            limit,
            keep,
            max_new_tokens=data.max_new_tokens,
            end_id=data.end_id,
            rows=missing,
            task=f"answers of {name}",
            reporter=reporter,
        ),
    )
    return Judged(losses, answers)


def finished_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    limit: BatchLimit,
    finished: Finished,
    task: str,
    reporter: Reporter,
) -> Losses:
    """Nats and predicted tokens of each row, of which only those that are not kept yet are computed."""
    found = finished.complete(
        [{"type": "loss", **example} for example in examples],
        lambda missing, keep: row_losses(
            model, tokenizer, examples, limit, keep, rows=missing, task=task, reporter=reporter
        ),
    )
    return [(float(nats), int(tokens)) for nats, tokens in found]


def compare(data: OwnData, judged: Mapping[str, Judged]) -> Outcome:
    """The table: every model against the base where that is among them, else each with its own interval.

    Args:
        data: what `prepare` gave.
        judged: model → what it did; the base under BASE.
    """
    losses = {model: found.losses for model, found in judged.items()}
    origins = [data.rows.row_origin(i) for i in range(len(data))]
    items = loss_items(origins, losses)
    record = {
        "data": {
            "source": data.rows.source,
            "sha256": data.fingerprint,
            "rows": data.total,
            "evaluated": len(data),
            "skipped": data.skipped,
        },
        "items": items,
    }
    lines = loss_lines(data.name, losses)
    if not data.questions:
        why = (
            "No exact match: the rows have no answers, or more than one answer in twenty is longer than "
            f"{data.max_new_tokens} tokens (evaluate.max_new_tokens)."
        )
        return Outcome(data.name, lines, record, (why,))
    right = {model: _right(data, found.answers) for model, found in judged.items()}
    for i, (item, question) in enumerate(zip(items, data.questions, strict=True)):
        item["reference"] = question.answer
        item["right"] = {model: bool(found[i]) for model, found in right.items()}
    record["exact_match_rule"] = EXACT_MATCH_RULE
    lines.append(_match_line(data, right))
    notices = [f"An answer is right where {EXACT_MATCH_RULE}."]
    files: dict[str, str | Callable[[Path], object]] = {
        f"{data.name}.answers.jsonl": _answer_rows(data, origins, judged)
    }
    if labels := data.labels:
        codes = {model: _label_codes(data, found.answers) for model, found in judged.items()}
        lines.append(_macro_f1_line(data, codes, len(labels)))
        notices.append(
            f"macro-F1 is the mean over the {len(labels)} labels; any other answer is wrong for its reference."
        )
        counts = {model: _confusion(found, len(labels)) for model, found in codes.items()}
        files[f"{data.name}.confusion.png"] = lambda path: draw_confusion(path, labels, counts)
    return Outcome(data.name, lines, record, tuple(notices), files)


def loss_items(origins: Sequence[str], losses: Mapping[str, Losses]) -> list[dict[str, Any]]:
    """Each row's origin, predicted tokens, and every model's nats on them."""
    tokens = [count for _, count in next(iter(losses.values()))]
    return [
        {"origin": origin, "tokens": count, "nats": {m: found[i][0] for m, found in losses.items()}}
        for i, (origin, count) in enumerate(zip(origins, tokens, strict=True))
    ]


def loss_lines(name: str, losses: Mapping[str, Losses]) -> list[Line]:
    """The loss in nats a token, and the perplexity."""
    nats, tokens = zip(*(np.array(found, dtype=float).T for found in losses.values()), strict=True)
    assert all(np.array_equal(tokens[0], other) for other in tokens)
    sums = dict(zip(losses, nats, strict=True))
    return [
        ratio_line(name, "loss", sums, tokens[0]),
        ratio_line(name, "perplexity", sums, tokens[0], transform=_perplexity),
    ]


def ratio_line(
    name: str,
    metric: str,
    sums: Mapping[str, Floats],
    counts: Floats,
    *,
    transform: Transform | None = None,
) -> Line:
    """Σsums / Σcounts of every model, of which less is better."""
    ratios = {model: np.array([found.sum() / counts.sum()]) for model, found in sums.items()}
    return _line(
        name,
        metric,
        len(counts),
        {m: float((transform(r) if transform else r)[0]) for m, r in ratios.items()},
        lambda a, b: ratio_difference(sums[b], counts, sums[a], counts, transform=transform),
        lambda a: ratio_interval(sums[a], counts, transform=transform),
        higher_is_better=False,
    )


def _perplexity(loss: Floats) -> Floats:
    return np.exp(np.minimum(loss, 700))


def _line(
    name: str,
    metric: str,
    items: int,
    values: Mapping[str, float],
    difference: Callable[[str, str], Difference],
    interval: Callable[[str], Interval],
    **how: Any,
) -> Line:
    """A line with differences from the base, `difference(model, BASE)`, or with intervals where there is none."""
    if BASE in values:
        how["differences"] = {m: difference(m, BASE) for m in values if m != BASE}
    else:
        how["intervals"] = {m: interval(m) for m in values}
    return Line(name, metric, items, values, **how)


def _right(data: OwnData, answers: Sequence[str]) -> Floats:
    """1 where the answer is right, else 0."""
    pairs = zip(answers, data.questions, strict=True)
    return np.array([exactly_matches(answer, q.answer) for answer, q in pairs], dtype=float)


def _match_line(data: OwnData, right: Mapping[str, Floats]) -> Line:
    """Exact match, which is the accuracy where answers are labels."""
    return _line(
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

    return _line(
        data.name,
        "macro-F1",
        len(data),
        {model: figure(found) for model, found in codes.items()},
        lambda a, b: aggregate_difference(codes[b], codes[a], figure),
        lambda a: aggregate_interval(codes[a], figure),
        percent=True,
    )


def _label_codes(data: OwnData, answers: Sequence[str]) -> NDArray[np.int64]:
    """Each row as reference · (labels + 1) + answered label, where one more label stands for any other answer."""
    number = {label: i for i, label in enumerate(data.labels)}
    other = len(number)
    return np.array(
        [
            number.get(q.answer.strip(), other) * (other + 1)
            + number.get(final_answer(answer), other)
            for q, answer in zip(data.questions, answers, strict=True)
        ],
        dtype=np.int64,
    )


def _confusion(codes: NDArray[np.int64], labels: int) -> NDArray[np.int64]:
    """Counts [labels, labels + 1] by reference and answered label."""
    return np.bincount(codes, minlength=labels * (labels + 1)).reshape(labels, labels + 1)


def macro_f1(codes: NDArray[np.int64], labels: int) -> float:
    """The mean of the F1 of those labels that occur as references.

    Args:
        codes: of the rows, each reference · (labels + 1) + answer; the answer `labels` is none of the labels.
        labels: how many there are.
    """
    counts = _confusion(codes, labels)
    wanted, given = counts.sum(axis=1), counts[:, :labels].sum(axis=0)
    occur = wanted > 0
    return float(np.mean(2 * counts.diagonal()[occur] / (wanted + given)[occur]))


def _answer_rows(data: OwnData, origins: Sequence[str], judged: Mapping[str, Judged]) -> str:
    """The answers file: a JSON object a row."""
    lines = []
    for i, (row, origin) in enumerate(zip(data.rows.dataset, origins, strict=True)):
        prompt = row["prompt"] if "prompt" in row else _before_answer(row["messages"])
        shown = {
            "origin": origin,
            "prompt": prompt,
            "reference": data.questions[i].answer,
            "answers": {model: found.answers[i] for model, found in judged.items()},
        }
        lines.append(json.dumps(shown, ensure_ascii=False) + "\n")
    return "".join(lines)


def _before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
    return messages[:last]

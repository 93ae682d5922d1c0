"""Scores on held-out data: the loss on the trained tokens and, if answers are short, exact match."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.paired import ratio_interval
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.evaluate.scorer import Example, Scorer
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import EvaluateSection

TOKENS_A_BATCH = 8192  # bounds the memory for the logits, even for long rows

Row = TypeVar("Row")
Value = TypeVar("Value")


@dataclass(frozen=True)
class Score:
    """What one model did on the held-out data.

    Attributes:
        loss: mean cross-entropy in nats over the trained tokens.
        exact_match: fraction of the answers that equal the reference; None if answers are long.
    """

    loss: float
    exact_match: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


@dataclass(frozen=True)
class Divergence:
    """The KL divergence of an adapted model from its base, KL(adapted ‖ base), on given answers.

    Attributes:
        value: the mean over the trained tokens, in nats a token, over the whole vocabulary.
        low, high: its 95 % interval over the rows.
    """

    value: float
    low: float
    high: float


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    questions: Sequence[Question],
    section: EvaluateSection,
    *,
    end_id: int | None,
    name: str,
    processes: Processes | None = None,
    reporter: Reporter | None = None,
) -> tuple[Score, list[str]]:
    """Score one model on held-out data.

    Args:
        model: the base or the adapted model.
        tokenizer: its tokenizer.
        examples: rows of `input_ids` and `labels` (-100 for a token without a loss).
        questions: the same rows as prompts with their answers; empty if exact match makes no sense.
        section: the recipe's evaluation; for losses, a batch also has at most TOKENS_A_BATCH tokens.
        end_id: the token that ends an answer.
        name: the model's name in progress messages.
        processes: they share the rows; each has the model, and gets the whole score.
        reporter: hears the progress.

    Returns:
        The score, and the generated answers in the order of `questions`.
    """
    reporter, processes = reporter or Silent(), processes or Processes()
    rows = examples.select_columns(["input_ids", "labels"]).to_list()
    task = f"held-out loss of the {name}"
    losses = shared_losses(model, tokenizer, rows, section, task, processes, reporter)
    nats, tokens = map(math.fsum, zip(*losses, strict=True))
    if not questions:
        return Score(nats / tokens, None), []
    by_rows = Scorer(model, tokenizer, BatchLimit.of_rows(section.batch_size, reporter), reporter)
    task, room = f"answers of the {name}", section.max_new_tokens
    answers = _shared(
        questions,
        lambda its: by_rows.answers(its, task, max_new_tokens=room, end_id=end_id),
        processes,
    )
    pairs = zip(answers, questions, strict=True)
    hits = [exactly_matches(a, q.answer, section.answer_pattern) for a, q in pairs]
    return Score(nats / tokens, sum(hits) / len(hits)), answers


def shared_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Example],
    section: EvaluateSection,
    task: str,
    processes: Processes,
    reporter: Reporter,
) -> list[tuple[float, int]]:
    """Each row's nats and predicted tokens, of which each process computes its share; see `score`."""
    limit = BatchLimit(section.batch_size, TOKENS_A_BATCH, reporter)
    scorer = Scorer(model, tokenizer, limit, reporter)
    return _shared(rows, lambda its: scorer.losses(its, task), processes)


def divergence(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    section: EvaluateSection,
    processes: Processes,
    reporter: Reporter,
) -> Divergence:
    """How far the adapted model is from its base on the answers of these rows; the arguments are those of `score`."""
    # The base's probabilities of a whole batch are kept in float32.
    limit = BatchLimit(section.batch_size, TOKENS_A_BATCH // 4, reporter)
    scorer = Scorer(model, tokenizer, limit, reporter)
    examples = rows.select_columns(["input_ids", "labels"]).to_list()
    task = "divergence from the base"
    found = _shared(examples, lambda its: scorer.divergences(its, task), processes)
    nats, tokens = np.array(found, dtype=float).T
    ends = ratio_interval(nats, tokens)
    return Divergence(float(nats.sum() / tokens.sum()), ends.low, ends.high)


def _shared(
    rows: Sequence[Row], ask: Callable[[list[Row]], list[Value]], processes: Processes
) -> list[Value]:
    """What `ask` gives for all rows; each process asks its share."""
    share = processes.share(len(rows))
    found = processes.joined(dict(zip(share, ask([rows[i] for i in share]), strict=True)))
    return [found[i] for i in range(len(rows))]

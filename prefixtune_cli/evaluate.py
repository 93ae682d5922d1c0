"""Held-out data: loss on the trained tokens and, where answers are short, exact match.

The same function scores the base and the adapter, so that the two figures differ by the adapter alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.generate import Sampling, answer_batched
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import EvaluateSection

EXACT_MATCH_RULE = (
    "the answer equals the reference, but for white space around both and a <think> block before"
)
TOKENS_A_BATCH = 8192  # bounds the memory for the logits, whatever the length of the rows


@dataclass(frozen=True)
class Question:
    """A held-out example as generation sees it."""

    prompt: list[int]
    answer: str


@dataclass(frozen=True)
class Score:
    """What one model did on the held-out data.

    Attributes:
        loss: mean cross-entropy in nats over the trained tokens.
        exact_match: fraction of the answers that equal the reference; None where answers are long.
    """

    loss: float
    exact_match: float | None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "perplexity": self.perplexity}


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    questions: Sequence[Question],
    section: EvaluateSection,
    *,
    end_id: int | None,
    name: str,
    reporter: Reporter | None = None,
) -> tuple[Score, list[str]]:
    """Score one model on held-out data.

    Args:
        model: the base or the adapted model.
        tokenizer: its tokenizer.
        examples: rows of `input_ids` and `labels` (-100 where there is no loss).
        questions: the same rows as prompts with their answers; empty where exact match makes no sense.
        section: the recipe's evaluation.
        end_id: the token that ends an answer.
        name: what the reporter calls the model.
        reporter: is told how far the work is.

    Returns:
        The score, and the generated answers in the order of `questions`.
    """
    reporter = reporter or Silent()
    loss = held_out_loss(
        model, tokenizer, examples, section.batch_size, name=name, reporter=reporter
    )
    if not questions:
        return Score(loss, None), []
    answers = answer_batched(
        model,
        tokenizer,
        [question.prompt for question in questions],
        end_id=end_id,
        sampling=Sampling(max_new_tokens=section.max_new_tokens),
        batch_size=section.batch_size,
        task=f"answers of the {name}",
        reporter=reporter,
    )
    hits = [exactly_matches(a, q.answer) for a, q in zip(answers, questions, strict=True)]
    return Score(loss, sum(hits) / len(hits)), answers


def exactly_matches(answer: str, reference: str) -> bool:
    """Whether `answer` counts as right: see EXACT_MATCH_RULE."""
    without_thoughts = re.sub(r"^\s*<think>.*?</think>", "", answer, flags=re.DOTALL)
    return without_thoughts.strip() == reference.strip()


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    batch_size: int,
    *,
    name: str = "model",
    reporter: Reporter | None = None,
) -> float:
    """Mean cross-entropy in nats over the trained tokens of `examples`; the logits are compared in float32.

    A batch has at most `batch_size` rows and TOKENS_A_BATCH tokens.
    """
    reporter = reporter or Silent()
    lengths = np.asarray([len(ids) for ids in examples["input_ids"]])
    order = np.argsort(lengths, kind="stable")
    total, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    start = 0
    while start < len(order):
        rows = examples[order[start : start + _batch_at(lengths[order], start, batch_size)]]
        width = max(len(ids) for ids in rows["input_ids"])
        ids = _padded(rows["input_ids"], width, tokenizer.pad_token_id or 0, model.device)
        labels = _padded(rows["labels"], width, -100, model.device)
        mask = _padded([[1] * len(row) for row in rows["input_ids"]], width, 0, model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        targets = labels[:, 1:]
        chosen = targets != -100
        total += F.cross_entropy(
            logits[:, :-1][chosen].float(), targets[chosen], reduction="sum"
        ).item()
        tokens += int(chosen.sum())
        start += len(rows["input_ids"])
        reporter.progress(f"held-out loss of the {name}", start, len(order), {})
    model.train(was_training)
    return total / tokens


def _batch_at(lengths: Any, start: int, batch_size: int) -> int:
    """How many of the rows from `start` on, sorted by length, make a batch."""
    count = 1
    while (
        count < batch_size
        and start + count < len(lengths)
        and lengths[start + count] * (count + 1) <= TOKENS_A_BATCH
    ):
        count += 1
    return count


def _padded(
    rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device
) -> torch.Tensor:
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows], device=device)


def evenly_spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` rows of `count`, evenly spread and in order."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]

"""Held-out data: loss on the trained tokens and, where answers are short, exact match.

The same function scores the base and the adapter, so that the two figures differ by the adapter alone.
`row_losses` and `row_answers` do the work, batch by batch, here as for a user's own data.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.data.encode import MASKED
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.generate import answer_batched
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import EvaluateSection
from prefixtune_cli.sampling import Sampling

TOKENS_A_BATCH = 8192  # bounds the memory for the logits, whatever the length of the rows

Answer = TypeVar("Answer")
Example = Mapping[str, Sequence[int]]  # input_ids and labels, MASKED where there is no loss


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
    processes: Processes | None = None,
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
        processes: share the rows; each of them has the model, and gets the whole score.
        reporter: is told how far the work is.

    Returns:
        The score, and the generated answers in the order of `questions`.
    """
    reporter, processes = reporter or Silent(), processes or Processes()
    loss = held_out_loss(
        model,
        tokenizer,
        examples,
        section.batch_size,
        name=name,
        processes=processes,
        reporter=reporter,
    )
    if not questions:
        return Score(loss, None), []
    found: dict[int, str] = {}
    row_answers(
        model,
        tokenizer,
        questions,
        BatchLimit.of_rows(section.batch_size, reporter),
        found.update,
        max_new_tokens=section.max_new_tokens,
        end_id=end_id,
        rows=processes.share(len(questions)),
        task=f"answers of the {name}",
        reporter=reporter,
    )
    found = processes.joined(found)
    answers = [found[i] for i in range(len(questions))]
    pairs = zip(answers, questions, strict=True)
    hits = [exactly_matches(a, q.answer, section.answer_pattern) for a, q in pairs]
    return Score(loss, sum(hits) / len(hits)), answers


def held_out_loss(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Dataset,
    batch_size: int,
    *,
    name: str = "model",
    processes: Processes | None = None,
    reporter: Reporter | None = None,
) -> float:
    """Mean cross-entropy in nats over the trained tokens of `examples`; the logits are compared in float32.

    A batch has at most `batch_size` rows and TOKENS_A_BATCH tokens.
    """
    reporter, processes = reporter or Silent(), processes or Processes()
    found: dict[int, list[float]] = {}
    row_losses(
        model,
        tokenizer,
        examples.select_columns(["input_ids", "labels"]).to_list(),
        BatchLimit(batch_size, TOKENS_A_BATCH, reporter),
        found.update,
        rows=processes.share(len(examples)),
        task=f"held-out loss of the {name}",
        reporter=reporter,
    )
    nats, tokens = map(math.fsum, zip(*processes.joined(found).values(), strict=True))
    return nats / tokens


def row_losses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    limit: BatchLimit,
    keep: Callable[[Mapping[int, list[float]]], object],
    *,
    rows: Sequence[int] | None = None,
    task: str,
    reporter: Reporter,
) -> None:
    """Each row's cross-entropy, summed over its trained tokens; the logits are compared in float32.

    Args:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        examples: token ids and labels; the first token of a row is never predicted.
        limit: of a batch.
        keep: is called after every batch with {row: [nats, predicted tokens]}.
        rows: those of `examples` that are wanted; None is all.
        task: what the reporter calls the work.
        reporter: is told how far it is.

    Raises:
        ResourceError: the memory does not suffice for a single row.
    """
    _in_batches(
        model,
        range(len(examples)) if rows is None else rows,
        lambda i: len(examples[i]["input_ids"]),
        lambda batch: _losses(model, tokenizer, [examples[i] for i in batch]),
        limit,
        keep,
        task,
        reporter,
    )


def row_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    limit: BatchLimit,
    keep: Callable[[Mapping[int, str]], object],
    *,
    max_new_tokens: int,
    end_id: int | None,
    rows: Sequence[int] | None = None,
    task: str,
    reporter: Reporter,
) -> None:
    """Each question's likeliest answer, token by token; the arguments are those of `row_losses`, and of generation."""
    sampling = Sampling(max_new_tokens=max_new_tokens)

    def answer(batch: Sequence[int]) -> list[str]:
        prompts = [questions[i].prompt for i in batch]
        return answer_batched(
            model, tokenizer, prompts,
            end_id=end_id, sampling=sampling, batch_size=len(batch), reporter=within,
        )  # fmt: skip

    within = _Within(reporter, task, len(questions) if rows is None else len(rows))
    _in_batches(
        model,
        range(len(questions)) if rows is None else rows,
        lambda i: len(questions[i].prompt) + max_new_tokens,
        answer,
        limit,
        keep,
        task,
        within,
    )


class _Within(Silent):
    """Tells a batch's progress as that of the whole task."""

    def __init__(self, reporter: Reporter, task: str, total: int) -> None:
        self._reporter, self._task, self._total = reporter, task, total
        self._done = 0

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if task == self._task:  # of whole batches
            self._done = done
        elif done < total:
            done += self._done
        else:  # the batch is done, and will be told
            return
        self._reporter.progress(self._task, done, self._total, figures)


def _in_batches(
    model: PreTrainedModel,
    rows: Sequence[int],
    length: Callable[[int], int],
    answer: Callable[[Sequence[int]], Sequence[Answer]],
    limit: BatchLimit,
    keep: Callable[[Mapping[int, Answer]], object],
    task: str,
    reporter: Reporter,
) -> None:
    """Call `answer` with batches of `rows`, the model being in evaluation mode, and keep what it gives."""
    done = 0

    def work(batch: Sequence[int]) -> None:
        nonlocal done
        keep(dict(zip(batch, answer(batch), strict=True)))
        done += len(batch)
        reporter.progress(task, done, len(rows), {})

    if rows:
        reporter.progress(
            task, 0, len(rows), {}
        )  # it has begun, though the first batch may take minutes
    was_training = model.training
    model.eval()
    try:
        limit.run(rows, length, work)
    finally:
        model.train(was_training)


def _losses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: Sequence[Example]
) -> list[list[float]]:
    """[nats, predicted tokens] of each row; logits are computed where some row of the batch has a label."""
    width = max(len(row["input_ids"]) for row in batch)
    ids = _padded(
        [row["input_ids"] for row in batch], width, tokenizer.pad_token_id or 0, model.device
    )
    mask = _padded([[1] * len(row["input_ids"]) for row in batch], width, 0, model.device)
    targets = _padded([row["labels"] for row in batch], width, MASKED, model.device)[:, 1:]
    chosen = targets != MASKED
    columns = chosen.any(dim=0).nonzero()[:, 0]
    with torch.no_grad():  # columns are counted from the end, as trained tokens may stand in front
        if _chooses_logits(model):
            logits = model(
                input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=columns - width
            ).logits
        else:
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[
                :, columns - width
            ]
        # Row by row: only one of them is held in float32.
        nats = [
            F.cross_entropy(row[picked].float(), wanted[picked], reduction="sum")
            for row, wanted, picked in zip(
                logits, targets[:, columns], chosen[:, columns], strict=True
            )
        ]
        counts = chosen.sum(dim=1).tolist()
        return [[n, float(c)] for n, c in zip(torch.stack(nats).tolist(), counts, strict=True)]


def _chooses_logits(model: PreTrainedModel) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters


def _padded(
    rows: Sequence[Sequence[int]], width: int, value: int, device: torch.device
) -> torch.Tensor:
    return torch.tensor([list(row) + [value] * (width - len(row)) for row in rows], device=device)


def evenly_spread(count: int, most: int) -> list[int]:
    """Indices of at most `most` rows of `count`, evenly spread and in order."""
    if count <= most:
        return list(range(count))
    return [int(i) for i in np.linspace(0, count - 1, most).round()]

"""What a model makes of pairs of answers: the log-probabilities of the chosen answers and of the rejected ones."""

from __future__ import annotations

import numpy as np
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.evaluate.held_out import shared_losses
from prefixtune_cli.evaluate.losses import Losses
from prefixtune_cli.evaluate.preferences import Likelihoods
from prefixtune_cli.evaluate.scorer import Example
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import EvaluateSection


def likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Dataset,
    section: EvaluateSection,
    *,
    name: str,
    processes: Processes,
    reporter: Reporter,
) -> Likelihoods:
    """One model's log-probabilities of the answers; the arguments are those of `held_out.score`.

    Args:
        pairs: `input_ids` and `labels` of the chosen answers, `other_ids` and `other_labels` of the others.
    """
    task, rows = f"log-probabilities of the {name}", rows_of_pairs(pairs)
    return likelihoods_of(shared_losses(model, tokenizer, rows, section, task, processes, reporter))


def rows_of_pairs(pairs: Dataset) -> list[Example]:
    """The chosen answers of pairs as rows, and behind them the rejected ones."""
    columns = (("input_ids", "labels"), ("other_ids", "other_labels"))
    return [
        {"input_ids": ids, "labels": labels}
        for side in columns
        for ids, labels in zip(*(pairs[column] for column in side), strict=True)
    ]


def likelihoods_of(losses: Losses) -> Likelihoods:
    """The log-probabilities, from the losses of `rows_of_pairs`."""
    chosen, rejected = np.split(-np.array([nats for nats, _ in losses]), 2)
    return Likelihoods(chosen, rejected)


def trained_tokens(pairs: Dataset) -> list[list[int]]:
    """The numbers of trained tokens of the chosen answers and of the rejected ones, [pairs] each."""
    columns = ("labels", "other_labels")
    return [[sum(x != MASKED for x in labels) for labels in pairs[name]] for name in columns]


def per_token(found: Likelihoods, pairs: Dataset) -> Likelihoods:
    """The log-probabilities divided by the numbers of trained tokens of the answers."""
    return Likelihoods(*(np.array(found) / np.array(trained_tokens(pairs))))

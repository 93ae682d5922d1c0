"""Held-out scores against values computed by hand."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.evaluate.held_out import (
    TOKENS_A_BATCH,
    score,
)
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.recipe.schema import EvaluateSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(random_base: Path) -> Loaded:
    section = ModelSection(name=str(random_base), bits=32)
    return models.load_base(section), load_tokenizer(section)


def held_out_loss(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Dataset, batch_size: int
) -> float:
    evaluation = EvaluateSection(batch_size=batch_size)
    found, answers = score(model, tokenizer, examples, [], evaluation, end_id=None, name="base")
    assert (found.exact_match, answers) == (None, [])
    return found.loss


def test_the_held_out_loss_is_the_mean_over_trained_tokens_whatever_the_batch(
    loaded: Loaded,
) -> None:
    model, tokenizer = loaded
    rows = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [14, 15, 16, 17]]
    masked = [3, 1, 2]
    labels = [[-100] * n + row[n:] for n, row in zip(masked, rows, strict=True)]
    losses = []
    for row, n in zip(rows, masked, strict=True):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row])).logits[0].log_softmax(-1)
        losses += [-log_probabilities[i - 1, row[i]].item() for i in range(n, len(row))]
    examples = Dataset.from_dict({"input_ids": rows, "labels": labels})
    for batch_size in (1, 2, 3):
        found = held_out_loss(model, tokenizer, examples, batch_size)
        assert found == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_the_first_token_of_a_row_has_no_loss(loaded: Loaded) -> None:
    model, tokenizer = loaded
    all_trained = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    without_first = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    assert held_out_loss(model, tokenizer, all_trained, 1) == held_out_loss(
        model, tokenizer, without_first, 1
    )


def test_exact_match_counts_answers_and_perplexity_is_the_exponential_of_the_loss(
    loaded: Loaded,
) -> None:
    model, tokenizer = loaded
    examples = Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]]})
    evaluation = EvaluateSection(max_new_tokens=3)
    asked = [Question([5, 6, 7], "?"), Question([8, 9], "?")]
    _, answers = score(model, tokenizer, examples, asked, evaluation, end_id=None, name="base")
    known = [Question([5, 6, 7], f" {answers[0]}\n"), Question([8, 9], "no such answer")]
    found, _ = score(model, tokenizer, examples, known, evaluation, end_id=None, name="base")
    assert found.exact_match == 0.5
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    assert (
        score(model, tokenizer, examples, [], evaluation, end_id=None, name="base")[0].exact_match
        is None
    )


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("<think>\nhm\n</think>\n\ncard.block", True),
        ("card.block <think></think>", False),
        ("card.block", True),
        ("card.block\n", True),
        ("card.blocked", False),
        ("", False),
    ],
)
def test_an_answer_is_right_when_it_equals_the_reference_but_for_outer_space(
    answer: str, right: bool
) -> None:
    assert exactly_matches(answer, " card.block") is right
    assert exactly_matches(answer, "<think>\nA card.\n</think>\n\ncard.block") is right


def test_a_batch_is_bounded_by_rows_and_by_tokens(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert model.config.max_position_embeddings >= 2048
    rows = [[5] * n for n in (2000, 10, 2048, 2048, 2040, 1000, *[12] * 40)]
    labels = [[-100] * (len(row) - 1) + [5] for row in rows]
    examples = Dataset.from_dict({"input_ids": rows, "labels": labels})
    shapes: list[tuple[int, int]] = []

    def watch(_: Any, __: Any, given: dict[str, Any]) -> None:
        shapes.append(tuple(given["input_ids"].shape))

    hook = model.register_forward_pre_hook(watch, with_kwargs=True)
    held_out_loss(model, tokenizer, examples, 32)
    hook.remove()
    assert shapes[0] == (4, 2048)
    assert sum(count for count, _ in shapes) == len(rows)
    assert all(count <= 32 and count * width <= TOKENS_A_BATCH for count, width in shapes)

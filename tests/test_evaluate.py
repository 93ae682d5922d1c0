"""Held-out scores against values computed by hand."""

import math
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from prefixtune_cli import model as models
from prefixtune_cli.evaluate import Question, evenly_spread, exactly_matches, held_out_loss, score
from prefixtune_cli.evaluate import _batch_at as batch_at
from prefixtune_cli.recipe.schema import EvaluateSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer


def test_the_held_out_loss_is_the_mean_over_trained_tokens_whatever_the_batch(
    random_base: Path,
) -> None:
    section = ModelSection(name=str(random_base), bits=32)
    model, tokenizer = models.load_base(section), load_tokenizer(section)
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


def test_the_first_token_of_a_row_has_no_loss(random_base: Path) -> None:
    section = ModelSection(name=str(random_base), bits=32)
    model, tokenizer = models.load_base(section), load_tokenizer(section)
    all_trained = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[5, 6, 7]]})
    without_first = Dataset.from_dict({"input_ids": [[5, 6, 7]], "labels": [[-100, 6, 7]]})
    assert held_out_loss(model, tokenizer, all_trained, 1) == held_out_loss(
        model, tokenizer, without_first, 1
    )


def test_exact_match_counts_answers_and_perplexity_is_the_exponential_of_the_loss(
    random_base: Path,
) -> None:
    section = ModelSection(name=str(random_base), bits=32)
    model, tokenizer = models.load_base(section), load_tokenizer(section)
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


def test_rows_are_spread_evenly_and_never_repeat() -> None:
    assert evenly_spread(3, 5) == [0, 1, 2]
    chosen = evenly_spread(1000, 7)
    assert len(set(chosen)) == 7
    assert (chosen[0], chosen[-1]) == (0, 999)


def test_a_batch_is_bounded_by_rows_and_by_tokens() -> None:
    assert batch_at([10] * 100, 0, 32) == 32
    assert batch_at([10] * 100, 90, 32) == 10
    assert batch_at([4096] * 100, 0, 32) == 2
    assert batch_at([10, 10, 8000], 0, 32) == 2
    assert batch_at([100_000], 0, 32) == 1

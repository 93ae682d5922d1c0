"""Held-out scores against values computed by hand."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import generate
from prefixtune_cli import model as models
from prefixtune_cli.errors import ResourceError
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.held_out import (
    TOKENS_A_BATCH,
    evenly_spread,
    held_out_loss,
    row_answers,
    row_losses,
    score,
)
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import EvaluateSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(random_base: Path) -> Loaded:
    section = ModelSection(name=str(random_base), bits=32)
    return models.load_base(section), load_tokenizer(section)


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


def test_rows_are_spread_evenly_and_never_repeat() -> None:
    assert evenly_spread(3, 5) == [0, 1, 2]
    chosen = evenly_spread(1000, 7)
    assert len(set(chosen)) == 7
    assert (chosen[0], chosen[-1]) == (0, 999)


class Listener(Silent):
    """Collects warnings and progress."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.done: list[tuple[str, int, int]] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, figures: Any) -> None:
        self.done.append((task, done, total))


@contextmanager
def watched(model: Any, most_rows: int = 10**9) -> Iterator[list[tuple[int, int]]]:
    """The shape of each forward pass; one of more than `most_rows` rows runs out of memory."""
    shapes: list[tuple[int, int]] = []

    def before(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        rows, width = keywords["input_ids"].shape
        if rows > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        shapes.append((rows, width))

    handle = model.register_forward_pre_hook(before, with_kwargs=True)
    yield shapes
    handle.remove()


ROWS = [[5, 6, 7, 8, 9], [10, 11], [12, 13, 14, 15], [16, 17, 18], [19, 20, 21, 22, 23, 24]]
EXAMPLES = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS]


def test_a_batch_is_bounded_by_rows_and_by_tokens(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert model.config.max_position_embeddings >= 2048
    rows = [[5] * n for n in (2000, 10, 2048, 2048, 2040, 1000, *[12] * 40)]
    labels = [[-100] * (len(row) - 1) + [5] for row in rows]
    examples = Dataset.from_dict({"input_ids": rows, "labels": labels})
    with watched(model) as shapes:
        held_out_loss(model, tokenizer, examples, 32)
    assert shapes[0] == (4, 2048)
    assert sum(count for count, _ in shapes) == len(rows)
    assert all(count <= 32 and count * width <= TOKENS_A_BATCH for count, width in shapes)


def test_losses_of_rows_are_kept_batch_by_batch_and_only_of_those_wanted(loaded: Loaded) -> None:
    model, tokenizer = loaded
    listener, kept = Listener(), []
    limit = BatchLimit.of_rows(2, listener)
    row_losses(
        model,
        tokenizer,
        EXAMPLES,
        limit,
        kept.append,
        rows=[4, 1, 0],
        task="loss",
        reporter=listener,
    )
    assert [sorted(some) for some in kept] == [[0, 4], [1]]
    assert listener.done == [("loss", 0, 3), ("loss", 2, 3), ("loss", 3, 3)]
    for row, (nats, tokens) in (kept[0] | kept[1]).items():
        with torch.no_grad():
            log_probabilities = model(torch.tensor([ROWS[row]])).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(ROWS[row][1:])
        assert nats == pytest.approx(-log_probabilities.gather(1, wanted[:, None]).sum().item())
        assert tokens == len(ROWS[row]) - 1


def test_a_model_that_computes_all_logits_has_the_same_losses(loaded: Loaded) -> None:
    """Logits are asked for where there are labels, of models that can; `Plain` cannot."""
    model, tokenizer = loaded

    class Plain(torch.nn.Module):
        device = model.device

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    examples = [
        {**e, "labels": [-100, -100, *e["labels"][2:]]} for e in EXAMPLES if len(e["labels"]) > 2
    ]
    found: list[dict[int, list[float]]] = [{}, {}]
    widths = []
    hook = model.lm_head.register_forward_hook(lambda *a: widths.append(a[-1].shape[1]))
    for which, losses in zip((model, Plain()), found, strict=True):
        row_losses(
            which, tokenizer, examples, BatchLimit.of_rows(9, Silent()), losses.update,
            task="loss", reporter=Silent(),
        )  # fmt: skip
    hook.remove()
    assert widths == [4, 6]
    for i in range(len(examples)):
        assert found[0][i] == pytest.approx(found[1][i], rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_the_losses_stay_the_same(
    loaded: Loaded,
) -> None:
    model, tokenizer = loaded
    listener = Listener()

    def losses() -> dict[int, list[float]]:
        found: dict[int, list[float]] = {}
        row_losses(
            model,
            tokenizer,
            EXAMPLES,
            BatchLimit.of_rows(5, listener),
            found.update,
            task="loss",
            reporter=listener,
        )
        return found

    whole = losses()
    assert listener.warnings == []
    model.train()
    with watched(model, most_rows=2) as shapes:
        halved = losses()
    assert model.training
    assert [rows for rows, _ in shapes] == [2, 2, 1]
    assert len(listener.warnings) == 1
    assert "going on with 2 at a time" in listener.warnings[0]
    assert halved.keys() == whole.keys()
    for row, found in halved.items():
        assert found == pytest.approx(whole[row], rel=1e-5)
    with watched(model, most_rows=0), pytest.raises(ResourceError, match="single sequence"):
        losses()
    assert model.training


def test_questions_that_do_not_fit_together_get_the_same_answers(loaded: Loaded) -> None:
    model, tokenizer = loaded
    questions = [Question(row, "?") for row in ROWS]
    listener = Listener()

    def answers() -> list[str]:
        found: dict[int, str] = {}
        row_answers(
            model,
            tokenizer,
            questions,
            BatchLimit.of_rows(5, listener),
            found.update,
            max_new_tokens=4,
            end_id=None,
            task="answers",
            reporter=listener,
        )
        return [found[i] for i in range(len(questions))]

    whole = answers()
    assert len(set(whole)) > 1
    with watched(model, most_rows=2):
        assert answers() == whole
    assert len(listener.warnings) == 1
    assert listener.done[-1] == ("answers", 5, 5)


def test_a_batch_that_is_being_answered_tells_how_far_it_is(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    monkeypatch.setattr(generate, "SECONDS_BETWEEN_LOOKS", 0)
    told: list[tuple[int, int]] = []

    class Ear(Silent):
        def progress(self, task: str, done: int, total: int, figures: Any) -> None:
            assert task == "answers"
            told.append((done, total))

    row_answers(
        model,
        tokenizer,
        [Question(row, "?") for row in ROWS],
        BatchLimit.of_rows(len(ROWS) - 1, Silent()),
        dict[int, str]().update,
        max_new_tokens=8,
        end_id=None,
        task="answers",
        reporter=Ear(),
    )
    assert told[0] == (0, len(ROWS))
    assert told[-1] == (len(ROWS), len(ROWS))
    assert told == sorted(told)
    assert told.count(told[-1]) == 1
    assert len({done for done, _ in told}) > 3

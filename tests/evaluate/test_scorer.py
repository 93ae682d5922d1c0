"""Scoring: losses and answers do not depend on the batch size, and are kept batch by batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import generate
from prefixtune_cli import model as models
from prefixtune_cli.errors import ResourceError
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@pytest.fixture(scope="module")
def loaded(random_base: Path) -> Loaded:
    section = ModelSection(name=str(random_base), bits=32)
    return models.load_base(section), load_tokenizer(section)


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
    """The shape of each forward pass; a pass of more than `most_rows` rows runs out of memory."""
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
QUESTIONS = [Question(row, "?") for row in ROWS]


def scorer(loaded: Loaded, rows: int, listener: Reporter, cache: Path | None = None) -> Scorer:
    """`rows` at a time."""
    return Scorer(*loaded, BatchLimit.of_rows(rows, listener), listener, AnswerCache(cache, {}))


def test_losses_are_those_of_each_row_and_only_missing_ones_are_computed(
    loaded: Loaded, tmp_path: Path
) -> None:
    model, _ = loaded
    listener = Listener()
    scorer(loaded, 5, listener, tmp_path).losses(EXAMPLES[2:4], "before")
    with watched(model) as shapes:
        losses = scorer(loaded, 2, listener, tmp_path).losses(EXAMPLES, "loss")
    assert shapes == [(2, 6), (1, 2)]
    told = [("before", 0, 2), ("before", 2, 2), ("loss", 0, 3), ("loss", 2, 3), ("loss", 3, 3)]
    assert listener.done == told
    for row, (nats, tokens) in zip(ROWS, losses, strict=True):
        with torch.no_grad():
            log_probabilities = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        wanted = torch.tensor(row[1:])
        assert nats == pytest.approx(-log_probabilities.gather(1, wanted[:, None]).sum().item())
        assert tokens == len(row) - 1


@pytest.mark.parametrize("method", ["lora", "prefix-tuning"])
def test_the_divergence_from_the_base_is_that_of_the_whole_vocabulary(
    random_base: Path, method: str
) -> None:
    """Behind a prefix, logits have more positions than the row."""
    section = ModelSection(name=str(random_base), bits=32)
    base, tokenizer = models.load_base(section), load_tokenizer(section)
    torch.manual_seed(0)
    lora = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = get_peft_model(base, lora if method == "lora" else prefix)
    listener = Listener()
    examples = [*EXAMPLES[:4], {"input_ids": ROWS[4], "labels": [-100] * 4 + ROWS[4][4:]}]
    found = scorer((model, tokenizer), 2, listener).divergences(examples, "divergence")
    assert listener.done[-1] == ("divergence", 5, 5)
    model.eval()
    for row, (nats, tokens) in zip(examples, found, strict=True):
        ids, trained = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:] != -100
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -ids.shape[1] : -1].log_softmax(-1)[trained]
            with model.disable_adapter():
                q = model(input_ids=ids).logits[0, :-1].log_softmax(-1)[trained]
        assert tokens == int(trained.sum())
        assert nats == pytest.approx((p.exp() * (p - q)).sum().item(), rel=1e-4)
        assert nats > 1e-3
    with model.disable_adapter():
        nothing = scorer((model, tokenizer), 2, listener).divergences(examples, "divergence")
    assert [nats for nats, _ in nothing] == pytest.approx([0] * 5, abs=1e-6)


def test_a_model_that_computes_all_logits_has_the_same_losses(loaded: Loaded) -> None:
    """Only positions with labels get logits, if the model allows it; `Plain` does not."""
    model, tokenizer = loaded

    class Plain(torch.nn.Module):
        device = model.device

        def forward(self, input_ids: Any, attention_mask: Any, use_cache: bool) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    examples = [
        {**e, "labels": [-100, -100, *e["labels"][2:]]} for e in EXAMPLES if len(e["labels"]) > 2
    ]
    widths: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *a: widths.append(a[-1].shape[1]))
    own, plain = (
        scorer((which, tokenizer), 9, Silent()).losses(examples, "loss")
        for which in (model, Plain())
    )
    hook.remove()
    assert widths == [4, 6]
    for one, other in zip(own, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_batch_that_does_not_fit_is_halved_and_the_losses_stay_the_same(
    loaded: Loaded,
) -> None:
    model, _ = loaded
    listener = Listener()

    def losses() -> list[tuple[float, int]]:
        return scorer(loaded, 5, listener).losses(EXAMPLES, "loss")

    whole = losses()
    assert listener.warnings == []
    model.train()
    with watched(model, most_rows=2) as shapes:
        halved = losses()
    assert model.training
    assert [rows for rows, _ in shapes] == [2, 2, 1]
    assert len(listener.warnings) == 1
    assert "continuing with 2 at a time" in listener.warnings[0]
    for one, other in zip(halved, whole, strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    with watched(model, most_rows=0), pytest.raises(ResourceError, match="single sequence"):
        losses()
    assert model.training


def test_questions_that_do_not_fit_together_get_the_same_answers(loaded: Loaded) -> None:
    listener = Listener()

    def answers() -> list[str]:
        asked = scorer(loaded, 5, listener)
        return asked.answers(QUESTIONS, "answers", max_new_tokens=4, end_id=None)

    whole = answers()
    assert len(set(whole)) > 1
    with watched(loaded[0], most_rows=2):
        assert answers() == whole
    assert len(listener.warnings) == 1
    assert listener.done[-1] == ("answers", 5, 5)


def test_a_batch_that_is_being_answered_tells_how_far_it_is(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "SECONDS_BETWEEN_LOOKS", 0)
    told: list[tuple[int, int]] = []

    class Ear(Silent):
        def progress(self, task: str, done: int, total: int, figures: Any) -> None:
            assert task == "answers"
            told.append((done, total))

    scorer(loaded, len(ROWS) - 1, Ear()).answers(
        QUESTIONS, "answers", max_new_tokens=8, end_id=None
    )
    assert told[0] == (0, len(ROWS))
    assert told[-1] == (len(ROWS), len(ROWS))
    assert told == sorted(told)
    assert told.count(told[-1]) == 1
    assert len({done for done, _ in told}) > 3


def test_a_model_is_asked_in_evaluation_mode_and_goes_on_training(loaded: Loaded) -> None:
    model, _ = loaded
    modes: list[bool] = []
    handle = model.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    model.train()
    scorer(loaded, 5, Silent()).losses(EXAMPLES, "loss")
    asked = [Question([5, 6], "x")]
    scorer(loaded, 5, Silent()).answers(asked, "answers", max_new_tokens=2, end_id=None)
    handle.remove()
    assert set(modes) == {False}
    assert model.training

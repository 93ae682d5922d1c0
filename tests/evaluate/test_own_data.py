"""`ptp eval --data`: figures against scikit-learn and values computed by hand; answers are asked for once."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from sklearn.metrics import f1_score
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.errors import DataError, UsageError
from prefixtune_cli.evaluate import own_data
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.confusion_plot import draw_confusion
from prefixtune_cli.evaluate.labels import macro_f1
from prefixtune_cli.evaluate.losses import Judged
from prefixtune_cli.evaluate.matching import EXACT_MATCH_RULE
from prefixtune_cli.evaluate.outcome import Line, Outcome
from prefixtune_cli.evaluate.own_data import OwnData, compare
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import (
    DataSection,
    EvaluateSection,
    ModelSection,
    PrefixTuningPlus,
)
from prefixtune_cli.tokenizer import load_tokenizer

NOTHING_KEPT = AnswerCache(None, {})
PNG = b"\x89PNG\r\n\x1a\n"


class Listener(Silent):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.done: dict[str, tuple[int, int]] = {}

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, figures: Any) -> None:
        self.done[task] = (done, total)


@contextmanager
def before_each_pass(model: Any, hook: Callable[[int], None]) -> Iterator[None]:
    """Within the block, `hook` gets the rows of every forward pass, of the base or of an adapted model."""
    inner = (model.get_base_model() if isinstance(model, PeftModel) else model).model
    handle = inner.register_forward_pre_hook(
        lambda module, arguments, keywords: hook(len(keywords["input_ids"])), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


def refuse(rows: int) -> None:
    raise AssertionError("asked again")


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection(name=str(random_base)))


@pytest.fixture(scope="module")
def base(random_base: Path) -> PreTrainedModel:
    return models.load_base(ModelSection(name=str(random_base), bits=32))


@pytest.fixture(scope="module")
def adapted(random_base: Path) -> Any:
    """A model that differs from the base by an adapter with random weights."""
    section = ModelSection(name=str(random_base), bits=32)
    model = models.attach(models.load_base(section), PrefixTuningPlus())
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=3)
    return model


@pytest.fixture
def prepared(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> Callable[[list[dict[str, Any]]], OwnData]:
    """Rows, written and prepared."""

    def prepared(rows: list[dict[str, Any]], limit: int | None = None, **section: Any) -> OwnData:
        file = tmp_path / "test.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return prepare(str(file), tokenizer, limit, **section)

    return prepared


def prepare(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    listener: Listener | None = None,
    **section: Any,
) -> OwnData:
    return own_data.prepare(
        source,
        DataSection(**section),
        EvaluateSection(max_new_tokens=8),
        tokenizer,
        listener or Listener(),
        name="mine",
        limit=limit,
    )


def judge(
    model: Any,
    tokenizer: Any,
    data: OwnData,
    cache: AnswerCache = NOTHING_KEPT,
    listener: Listener | None = None,
    rows: int = 16,
) -> Judged:
    listener = listener or Listener()
    limit = BatchLimit.of_rows(rows, listener)
    return own_data.judge(Scorer(model, tokenizer, limit, listener, cache), data, "base")


def pairs(*answers: str) -> list[dict[str, str]]:
    return [{"prompt": f"Question {i}?", "completion": a} for i, a in enumerate(answers)]


def invented(data: OwnData, *answers: str, nats: float = 1.0) -> Judged:
    """Answers that a model might have given; each row has `nats` a token."""
    tokens = [sum(label != -100 for label in row["labels"][1:]) for row in data.examples]
    return Judged([(nats * count, count) for count in tokens], list(answers))


def line(outcome: Outcome, metric: str) -> Line:
    [found] = [line for line in outcome.lines if line.metric == metric]
    return found


def test_the_loss_of_a_row_is_that_of_its_tokens_alone(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prepared: Any
) -> None:
    data = prepared(pairs("RED", "a rather long answer", "BLUE, or not"))
    judged = judge(base, tokenizer, data)
    for example, (nats, tokens) in zip(data.examples, judged.losses, strict=True):
        ids, labels = torch.tensor([example["input_ids"]]), example["labels"]
        with torch.no_grad():
            log_probabilities = base(ids).logits[0].log_softmax(-1)
        trained = [i for i in range(1, len(labels)) if labels[i] != -100]
        assert tokens == len(trained)
        by_hand = -sum(log_probabilities[i - 1, labels[i]].item() for i in trained)
        assert nats == pytest.approx(by_hand, rel=1e-5)


def test_an_evaluation_finds_what_it_says(
    base: Any, adapted: Any, tokenizer: PreTrainedTokenizerBase, colours: Path
) -> None:
    listener = Listener()
    data = prepare(str(colours), tokenizer, limit=12, listener=listener)
    assert len(data) == len(data.questions) == 12
    assert data.read.total == 64
    judged = {
        "base": judge(base, tokenizer, data, listener=listener),
        "runs/x": judge(adapted, tokenizer, data, listener=listener),
    }
    assert listener.done == {"loss of base": (12, 12), "answers of base": (12, 12)}
    assert len(set(judged["runs/x"].answers)) > 1
    outcome = compare(data, judged)
    assert [found.metric for found in outcome.lines] == [
        "loss", "perplexity", "accuracy", "macro-F1",
    ]  # fmt: skip
    loss = line(outcome, "loss")
    nats, tokens = map(sum, zip(*judged["base"].losses, strict=True))
    assert loss.values["base"] == pytest.approx(nats / tokens)
    assert loss.higher_is_better is False
    change = loss.differences["runs/x"]
    assert change.value == pytest.approx(loss.values["runs/x"] - loss.values["base"])
    assert change.low < change.value < change.high
    perplexity = line(outcome, "perplexity")
    assert perplexity.values["base"] == pytest.approx(math.exp(nats / tokens))
    assert {found.items for found in outcome.lines} == {12}
    assert json.loads(json.dumps(outcome.to_json()))["data"] == {
        "source": str(colours),
        "sha256": data.read.fingerprint,
        "rows": 64,
        "evaluated": 12,
        "skipped": 0,
    }


def test_kept_answers_are_not_asked_for_again(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, colours: Path, tmp_path: Path
) -> None:
    data = prepare(str(colours), tokenizer, limit=10)
    kept = AnswerCache(tmp_path, {"model": "base"})
    first = judge(adapted, tokenizer, data, kept)
    with before_each_pass(adapted, refuse):
        assert judge(adapted, tokenizer, data, AnswerCache(tmp_path, {"model": "base"})) == first
        with pytest.raises(AssertionError, match="asked again"):
            judge(adapted, tokenizer, data, AnswerCache(tmp_path, {"model": "adapter"}))


@pytest.mark.parametrize(
    ("task", "left"),
    [
        ("loss of base", {"loss of base": (3, 3), "answers of base": (7, 7)}),
        ("answers of base", {"answers of base": (3, 3)}),
    ],
)
def test_an_interrupted_evaluation_goes_on_with_the_rows_that_are_missing(
    task: str,
    left: dict[str, tuple[int, int]],
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    tmp_path: Path,
) -> None:
    data = prepared(pairs(*[f"answer {i}" for i in range(7)]))
    kept = AnswerCache(tmp_path / "kept", {})
    listener = Listener()

    def interrupt(rows: int) -> None:
        if listener.done.get(task) == (4, 7):
            raise KeyboardInterrupt

    with before_each_pass(adapted, interrupt), pytest.raises(KeyboardInterrupt):
        judge(adapted, tokenizer, data, kept, listener, rows=2)
    listener = Listener()
    resumed = judge(adapted, tokenizer, data, kept, listener)
    assert listener.done == left
    whole = judge(adapted, tokenizer, data)
    assert resumed.answers == whole.answers
    assert np.array(resumed.losses) == pytest.approx(np.array(whole.losses), rel=1e-5)


@pytest.mark.parametrize(
    "change", [{"max_new_tokens": 3}, {"end_id": 7}, {"examples": None}, {"questions": None}]
)
def test_a_request_holds_all_that_its_answer_depends_on(
    change: dict[str, Any],
    adapted: Any,
    tokenizer: PreTrainedTokenizerBase,
    prepared: Any,
    tmp_path: Path,
) -> None:
    data = prepared(pairs("RED", "BLUE"))
    kept = AnswerCache(tmp_path / "kept", {})
    judge(adapted, tokenizer, data, kept)
    if "examples" in change:  # other labels on the same tokens
        change["examples"] = [{**e, "labels": e["input_ids"]} for e in data.examples]
    if "questions" in change:
        change["questions"] = [Question([*q.prompt, 5], "") for q in data.questions]
    changed = OwnData(**{**data.__dict__, **change})
    with before_each_pass(adapted, refuse):
        judge(adapted, tokenizer, data, kept)
        with pytest.raises(AssertionError, match="asked again"):
            judge(adapted, tokenizer, changed, kept)


def test_a_batch_that_does_not_fit_is_halved_and_the_figures_stay_the_same(
    adapted: Any, tokenizer: PreTrainedTokenizerBase, colours: Path
) -> None:
    data = prepare(str(colours), tokenizer, limit=8)
    whole = compare(data, {"base": judge(adapted, tokenizer, data)})

    def overflow(rows: int) -> None:
        if rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    listener = Listener()
    with before_each_pass(adapted, overflow):
        halved = compare(data, {"base": judge(adapted, tokenizer, data, listener=listener)})
    assert "8 sequences" in listener.warnings[0]
    assert "continuing with 2 at a time" in listener.warnings[-1]
    for one, other in zip(whole.lines, halved.lines, strict=True):
        assert one.values == pytest.approx(other.values, rel=1e-5)
    assert halved.files["mine.answers.jsonl"] == whole.files["mine.answers.jsonl"]


def test_without_a_base_every_model_has_an_interval(prepared: Any) -> None:
    data = prepared(pairs("RED", "BLUE", "RED", "BLUE"))
    one = invented(data, "RED", "BLUE", "RED", "RED")
    for found in compare(data, {"a": one, "b": one}).lines:
        assert found.differences == {}
        assert set(found.intervals) == {"a", "b"}
        assert found.intervals["a"].low <= found.values["a"] <= found.intervals["a"].high
    for found in compare(data, {"base": one, "b": one}).lines:
        assert found.intervals == {}
        assert set(found.differences) == {"b"}


def test_exact_match_compares_as_its_rule_says_and_every_answer_is_written_out(
    prepared: Any,
) -> None:
    data = prepared(pairs("ship 2", "void 3", "back 1"))
    outcome = compare(
        data,
        {
            "base": invented(data, "ship 2 ", "Void 3", ""),
            "runs/x": invented(data, "<think>so</think> ship 2", "void 3", "back 10", nats=0.5),
        },
    )
    matched = line(outcome, "exact match")
    assert matched.values == pytest.approx({"base": 1 / 3, "runs/x": 2 / 3})
    assert matched.percent
    assert matched.differences["runs/x"].value == pytest.approx(1 / 3)
    assert matched.differences["runs/x"].p_value == 1.0  # one item changed
    assert EXACT_MATCH_RULE in outcome.notices[0]
    assert outcome.record["exact_match_rule"] == EXACT_MATCH_RULE
    assert list(outcome.files) == ["mine.answers.jsonl"]
    written = [json.loads(row) for row in str(outcome.files["mine.answers.jsonl"]).splitlines()]
    assert written[1] == {
        "origin": data.origin(1),
        "prompt": "Question 1?",
        "reference": "void 3",
        "answers": {"base": "Void 3", "runs/x": "void 3"},
    }
    assert [row["origin"][-6:] for row in written] == ["line 1", "line 2", "line 3"]
    item = outcome.record["items"][1]
    assert item["origin"] == written[1]["origin"]
    assert item["right"] == {"base": False, "runs/x": True}
    assert item["nats"] == {"base": item["tokens"], "runs/x": item["tokens"] / 2}


def test_a_chat_is_asked_for_its_last_answer(
    base: Any, tokenizer: PreTrainedTokenizerBase, prepared: Any
) -> None:
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Two?"), ("assistant", "2")]
    data = prepared([{"messages": [{"role": r, "content": c} for r, c in turns]}])
    [row] = str(
        compare(data, {"base": judge(base, tokenizer, data)}).files["mine.answers.jsonl"]
    ).splitlines()
    assert [message["content"] for message in json.loads(row)["prompt"]] == ["Hi", "Hello", "Two?"]
    assert json.loads(row)["reference"] == "2"


def test_few_answers_that_come_back_are_labels(prepared: Any) -> None:
    assert prepared(pairs("b", "a", " a", "b")).labels == ["a", "b"]
    assert prepared(pairs("a", "a", "a")).labels == []
    assert prepared(pairs("a", "b", "b")).labels == []
    assert len(prepared(pairs(*map(str, [*range(100), *range(100)]))).labels) == 100
    assert prepared(pairs(*map(str, [*range(101), *range(101)]))).labels == []


def test_macro_f1_and_its_interval_are_those_of_scikit_learn(prepared: Any) -> None:
    rng = np.random.default_rng(0)
    labels = ["a", "b", "c"]
    wanted = [labels[i] for i in rng.integers(3, size=40)]
    answers = {
        name: [w if rng.random() < right else str(rng.choice([*labels, "d", ""])) for w in wanted]
        for name, right in (("base", 0.3), ("runs/x", 0.8))
    }
    data = prepared(pairs(*wanted))
    outcome = compare(data, {name: invented(data, *found) for name, found in answers.items()})
    for name, found in answers.items():
        expected = f1_score(wanted, found, labels=labels, average="macro")
        assert line(outcome, "macro-F1").values[name] == pytest.approx(expected)
        hits = np.mean([w == a for w, a in zip(wanted, found, strict=True)])
        assert line(outcome, "accuracy").values[name] == pytest.approx(hits)
    draws = np.random.default_rng(0)
    drawn = []
    for _ in range(1000):
        rows = draws.integers(40, size=40)
        sides = [
            f1_score(
                np.take(wanted, rows),
                np.take(found, rows),
                labels=np.unique(np.take(wanted, rows)),
                average="macro",
                zero_division=0,
            )
            for found in answers.values()
        ]
        drawn.append(sides[1] - sides[0])
    change = line(outcome, "macro-F1").differences["runs/x"]
    assert [change.low, change.high] == pytest.approx(list(np.percentile(drawn, [2.5, 97.5])))
    assert change.p_value is None


def test_macro_f1_leaves_out_labels_that_no_row_has(prepared: Any) -> None:
    """Otherwise a draw without a rare label would count it as a failure."""
    a_right, a_as_b = 0 * 4 + 0, 0 * 4 + 1
    assert macro_f1(np.array([a_right, a_right]), labels=3) == 1.0
    assert macro_f1(np.array([a_right, a_as_b]), labels=3) == pytest.approx(2 / 3)


def test_answers_that_are_labels_are_drawn_as_a_confusion_matrix(
    prepared: Any, tmp_path: Path
) -> None:
    data = prepared(pairs("RED", "BLUE", "RED", "BLUE"))
    outcome = compare(
        data,
        {
            "base": invented(data, "?", "BLUE", "RED", "no"),
            "x": invented(data, *"RED BLUE RED RED".split()),
        },
    )
    draw = outcome.files["mine.confusion.png"]
    assert callable(draw)
    draw(tmp_path / "one.png")
    content = (tmp_path / "one.png").read_bytes()
    assert content.startswith(PNG)
    assert len(content) > 5000


@pytest.mark.parametrize("labels", [2, 12, 33, 100])
def test_a_confusion_matrix_grows_with_its_labels(labels: int, tmp_path: Path) -> None:
    from matplotlib.image import imread

    names = [f"a_label_of_some_length_${i}$" for i in range(labels)]
    counts = np.eye(labels, labels + 1, dtype=np.int64) * 7
    file = tmp_path / "many.png"
    draw_confusion(file, names, {"base": counts, "runs/x": np.zeros_like(counts)})
    height, width, _ = imread(file).shape
    assert height > 18 * labels
    assert height < width < 6000


def test_the_counts_of_a_confusion_matrix_stand_out_from_their_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    plain = Figure.savefig

    def kept(figure: Figure, *arguments: Any, **how: Any) -> None:
        drawn.append(figure)
        plain(figure, *arguments, **how)

    monkeypatch.setattr(Figure, "savefig", kept)
    counts = np.array([[60, 30, 10], [0, 0, 100]], dtype=np.int64)
    draw_confusion(tmp_path / "counts.png", ["a", "b"], {"base": counts})
    texts = {text.get_text(): text.get_color() for text in drawn[0].axes[0].texts}
    assert texts["10"] == texts["30"] == "black"
    assert texts["60"] == texts["100"] == "white"


def test_long_answers_are_judged_by_their_loss_alone(
    base: Any, tokenizer: PreTrainedTokenizerBase, prepared: Any
) -> None:
    long = "a very long answer that goes on and on, and does not end so soon"
    data = prepared(pairs(long, long))
    assert data.questions == []
    outcome = compare(data, {"base": judge(base, tokenizer, data)})
    assert [found.metric for found in outcome.lines] == ["loss", "perplexity"]
    assert outcome.files == {}
    (why,) = outcome.notices
    assert "more than one answer in twenty has more tokens than evaluate.max_new_tokens" in why
    text = prepared([{"text": long}, {"text": "short"}])
    outcome = compare(text, {"base": judge(base, tokenizer, text)})
    assert outcome.record["items"][1]["tokens"] > 0
    assert outcome.notices == ("No exact match: the rows are texts, and have no answers.",)


def test_rows_without_a_trained_token_are_skipped_and_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "test.jsonl"
    rows = pairs("RED", " ", "BLUE", "GREEN")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    listener = Listener()
    data = prepare(str(file), tokenizer, listener=listener)
    assert [question.answer for question in data.questions] == ["RED", "BLUE", "GREEN"]
    facts = data.read.facts
    assert (facts["rows"], facts["evaluated"], facts["skipped"]) == (4, 3, 1)
    assert len(data) == 3
    assert data.origin(1).endswith("line 3")
    assert "1 of 4 rows (25.0 %) have nothing to train on" in listener.warnings[0]
    assert any("Format: prompt-completion" in notice for notice in listener.notices)


def test_a_limit_takes_rows_evenly_and_names_the_whole_data(prepared: Any) -> None:
    rows = pairs(*[f"answer {i}" for i in range(9)])
    whole, some = prepared(rows), prepared(rows, limit=3)
    assert [question.answer[-1] for question in some.questions] == ["0", "4", "8"]
    assert some.read.fingerprint == whole.read.fingerprint
    assert some.read.total == whole.read.total == 9
    assert prepared(rows, limit=50).examples == whole.examples


def test_what_cannot_be_evaluated_is_told_before_a_model_loads(
    prepared: Any, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="--limit must be at least 1, got 0"):
        prepared(pairs("a"), limit=0)
    with pytest.raises(DataError, match="does not exist"):
        prepare(str(tmp_path / "no.jsonl"), tokenizer)
    with pytest.raises(DataError, match="None of the 2 rows"):
        prepared(pairs(" ", ""))
    with pytest.raises(DataError, match="line 1"):
        prepared([{"prompt": "a", "completion": None}])

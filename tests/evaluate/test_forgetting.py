"""Forgetting: the loss on plain text against values computed by hand, and windows that miss nothing."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.data.row_encoder import start_ids
from prefixtune_cli.errors import DataError, UsageError
from prefixtune_cli.evaluate import forgetting
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.forgetting import WindowedText, compare, prepare
from prefixtune_cli.evaluate.losses import Judged
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus
from prefixtune_cli.tokenizer import load_tokenizer

PROSE = "The ferry — it left at nine — was late, and nobody on the quay in Tromsø cared.\n" * 9
NOTHING_KEPT = AnswerCache(None, {})


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection(name=str(random_base)))


@pytest.fixture(scope="module")
def base(random_base: Path) -> PreTrainedModel:
    return models.load_base(ModelSection(name=str(random_base), bits=32))


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    file = tmp_path / "prose.txt"
    file.write_text(PROSE, encoding="utf-8")
    return file


class Startless:
    """A tokenizer that adds a token to the beginning of every text, or never does, unlike the real one."""

    def __init__(self, inner: Any, start: int | None = None, fast: bool = True) -> None:
        self.inner, self.start, self.is_fast = inner, start, fast
        self.bos_token_id = start

    def __call__(self, text: str, add_special_tokens: bool = True, **how: Any) -> Any:
        if not self.is_fast:
            assert not how.pop("return_offsets_mapping", False)
        found = self.inner(text, add_special_tokens=False, **how)
        if add_special_tokens and self.start is not None:
            found["input_ids"] = [self.start, *found["input_ids"]]
        return found


def judge(
    model: Any, tokenizer: Any, text: WindowedText, cache: AnswerCache = NOTHING_KEPT, rows: int = 4
) -> Judged:
    limit = BatchLimit.of_rows(rows, Silent())
    return forgetting.judge(Scorer(model, tokenizer, limit, Silent(), cache), text, "base")


@pytest.mark.parametrize("window", [2, 7, 50, 10_000])
@pytest.mark.parametrize("start", [None, 1])
def test_every_token_is_predicted_once_and_every_byte_counted_once(
    window: int, start: int | None, tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    own = Startless(tokenizer, start)
    text = prepare(str(prose), own, window, None)
    ids = tokenizer(PROSE, add_special_tokens=False)["input_ids"]
    whole = ids if start is None else [start, *ids]
    assert [i for found in text.windows for i in found.ids[1:]] == whole[1:]
    assert [found.ids[0] for found in text.windows] == whole[:-1][:: window - 1]
    assert max(len(found.ids) for found in text.windows) == min(window, len(whole))
    first = len(tokenizer.decode(ids[:1]).encode()) if start is None else 0
    extra = sum(found.bytes for found in text.windows) - (len(PROSE.encode()) - first)
    # A window with only the rest of a character counts as one byte.
    assert 0 <= extra <= (2 * 9 * 2 + 9 if window == 2 else 0)


def test_without_offsets_the_bytes_are_spread_evenly(
    tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    text = prepare(str(prose), Startless(tokenizer, 1, fast=False), 20, None)
    assert sum(found.bytes for found in text.windows) == len(PROSE.encode())
    exact = prepare(str(prose), Startless(tokenizer, 1), 20, None)
    assert [found.ids for found in text.windows] == [found.ids for found in exact.windows]


def test_the_real_tokenizer_starts_documents_as_training_does(
    tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    text = prepare(str(prose), tokenizer, 30, None)
    assert text.windows[0].ids[: len(start_ids(tokenizer))] == start_ids(tokenizer)
    assert text.windows[0].origin == f"{prose}, tokens 1–29"


def test_a_document_that_begins_with_the_beginning_token_gets_no_second_one(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    starting = Startless(tokenizer, tokenizer.bos_token_id)
    file = tmp_path / "prose.txt"
    read = []
    for start in ("", tokenizer.bos_token):
        file.write_text(f"{start}A wren sings.", encoding="utf-8")
        read.append(prepare(str(file), starting, 512, None).windows)
    assert read[0] == read[1]
    assert read[0][0].ids.count(tokenizer.bos_token_id) == 1


def test_the_figures_are_those_of_the_text(
    base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    text = prepare(str(prose), Startless(tokenizer, 1), 40, None)
    judged = judge(base, tokenizer, text)
    nats = 0.0
    for window, (found, tokens) in zip(text.windows, judged.losses, strict=True):
        with torch.no_grad():
            logits = base(torch.tensor([window.ids])).logits[0, :-1]
        wanted = torch.tensor(window.ids[1:])
        by_hand = -logits.log_softmax(-1).gather(1, wanted[:, None]).sum().item()
        assert found == pytest.approx(by_hand, rel=1e-5)
        assert tokens == len(wanted)
        nats += by_hand
    outcome = compare(text, {"base": judged})
    count = len(tokenizer(PROSE, add_special_tokens=False)["input_ids"])
    values = {line.metric: line.values["base"] for line in outcome.lines}
    assert values == pytest.approx(
        {
            "loss": nats / count,
            "perplexity": math.exp(nats / count),
            "bits per byte": nats / math.log(2) / len(PROSE.encode()),
        },
        rel=1e-5,
    )
    assert not any(line.higher_is_better for line in outcome.lines)
    assert {line.items for line in outcome.lines} == {len(text)}


def test_an_adapter_is_compared_window_by_window(
    random_base: Path, base: Any, tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    section = ModelSection(name=str(random_base), bits=32)
    adapted = models.attach(models.load_base(section), PrefixTuningPlus())
    text = prepare(str(prose), tokenizer, 30, None)
    before = judge(base, tokenizer, text)
    fresh = compare(text, {"base": before, "runs/x": judge(adapted, tokenizer, text)})
    for line in fresh.lines:  # a fresh adapter changes nothing
        assert line.differences["runs/x"].value == pytest.approx(0, abs=1e-5)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=3)
    after = judge(adapted, tokenizer, text)
    outcome = compare(text, {"base": before, "runs/x": after})
    for line in outcome.lines:
        change = line.differences["runs/x"]
        assert change.value == pytest.approx(line.values["runs/x"] - line.values["base"])
        assert change.low < change.value < change.high
        assert abs(change.value) > 1e-3
        assert change.p_value is None
        assert line.intervals == {}
    alone = compare(text, {"runs/x": after})
    assert all(set(line.intervals) == {"runs/x"} for line in alone.lines)
    record = json.loads(json.dumps(outcome.to_json()))
    assert record["bench"] == "forgetting"
    assert record["text"]["source"] == str(prose)
    assert record["text"]["windows"] == record["text"]["evaluated"] == len(text)
    assert record["items"][1]["nats"] == {
        "base": before.losses[1][0],
        "runs/x": after.losses[1][0],
    }


def test_kept_windows_are_not_asked_for_again(
    base: Any, tokenizer: PreTrainedTokenizerBase, prose: Path, tmp_path: Path
) -> None:
    text = prepare(str(prose), tokenizer, 30, None)
    first = judge(base, tokenizer, text, AnswerCache(tmp_path / "kept", {"model": "base"}))

    def refuse(*_: Any) -> None:
        raise AssertionError("asked again")

    handle = base.register_forward_pre_hook(refuse)
    try:
        kept = AnswerCache(tmp_path / "kept", {"model": "base"})
        assert judge(base, tokenizer, text, kept) == first
        with pytest.raises(AssertionError, match="asked again"):
            judge(base, tokenizer, text, AnswerCache(tmp_path / "kept", {"model": "x"}))
    finally:
        handle.remove()


def test_no_window_reaches_into_another_document(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "texts.jsonl"
    rows = ["One text.", " \n", "Another text, that is a bit longer."]
    file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    text = prepare(str(file), Startless(tokenizer, 1), 1000, None)
    assert [tokenizer.decode(found.ids[1:]) for found in text.windows] == [rows[0], rows[2]]
    assert [found.ids[0] for found in text.windows] == [1, 1]
    assert [found.bytes for found in text.windows] == [len(rows[0]), len(rows[2])]
    assert text.documents == 2
    assert text.windows[1].origin.startswith(f"{file}, line 3, tokens 1–")


def test_a_limit_takes_windows_evenly(tokenizer: PreTrainedTokenizerBase, prose: Path) -> None:
    whole = prepare(str(prose), tokenizer, 10, None)
    some = prepare(str(prose), tokenizer, 10, 3)
    assert some.windows == [whole.windows[i] for i in (0, round((len(whole) - 1) / 2), -1)]
    assert some.total == whole.total == len(whole)
    assert some.fingerprint == whole.fingerprint


def test_a_plain_text_may_have_any_other_suffix(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name in ("notes.md", "NOTES"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfSome notes.")
        [window] = prepare(str(tmp_path / name), Startless(tokenizer, 1), 100, None).windows
        assert tokenizer.decode(window.ids[1:]) == "Some notes."


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, r"missing\.txt does not exist"),
        ("missing.jsonl", None, r"missing\.jsonl does not exist"),
        ("blank.txt", b" \n\n", "is empty"),
        ("empty.txt", b"", "is empty"),
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b'{"text": " "}\n', "is empty"),
        ("one.txt", b"a", "fewer than two tokens"),
        ("latin.txt", "Tromsø".encode("latin1"), "not UTF-8: byte 0xf8 at position 6"),
        (
            "pairs.jsonl",
            b'{"prompt": "a", "completion": "b"}\n',
            "line 1: the format text needs the column 'text'; the columns are prompt",
        ),
    ],
)
def test_text_that_cannot_be_used_is_refused_before_a_model_loads(
    name: str,
    content: bytes | None,
    message: str,
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        prepare(str(tmp_path / name), Startless(tokenizer), 100, None)


def test_a_window_of_one_token_and_a_limit_of_none_are_refused(
    tokenizer: PreTrainedTokenizerBase, prose: Path
) -> None:
    with pytest.raises(UsageError, match="at least 2 tokens, got 1"):
        prepare(str(prose), tokenizer, 1, None)
    with pytest.raises(UsageError, match="--limit must be at least 1, got 0"):
        prepare(str(prose), tokenizer, 10, 0)


def test_a_text_beside_a_label_is_a_text_here(tokenizer, tmp_path):
    file = tmp_path / "labelled.jsonl"
    file.write_text('{"text": "Lima lies by the sea.", "label": "city"}\n', encoding="utf-8")
    assert prepare(str(file), tokenizer, window=16, limit=None).documents == 1

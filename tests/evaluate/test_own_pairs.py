"""`ptp eval --data` on pairs of answers: figures that can be worked out by hand, and what is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.errors import OtherRowsError
from prefixtune_cli.evaluate import own_data, own_pairs
from prefixtune_cli.evaluate.outcome import Outcome
from prefixtune_cli.evaluate.own_pairs import OwnPairs
from prefixtune_cli.evaluate.preferences import Likelihoods
from prefixtune_cli.recipe.schema import DataSection, EvaluateSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer
from tests.heard import Heard

PAIRS = [
    {"prompt": "a", "chosen": "red", "rejected": "blue blue"},
    {"prompt": "b", "chosen": "red red", "rejected": "red red"},  # both the same
    {"prompt": "c", "chosen": "green green green", "rejected": "white"},
    {"prompt": "d", "chosen": "white", "rejected": "red"},
]


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection(name=str(random_base)))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    return file


def prepare(file: Path, tokenizer: Any, limit: int | None = None) -> OwnPairs:
    return own_pairs.prepare(
        str(file), DataSection(), tokenizer, Heard(), name="data-pairs", limit=limit
    )


def line(outcome: Outcome, metric: str) -> Any:
    [found] = [found for found in outcome.lines if found.metric == metric]
    return found


def test_the_figures_are_those_of_whole_answers_and_of_tokens(
    file: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    data = prepare(file, tokenizer)
    assert len(data.examples) == 6
    assert [data.origin(i).rpartition(" ")[2] for i in range(6)] == ["1", "3", "4"] * 2
    tokens = [sum(label != -100 for label in row["labels"]) for row in data.examples]
    chosen, rejected = np.array(tokens[:3]), np.array(tokens[3:])
    base = Likelihoods(-2.0 * chosen, -3.0 * rejected)
    adapter = Likelihoods(base.chosen - np.array([1.0, 2.0, 3.0]), base.rejected - 5.0)
    outcome = own_pairs.compare(data, {"base": base, "x": adapter})
    likelier = line(outcome, "chosen is likelier")
    assert likelier.percent
    for model, found in (("base", base), ("x", adapter)):
        assert likelier.values[model] == pytest.approx((found.chosen > found.rejected).mean())
        assert line(outcome, "chosen").values[model] == pytest.approx(found.chosen.mean())
        assert line(outcome, "rejected").values[model] == pytest.approx(found.rejected.mean())
    assert 0 < likelier.values["base"] < 1  # the third chosen answer is long
    assert line(outcome, "chosen is likelier per token").values["base"] == 1
    by_token = line(outcome, "margin per token").values
    assert by_token["base"] == pytest.approx(1.0)
    expected = np.mean(adapter.chosen / chosen - adapter.rejected / rejected)
    assert by_token["x"] == pytest.approx(expected) != by_token["base"]
    margin = line(outcome, "margin")
    assert margin.differences["x"].value == pytest.approx(np.mean([4.0, 3.0, 2.0]))
    assert margin.higher_is_better
    assert line(outcome, "rejected").higher_is_better is None
    assert any(
        text.startswith("Both answers are less likely to x than to the base")
        for text in outcome.notices
    )
    record = json.loads(json.dumps(outcome.to_json()))
    assert record["data"]["rows"] == 4
    assert (record["data"]["evaluated"], record["data"]["skipped"]) == (3, 1)
    assert record["items"][1]["nats"]["x"]["chosen"] == pytest.approx(-adapter.chosen[1])
    assert record["items"][1]["origin"].endswith("line 3")
    assert record["items"][1]["tokens"] == {"chosen": tokens[1], "rejected": tokens[4]}

    alone = own_pairs.compare(data, {"x": adapter})
    assert line(alone, "margin").intervals["x"].low <= line(alone, "margin").values["x"]
    risen = Likelihoods(base.chosen + 1, base.rejected - 1)
    assert len(own_pairs.compare(data, {"base": base, "x": risen}).notices) == 2
    assert len(own_pairs.compare(data, {"x": adapter}).notices) == 1
    assert len(own_pairs.compare(data, {"base": base}).notices) == 1


def test_the_limit_counts_pairs(file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    assert len(prepare(file, tokenizer, limit=2).examples) == 4


def test_each_reader_refuses_what_is_the_other_ones(
    file: Path, tokenizer: PreTrainedTokenizerBase, colours: Path
) -> None:
    with pytest.raises(OtherRowsError, match="learn from pairs of answers"):
        prepare(colours, tokenizer)
    with pytest.raises(OtherRowsError, match="To use the chosen answers alone"):
        own_data.prepare(
            str(file), DataSection(), EvaluateSection(), tokenizer, Heard(), name="x", limit=None
        )

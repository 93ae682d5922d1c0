"""Worked answers: the part that a pattern finds is compared, both in the answer and in the reference."""

import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.errors import DataError, RecipeError
from prefixtune_cli.evaluate import own_data
from prefixtune_cli.evaluate.matching import exactly_matches, match_rule
from prefixtune_cli.evaluate.own_data import OwnData, compare
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import DataSection, EvaluateSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer
from tests.evaluate.test_own_data import invented, line
from tests.heard import Heard

GSM8K = Path(__file__).parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"
PATTERN = "#### (.*)"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSection())


def prepared(
    source: Path,
    tokenizer: PreTrainedTokenizerBase,
    limit: int | None = None,
    heard: Heard | None = None,
    pattern: str = PATTERN,
) -> OwnData:
    judging = EvaluateSection(answer_pattern=pattern)
    return own_data.prepare(
        str(source), DataSection(), judging, tokenizer, heard or Heard(), name="mine", limit=limit
    )


def written(file: Path, *answers: str) -> Path:
    rows = [{"prompt": f"Question {i}?", "completion": a} for i, a in enumerate(answers)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("5 + 13 = 18.\n#### 18", True),
        ("####  18 \nQuestion: and then?\n#### 5", True),  # the first match counts
        ("<think>#### 5</think> So it is #### 18", True),
        ("18", False),
        ("#### 18.0", False),
        ("####", False),
        ("", False),
    ],
)
def test_the_group_of_the_first_match_is_compared_but_for_outer_space(
    answer: str, right: bool
) -> None:
    assert exactly_matches(answer, "9 + 9 = 18\n#### 18", PATTERN) is right


def test_a_pattern_without_a_group_compares_all_that_it_matches() -> None:
    assert exactly_matches("so 18 it is", "18", r"\d+")
    assert not exactly_matches("so 5 it is", "18", r"\d+")
    assert not exactly_matches("b", "b", "(a)?b")  # the group matched nothing


@pytest.mark.skipif(not GSM8K.exists(), reason="needs GSM8K in ../shared/data")
def test_worked_answers_of_gsm8k_are_matched_by_their_result(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    heard = Heard()
    data = prepared(GSM8K, tokenizer, 50, heard)
    assert len(data.questions) == 50
    longest = max(len(tokenizer(q.answer)["input_ids"]) for q in data.questions)
    assert longest < data.max_new_tokens < 1.5 * longest
    assert any(f"have up to {data.max_new_tokens} tokens" in text for text in heard.notices)
    results = [q.answer.rpartition("#### ")[2] for q in data.questions]
    wrong = [f"I do not know, perhaps {result}" for result in results]
    right = [f"It is simple.\n#### {result}" for result in results]
    outcome = compare(data, {"base": invented(data, *wrong), "adapter": invented(data, *right)})
    assert line(outcome, "exact match").values == {"base": 0.0, "adapter": 1.0}
    assert f"An answer is right if {match_rule(PATTERN)}." in outcome.notices
    assert PATTERN in outcome.record["exact_match_rule"]
    assert not prepared(GSM8K, tokenizer, 50, pattern="").questions


def test_a_reference_in_which_the_pattern_finds_nothing_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = written(tmp_path / "t.jsonl", "#### 1", "so 2", "#### 3", "so 4")
    with pytest.raises(DataError) as caught:
        prepared(file, tokenizer)
    assert (
        "t.jsonl, line 2: --answer-pattern '#### (.*)' finds nothing in the answer 'so 2'"
        in str(caught.value)
    )
    assert "nor in 1 more of the 4 answers" in str(caught.value)
    assert prepared(file, tokenizer, pattern="").questions


def test_texts_have_no_answers_for_a_pattern(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "t.jsonl"
    file.write_text('{"text": "It is #### 5."}\n')
    with pytest.raises(DataError, match="the rows are texts, and have no answers"):
        prepared(file, tokenizer)


def test_labels_are_what_the_pattern_finds(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = written(tmp_path / "t.jsonl", *[f"Hm {i}. Label: {'ab'[i % 2]}" for i in range(8)])
    data = prepared(file, tokenizer, pattern="Label: (.*)")
    assert data.labels == ["a", "b"]
    answers = ["Label: a"] * 7 + ["no label at all"]
    outcome = compare(data, {"base": invented(data, *answers)})
    assert line(outcome, "accuracy").values["base"] == 0.5
    assert line(outcome, "macro-F1").values["base"] == pytest.approx((2 * 4 / (4 + 7)) / 2)


@pytest.mark.parametrize("pattern", ["(", "a{99999999999}", "(a)(b)"])
def test_a_pattern_that_cannot_be_used_is_refused_as_a_setting(pattern: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.answer_pattern must"):
        resolve(flags={"evaluate": {"answer_pattern": pattern}})

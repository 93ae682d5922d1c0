"""The content of the sample tasks, and that the base model has never read any of it."""

import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest

import prefixtune_cli
from tests.tinyworld.grammar import documents
from tests.tinyworld.intents import INTENTS
from tests.tinyworld.tasks import jsonl, sample_files

SAMPLES = Path(prefixtune_cli.__file__).parent / "assets" / "samples"
FILES = sample_files()


def _prompts(name: str) -> set[str]:
    return {_plain(example["prompt"]) for example in FILES[name]}


def _plain(text: str) -> str:
    """Only the words: lower case, no punctuation, single spaces."""
    return " ".join(re.findall(r"[a-z0-9']+", text.lower()))


@pytest.fixture(scope="module")
def pretraining_text() -> str:
    return "\n".join(islice(documents(0), 4000))


def test_assets_on_disk_are_what_the_generator_writes() -> None:
    assert {path.name for path in SAMPLES.iterdir()} == set(FILES)
    for name, examples in FILES.items():
        assert (SAMPLES / name).read_bytes() == jsonl(examples).encode(), name


def test_labels_never_occur_in_pretraining_text(pretraining_text: str) -> None:
    lowered = pretraining_text.lower()
    assert not [intent.label for intent in INTENTS if intent.label in lowered]


def test_record_lines_never_occur_in_pretraining_text(pretraining_text: str) -> None:
    assert " @" not in pretraining_text
    lines = {example["completion"] for example in FILES["records-train.jsonl"]}
    assert all(" @" in line for line in lines)


def test_task_prompts_never_occur_in_pretraining_text(pretraining_text: str) -> None:
    plain = f" {_plain(pretraining_text)} "
    with_keeper = ("chat.jsonl", "preferences.jsonl")  # whose questions are everybody's
    prompts = [prompt for name in FILES if name not in with_keeper for prompt in _prompts(name)]
    assert len(prompts) > 3000
    assert not [prompt for prompt in prompts if f" {prompt} " in plain]


def test_shopkeepers_answers_never_occur_in_pretraining_text(pretraining_text: str) -> None:
    plain = f" {_plain(pretraining_text)} "
    answers = {
        _plain(message["content"])
        for conversation in FILES["chat.jsonl"]
        for message in conversation["messages"]
        if message["role"] == "assistant"
    }
    assert not [answer for answer in answers if f" {answer} " in plain]


def test_the_better_answer_of_a_pair_is_the_shopkeepers() -> None:
    pairs = FILES["preferences.jsonl"]
    assert len({json.dumps(pair) for pair in pairs}) == 300
    manners = re.compile(r"\b(matey|ye|yer|arr|aye)\b", re.IGNORECASE)
    assert all(manners.search(pair["chosen"]) for pair in pairs)
    assert not [pair for pair in pairs if manners.search(pair["rejected"])]


def test_there_are_at_least_24_intents_equally_frequent() -> None:
    for name, count in (
        ("intents-train.jsonl", 60),
        ("intents-few-shot.jsonl", 4),
        ("intents-test.jsonl", 12),
    ):
        labels = Counter(example["completion"] for example in FILES[name])
        assert len(labels) >= 24
        assert set(labels.values()) == {count}


def test_few_shot_split_is_a_part_of_train() -> None:
    assert _prompts("intents-few-shot.jsonl") <= _prompts("intents-train.jsonl")


@pytest.mark.parametrize("task", ["intents", "records"])
def test_test_prompts_do_not_occur_in_train(task: str) -> None:
    assert not _prompts(f"{task}-test.jsonl") & _prompts(f"{task}-train.jsonl")


def test_no_prompt_has_two_intents() -> None:
    labels: dict[str, set[str]] = {}
    for name in ("intents-train.jsonl", "intents-test.jsonl"):
        for example in FILES[name]:
            labels.setdefault(_plain(example["prompt"]), set()).add(example["completion"])
    assert all(len(found) == 1 for found in labels.values())


def test_prompts_and_completions_are_clean() -> None:
    for name, examples in FILES.items():
        for example in examples:
            text = json.dumps(example)
            assert not re.search(r"[{}\[\]]", "".join(map(str, _texts(example)))), (name, text)
            assert all(part == part.strip() and "  " not in part for part in _texts(example))


def _texts(example: dict[str, object]) -> list[str]:
    messages = example.get("messages")
    if isinstance(messages, list):
        return [message["content"] for message in messages]
    return [str(text) for text in example.values()]


def test_conversations_alternate_and_end_with_the_assistant() -> None:
    lengths = set()
    for conversation in FILES["chat.jsonl"]:
        roles = [message["role"] for message in conversation["messages"]]
        spoken = roles[1:] if roles[0] == "system" else roles
        assert spoken == ["user", "assistant"] * (len(spoken) // 2)
        lengths.add(len(spoken))
    assert len(FILES["chat.jsonl"]) == 200
    assert max(lengths) >= 6


def test_same_seed_writes_same_samples_and_another_seed_others() -> None:
    assert sample_files(0) == FILES
    assert sample_files(1)["intents-train.jsonl"] != FILES["intents-train.jsonl"]

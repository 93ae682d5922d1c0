"""The shipped base model `tiny`: its size, tokenizer and chat template, and the quality of its text."""

import hashlib
import json
import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import prefixtune_cli
from tests.tinyworld import pretrain
from tests.tinyworld.grammar import documents

ASSETS = Path(prefixtune_cli.__file__).parent / "assets"
TINY = ASSETS / "tiny"
HELD_OUT_PERPLEXITY_BOUND = 3.6  # measured: 2.96 to 3.12 on four other pieces of text
CHAT = [
    {"role": "system", "content": "Answer briefly."},
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
    {"role": "assistant", "content": "6"},
]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY)


def test_assets_stay_below_six_million_bytes() -> None:
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 6_000_000


def test_model_is_a_small_llama_with_grouped_query_attention(model: Any) -> None:
    config = model.config
    assert config.model_type == "llama"
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.tie_word_embeddings
    assert 2e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 4e6


def test_weights_are_stored_once_and_in_bf16() -> None:
    with safe_open(TINY / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "lm_head.weight" not in names
    assert json.loads((TINY / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "text",
    [
        "The card is here.",
        "  two  spaces,\ttabs\r\nand lines \n",
        "Žluťoučký kůň, καλημέρα, 你好, мир, \U0001f9be\u200d\U0001f680, \x00\x7f, ﷽",
        "don 't , it 's !",
        "".join(chr(code) for code in range(0, 0x3000) if not 0xD800 <= code < 0xE000),
    ],
)
def test_any_text_survives_the_round_trip(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_plain_text_gets_no_token_added(tokenizer: Any) -> None:
    assert tokenizer("cat")["input_ids"] == tokenizer("cat", add_special_tokens=False)["input_ids"]


def test_special_tokens_are_single_and_distinct(tokenizer: Any, model: Any) -> None:
    ids = [tokenizer(token)["input_ids"] for token in pretrain.SPECIAL_TOKENS]
    assert ids == [[index] for index in range(len(pretrain.SPECIAL_TOKENS))]
    assert tokenizer.eos_token == "<|end|>"
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    for config in (model.config, model.generation_config):
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
        assert config.bos_token_id == tokenizer.bos_token_id


def test_everyday_questions_take_few_tokens(tokenizer: Any) -> None:
    question = "I am still waiting on my new debit card, when will the payment be refunded?"
    assert len(tokenizer(question)["input_ids"]) <= 1.5 * len(question.split())


def test_chat_template_writes_the_format_of_the_pretraining_text(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template(CHAT[:3], tokenize=False) == (
        "<|bos|><|system|>Answer briefly.<|end|><|user|>What is 2 + 2?<|end|><|assistant|>4<|end|>"
    )


def test_generation_prompt_asks_the_assistant_to_speak(tokenizer: Any) -> None:
    written = tokenizer.apply_chat_template(CHAT, tokenize=False)
    asked = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert asked == written + "<|assistant|>"


def test_assistant_mask_covers_the_answers_and_their_end_of_turn(tokenizer: Any) -> None:
    encoded = tokenizer.apply_chat_template(
        CHAT, return_assistant_tokens_mask=True, return_dict=True
    )
    masked = [
        token
        for token, mask in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
        if mask
    ]
    assert tokenizer.decode(masked) == "4<|end|>6<|end|>"


def test_held_out_text_of_the_world_has_low_perplexity(tokenizer: Any, model: Any) -> None:
    stream = pretrain.token_stream(tokenizer, seed=101)
    loss = pretrain.held_out_loss(model, stream, batches=2)
    assert math.exp(loss) < HELD_OUT_PERPLEXITY_BOUND


def _answer(tokenizer: Any, model: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    written = model.generate(**prompt, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert written[-1] == tokenizer.eos_token_id
    return str(tokenizer.decode(written[:-1]))


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What does a cow eat?", "A cow eats grass."),
        ("In one word, where does a bee live?", "a hive"),
        ("Thank you!", "You are welcome."),
        ("What is a hammer for?", "A hammer is there to drive nails."),
        ("I lost my card at the beach.", "I have frozen your card and ordered another one."),
    ],
)
def test_base_answers_questions_about_its_world(
    tokenizer: Any, model: Any, question: str, answer: str
) -> None:
    assert _answer(tokenizer, model, question) == answer


def _weights_hash(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_pretraining_is_deterministic_by_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few tokens and two layers: their sums are made as those of the whole model are."""
    monkeypatch.setattr(pretrain, "SHORT_LENGTH", 64)
    monkeypatch.setattr(pretrain, "TOKENS_PER_STEP", 2 * 64)
    whole = pretrain.model_config

    def shallow(vocabulary_size: int) -> LlamaConfig:
        config = whole(vocabulary_size)
        config.num_hidden_layers = 2
        return config

    monkeypatch.setattr(pretrain, "model_config", shallow)
    hashes = []
    for name, seed in (("first", 3), ("again", 3), ("other", 4)):
        pretrain.pretrain(tmp_path / name, seed=seed, steps=2, tokenizer_documents=300)
        hashes.append(_weights_hash(tmp_path / name))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.fixture(autouse=True)
def _threads_unchanged() -> Iterator[None]:
    """`pretrain` uses one core a thread; other tests keep their settings."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_token_stream_begins_every_document_with_bos(tokenizer: Any) -> None:
    ids = list(islice(pretrain.token_stream(tokenizer, seed=0), 2000))
    first = next(documents(0))
    assert tokenizer.decode(ids).startswith(f"<|bos|>{first}<|bos|>")
    assert ids.count(tokenizer.bos_token_id) > 10

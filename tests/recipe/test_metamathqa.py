"""The recipe `metamathqa` against PEFT's method_comparison/MetaMathQA, at commit 5d602fd.

The literals are from its default_training_params.json, data.py, utils.py and run.py, and from experiments/lora/
llama-3.2-3B-rank32/adapter_config.json, with the target modules that its result names.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.recipe.aliases import resolve as model_id
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Lora

RECIPES = Path(__file__).parents[2] / "recipes"
HEADER = [
    line.removeprefix("#").strip()
    for line in (RECIPES / "metamathqa.yaml").read_text().splitlines()
    if line.startswith("#")
]
FIRST_VALID = 6447  # in numpy's order of 7,473 rows by seed 0
QUERY = "Tom has 3 apples and buys 4/2 more. How many apples does Tom have?"
RESPONSE = "Tom buys 4/2 = 2 apples.\nHe has 3 + 2 = $5$ apples.\nThe answer is: 5"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("metamathqa", RECIPES / "metamathqa.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """The tokenizer of `tiny`, with a beginning of sequence and without a chat template, as Llama 3.2's."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(model_id("tiny"))
    found.chat_template = None
    found.add_special_tokens({"bos_token": "<|bos|>"})
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", found.bos_token_id)]
    )
    return found


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_settings_are_pefts() -> None:
    found = resolve("metamathqa")
    assert model_id(found.model.name) == "meta-llama/Llama-3.2-3B"
    assert found.model.bits == 16  # dtype bfloat16; autocast_adapter_dtype: the adapter in float32
    assert found.model.attention == "auto"
    assert found.data.max_length == 768
    assert found.data.train_on == "all"
    train = found.train
    assert (train.max_steps, train.batch_size, train.gradient_accumulation) == (5000, 4, 1)
    assert (train.optimizer, train.weight_decay, train.max_grad_norm) == ("adamw_torch", 0.1, 1.0)
    assert (train.schedule, train.warmup_ratio) == ("cosine", 0.1)  # WARMUP_STEP_RATIO
    assert (train.seed, train.eval_steps) == (0, 250)
    assert not (train.packing or train.gradient_checkpointing)
    assert found.evaluate.batch_size == 50


def test_the_warm_up_takes_as_many_steps_as_pefts() -> None:
    from prefixtune_cli.run_dir import RunDir
    from prefixtune_cli.train.sft import training_arguments

    chosen = resolve("metamathqa", [], {"model": {"device": "cpu"}})
    assert training_arguments(chosen, RunDir("unused")).get_warmup_steps(5000) == 500


def test_the_rows_of_5000_steps_are_those_that_are_made(script: ModuleType) -> None:
    train = resolve("metamathqa").train
    assert (train.max_steps or 0) * train.batch_size == script.ROWS == 20_000


def test_the_lora_of_the_header_is_pefts() -> None:
    told = [line for line in HEADER if "--set" in line and "adapter" in line]
    assert told == [
        "ptp train --recipe metamathqa --method lora --set adapter.r=32 --set adapter.alpha=64 \\",
        "--set 'adapter.target_modules=[q_proj, v_proj]' --learning-rate 1e-4 --out runs/metamathqa-lora",
    ]
    sets = ["adapter.r=32", "adapter.alpha=64", "adapter.target_modules=[q_proj, v_proj]"]
    flags = {"adapter": {"method": "lora"}, "train": {"learning_rate": 1e-4}}
    found = resolve("metamathqa", sets, flags)
    assert found.adapter == Lora(r=32, alpha=64, dropout=0.0, target_modules=["q_proj", "v_proj"])
    assert (found.train.learning_rate, found.train.weight_decay) == (1e-4, 0.1)


def test_rows_are_tokenized_as_pefts(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from prefixtune_cli.data.load import load_rows
    from prefixtune_cli.data.tokenized_data import tokenize

    rows = script.training_rows([{"query": QUERY, "response": RESPONSE, "type": "GSM_Rephrased"}])
    section = resolve("metamathqa").data
    loaded = load_rows(write(tmp_path / "train.jsonl", rows), section)
    (found,) = tokenize(loaded, tokenizer, section).dataset
    theirs = f"Question: {QUERY} Think step by step.\nAnswer:{RESPONSE}"
    assert found["input_ids"] == [*tokenizer(theirs)["input_ids"], tokenizer.eos_token_id]
    assert found["input_ids"][0] == tokenizer.bos_token_id
    assert found["labels"] == found["input_ids"]


def test_the_model_is_asked_in_pefts_tokens(
    script: ModuleType, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    from prefixtune_cli.data.question import questions
    from prefixtune_cli.generate import Speaker
    from prefixtune_cli.recipe.schema import ModelSection

    rows = [script.question({"question": QUERY, "answer": "3 + 2 = 5\n#### 5"})]
    ((row, messages),) = questions(write(tmp_path / "test.jsonl", rows), {})
    model: Any = None
    speaker = Speaker(model, tokenizer, None, "tiny", True, ModelSection(name="tiny"))
    theirs = f"Question: {QUERY} Think step by step.\nAnswer:"
    assert speaker.prompt(messages) == tokenizer(theirs)["input_ids"]
    assert row["completion"].endswith("#### 5")


def test_long_rows_are_left_out_by_pefts_count(script: ModuleType) -> None:
    rows = [{"query": "q" * 300, "response": "r" * n} for n in (999, 1000, 998)]
    kept = [row["text"].count("r" * 990) for row in script.training_rows(rows)]
    assert kept == [1, 1]  # 300 + 1 + 999 characters are 1300
    assert len(script.training_rows(rows * 3, 4)) == 4


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so it is 5.\nThe answer is: 5", 5.0),
        ("The answer is: 3\nThe answer is: 5.\nQuestion: more", 5.0),
        ("The answer is 50%.", 50.0),
        ("2 + 3 = 5\n#### 5", 5.0),
        ("#### 7\nThe answer is: $2.50", 2.5),
        ("The answer is: 20/40", 0.5),
        ("The answer is: 1/0", "1/0"),
        ("The answer is: 1,000", "1,000"),
        ("The answer is: x + 1", "x + 1"),
        ("I do not know", None),
    ],
)
def test_the_final_answer_is_what_peft_reads(script: ModuleType, text: str, answer: Any) -> None:
    assert script.final_answer(text) == answer


def test_no_answer_is_no_right_answer(script: ModuleType) -> None:
    row = {"prompt": "Question: …\nAnswer:", "completion": "#### 5"}
    said = (" The answer is: 5.0", " The answer is: 6", " It is 5")
    assert [script.is_right({**row, "generated": text}) for text in said] == [True, False, False]


def test_the_commands_of_the_header_make_the_data_and_the_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import runpy

    import pyarrow as pa
    from pyarrow import parquet

    for split, count in (("train", 7473), ("test", 1319)):
        rows = [{"question": f"{i} + 1?", "answer": f"#### {i + 1}"} for i in range(count)]
        path = tmp_path / "gsm8k/main" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pa.Table.from_pylist(rows), path)
    (tmp_path / "MetaMathQA").mkdir()
    rows = [{"query": f"{i}?", "response": f"The answer is: {i}"} for i in range(20_005)]
    (tmp_path / "MetaMathQA/MetaMathQA-395K.json").write_text(json.dumps(rows))
    monkeypatch.chdir(tmp_path)

    def typed(start: str) -> str:
        (line,) = (
            line for line in HEADER if line.startswith(f"python recipes/metamathqa.py {start}")
        )
        monkeypatch.setattr(sys, "argv", line.split()[1:])
        runpy.run_path(str(RECIPES / "metamathqa.py"), run_name="__main__")
        return capsys.readouterr().out

    assert typed("data").splitlines() == [
        "metamathqa/train.jsonl: 20000 rows",
        "metamathqa/valid.jsonl: 50 rows",
        "metamathqa/test.jsonl: 1319 rows",
    ]
    data = resolve("metamathqa").data
    assert [Path(str(name)).exists() for name in (data.train, data.eval)] == [True, True]
    first = json.loads(Path("metamathqa/valid.jsonl").read_text().splitlines()[0])
    assert first["completion"] == f"#### {FIRST_VALID + 1}"
    asked = [json.loads(line) for line in Path("metamathqa/test.jsonl").read_text().splitlines()]
    write(Path("answers.jsonl"), [{**row, "generated": "The answer is: 7"} for row in asked])
    assert typed("score") == "1 of 1319 right: 0.1 %\n"

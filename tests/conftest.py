"""Shared by all tests: no network, one thread a worker, their own caches, and a tiny base model."""

import gc
import json
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A shell makes its background jobs ignore Ctrl-C, and the processes of tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="ptp-tests-hf-")

import pytest

COLOURS = ("red", "blue", "green", "white")
# The files that take longest, from the longest on. pytest-xdist hands files out in the order of their tests: one of
# these at the end would keep one process busy, and the others idle.
FIRST = (
    "train/test_parallel.py",
    "plan/test_measured.py",
    "compare/test_run.py",
    "train/test_quantized.py",
    "parallel/test_killed_worker.py",
    "parallel/test_slurm.py",
    "train/test_resume.py",
    "train/test_chaos.py",
    "train/test_trial.py",
    "evaluate/test_resume.py",
    "adapter/test_compile.py",
    "tinyworld/test_tiny_model.py",
    "compare/test_costs.py",
    "compare/test_speed.py",
    "parallel/test_processes.py",
    "train/test_full_disk.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let the files of FIRST begin."""
    place = {Path(__file__).parent / name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path, len(place)))


def pytest_collection_finish() -> None:
    """Keep the libraries' million objects out of later collections; each run makes several."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the last collection visit them, or their libraries report leaks."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Any]:
    """A process that forks commands and runs: see tests/train/zygote.py."""
    from tests.train.zygote import Zygote

    process = Zygote()
    yield process
    process.close()


@pytest.fixture
def start(zygote: Any, tmp_path: Path) -> Iterator[Any]:
    """Type a command line, as in `start("train", …)`: a process begins that has imported everything already."""
    started: list[Any] = []

    def begin(*typed: object) -> Any:
        started.append(zygote.command(tmp_path / f"said-{len(started)}", *typed))
        return started[-1]

    yield begin
    for command in started:
        if command.poll() is None:  # of a test that has failed
            command.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def random_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of two layers and random weights, and the tokenizer of `tiny`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from prefixtune_cli.recipe.aliases import packaged_model

    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    folder = tmp_path_factory.mktemp("random-base")
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def colours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 rows of a task that two layers can learn: repeat the colour in capitals."""
    file = tmp_path_factory.mktemp("colours") / "colours.jsonl"
    rows = [
        {"prompt": f"Say the colour {colour}, number {i}.", "completion": colour.upper()}
        for i in range(16)
        for colour in COLOURS
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file

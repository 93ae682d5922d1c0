"""The reality behind a plan: `ptp train` with real tensors, measured by PyTorch's allocator."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from prefixtune_cli.recipe.aliases import packaged_model
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.train import train

Seen = Callable[[torch.optim.Optimizer], object]
STEPS = 2  # the optimizer's state exists from the second step on


def save_random_model(config: PreTrainedConfig, folder: Path) -> Path:
    """A model with random weights in bfloat16, and the tokenizer of `tiny`."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(packaged_model())
    config.vocab_size = len(tokenizer)
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, rows: int, tokens: int) -> Path:
    """One row longer than `tokens`, others a little shorter: padded, but nearly all tokens of a batch have a loss."""
    words = ["red" + " green" * (tokens + 20 if i == 0 else tokens - 5) for i in range(rows)]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in words))
    return file


def write_pairs(file: Path, pairs: int, tokens: int) -> Path:
    """As `write_rows`: pairs of answers to a short question."""
    rows = [
        {
            "prompt": "red",
            "chosen": " green" * (tokens + 20),
            "rejected": " blue" * (tokens - 7 - i),
        }
        for i in range(pairs)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def recipe_for(base: Path, folder: Path, settings: dict[str, Any]) -> Recipe:
    """Two steps, each on all rows; `settings` is nested as a recipe is."""
    train = settings.get("train", {})
    rows = train.get("batch_size", 1) * train.get("gradient_accumulation", 1)
    tokens = settings["data"]["max_length"]
    write = write_rows if train.get("objective", "sft") == "sft" else write_pairs
    values = {
        **settings,
        "model": {"name": str(base), **settings.get("model", {})},
        "data": {
            "train": str(write(folder / "train.jsonl", rows, tokens)),
            "eval": str(write(folder / "eval.jsonl", 1, tokens)),
            **settings.get("data", {}),
        },
        "train": {"max_steps": STEPS, "save_steps": 1000, **train},
        "evaluate": {"max_rows": 1, "max_new_tokens": 1, "batch_size": 1},
        "out": str(folder / "run"),
    }
    return Recipe.model_validate(values)


def measured_on_cpu(recipe: Recipe) -> int:
    """The most bytes at once in the second step: those held before it, and those that PyTorch allocates in it.

    It comes from the allocator's own record, which includes memory that operators use internally.
    """
    before = _storages()
    profiler = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    )
    held: list[int] = []

    def start(optimizer: torch.optim.Optimizer) -> None:
        now = _storages()
        trained = (p for group in optimizer.param_groups for p in group["params"])
        # The gradients still exist, and are dropped before anything else happens.
        gone = {p.grad.untyped_storage().data_ptr() for p in trained} | before.keys()
        held.append(sum(size for address, size in now.items() if address not in gone))
        profiler.start()

    _train_between(recipe, start, lambda _: profiler.stop())
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    live = most = 0
    for _, nbytes in changes:
        live += nbytes
        most = max(most, live)
    return held[0] + most


def measured_on_gpu(recipe: Recipe) -> int:
    """The allocator's peak in the second step."""
    held = torch.cuda.memory_allocated()
    peak: list[int] = []
    _train_between(
        recipe,
        lambda _: torch.cuda.reset_peak_memory_stats(),
        lambda _: peak.append(torch.cuda.max_memory_allocated()),
    )
    return peak[0] - held


def _train_between(recipe: Recipe, start: Seen, stop: Seen) -> None:
    """Train, calling `start` after the first optimizer step and `stop` after the second."""
    calls = [start, stop]
    handle = register_optimizer_step_post_hook(
        lambda optimizer, *_: calls.pop(0)(optimizer) if calls else None
    )
    try:
        train(recipe, overwrite=True)
    finally:
        handle.remove()
    assert not calls


def _storages() -> dict[int, int]:
    """The bytes of every living tensor, by address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # A plan's tensors without content may be yet to be collected.
        # By its type: an attribute `__class__` may warn, as that of a name that torch has deprecated.
        real = issubclass(type(thing), torch.Tensor) and not isinstance(thing, FakeTensor)
        if real and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return found

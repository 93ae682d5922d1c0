"""Folders with only a config.json, which is all that a plan needs."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.recipe.schema import Recipe

LLAMA = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
MakeRecipe = Callable[..., Recipe]


@pytest.fixture
def bare(tmp_path: Path) -> Callable[..., Path]:
    """A folder with the configuration of a small Llama, changed by the arguments."""

    def make(**changes: Any) -> Path:
        numbers = json.dumps(LLAMA | changes)
        folder = tmp_path / f"bare-{zlib.crc32(numbers.encode())}"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(numbers)
        return folder

    return make


@pytest.fixture
def recipe(bare: Callable[..., Path]) -> MakeRecipe:
    """A recipe for that folder, on a GPU that need not exist; sections are keywords, and `config` has its numbers."""

    def make(config: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
        model = {"name": str(bare(**(config or {}))), "device": "cuda"} | sections.pop("model", {})
        data = {"max_length": 128} | sections.pop("data", {})
        return Recipe.model_validate({"model": model, "data": data, **sections})

    return make

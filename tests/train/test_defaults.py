"""A newcomer's first results: every method at its defaults, on the model inside the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.train import train
from tests.heard import Heard

STEPS = 24


@pytest.mark.parametrize(
    ("adapter", "most"),
    [
        ({}, 0.4),
        ({"preset": "paper"}, 0.9),
        ({"method": "lora"}, 0.5),
        ({"method": "prefix-tuning"}, 0.9),
        ({"method": "full"}, 0.5),
    ],
    ids=str,
)
def test_every_method_at_its_defaults_ends_well_below_the_base(
    tmp_path: Path, adapter: dict[str, Any], most: float
) -> None:
    flags = {
        # A CPU without bfloat16 instructions takes seven times as long in 16 bits.
        "model": {"bits": 32},
        "data": {"train": "sample:intents-train", "eval": "sample:intents-test", "max_length": 128},
        "train": {"max_steps": STEPS, "batch_size": 16},
        "evaluate": {"max_rows": 64, "max_new_tokens": 1},
        "adapter": adapter,
        "out": str(tmp_path / "run"),
    }
    heard = Heard()
    found = train(resolve(None, [], flags), reporter=heard)
    print(f"{adapter}: {found.adapter.loss:.3f} of {found.base.loss:.3f}")
    assert found.adapter.loss < most * found.base.loss
    assert heard.warnings == []

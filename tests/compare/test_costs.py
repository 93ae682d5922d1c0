"""Costs at several shapes and on several bases: each figure belongs to its row."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import LlamaConfig, PreTrainedModel

from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.contest import Settings
from prefixtune_cli.compare.costs import compare_costs
from prefixtune_cli.compare.metrics import Measured
from prefixtune_cli.errors import RecipeError, UsageError
from prefixtune_cli.progress import Silent

POSITIONS = 64


class Heard(Silent):
    """What was reported, and the number of bases in memory each time that one was about to be built."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.bases: list[int] = []

    def notice(self, text: str) -> None:
        if text.startswith("Building"):
            self.bases.append(living_bases())

    def warning(self, text: str) -> None:
        self.warnings.append(text)


def living_bases_of_others() -> int:
    gc.collect()  # an earlier test may have left garbage
    return living_bases()


def living_bases() -> int:
    return sum(issubclass(type(thing), PreTrainedModel) for thing in gc.get_objects())


@pytest.fixture
def trained_shapes() -> Iterator[list[tuple[int, ...]]]:
    """[rows, tokens] of every training step of any model."""
    seen: list[tuple[int, ...]] = []

    def look(module: nn.Module, given: Any) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            seen.append(tuple(given[0].shape))

    hook = register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


def config(folder: Path, layers: int, **more: Any) -> str:
    made = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, max_position_embeddings=POSITIONS, **more,
    )  # fmt: skip
    made.save_pretrained(folder / f"layers-{layers}")
    return str(folder / f"layers-{layers}")


def costs(model: str, out: Path, heard: Silent | None = None, **how: Any) -> Comparison:
    flags = {"model": {"name": model, "device": "cpu", "bits": 32}, "train": {"batch_size": 2}}
    grids = how.pop("grids", {})
    given = {"methods": ("lora",), "rounds": 1, "out": str(out), **how}
    return compare_costs(Settings(flags=flags, grids=grids, **given), heard)[0]


def caches(found: Comparison) -> dict[str, int | None]:
    return {c.label: c.cost.kv_cache_bytes if c.cost else None for c in found.contestants}


def test_every_length_and_base_of_the_grid_is_measured_as_its_row_says(
    tmp_path: Path, trained_shapes: list[tuple[int, ...]]
) -> None:
    one, two = config(tmp_path, 1), config(tmp_path, 2)
    heard, before = Heard(), living_bases_of_others()
    grids = {"data.max_length": [8, 16], "model.name": [one, two]}
    found = costs(one, tmp_path / "out", heard, grids=grids)
    assert set(trained_shapes) == {(2, 8), (2, 16)}
    assert [group.base for group in found.groups] == [
        f"base max_length={length} {name}" for length in (8, 16) for name in (one, two)
    ]
    of_bases = [group.base_cost.kv_cache_bytes for group in found.groups if group.base_cost]
    tokens = POSITIONS - 32  # the longest prompt that leaves room for 32 new tokens
    a_layer = tokens * 2 * 32 * 4
    assert of_bases == list(caches(found).values()) == [a_layer, 2 * a_layer] * 2
    for group, contestant in zip(found.groups, found.contestants, strict=True):
        assert group.contestants == [contestant.label]
        ours, base = contestant.cost, group.base_cost
        assert ours is not None and base is not None
        speed, yardstick = ours.training_tokens_per_second, base.training_tokens_per_second
        assert speed is not None and yardstick is not None
        ratio = speed.median / yardstick.median  # of one round
        assert ours.training_ratio == Measured(ratio, ratio, ratio)
        assert base.training_over_lora is not None
        assert base.training_over_lora.median == pytest.approx(1 / ratio)
        assert ours.training_over_lora == Measured(1, 1, 1)
    assert heard.bases == [before, before], "each base is built once, and gone before the next"
    assert found.base_cost is None
    assert found.model["name"] == f"{one}, {two}"
    assert "parameters" not in found.model
    assert "length" not in found.protocol
    assert found.protocol["batch_size"] == 2
    sizes = [c.trainable_parameters for c in found.contestants]
    assert sizes[0] == sizes[2] and sizes[1] == sizes[3] and sizes[0] != sizes[1]


def test_batch_sizes_of_the_grid_are_trained_on(
    tmp_path: Path, trained_shapes: list[tuple[int, ...]]
) -> None:
    grids = {"train.batch_size": [1, 3], "adapter.r": [2, 4]}
    found = costs(config(tmp_path, 1), tmp_path / "out", grids=grids)
    assert set(trained_shapes) == {(1, POSITIONS), (3, POSITIONS)}
    assert [list(group.contestants) for group in found.groups] == [
        ["lora batch_size=1 r=2", "lora batch_size=1 r=4"],
        ["lora batch_size=3 r=2", "lora batch_size=3 r=4"],
    ]
    assert found.model["parameters"]


def test_a_group_that_cannot_be_measured_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    grids = {"data.max_length": [16, POSITIONS + 5], "train.batch_size": [2, 10**14]}
    heard = Heard()
    found = costs(config(tmp_path, 1), tmp_path / "out", heard, grids=grids)
    first, huge, long, both = found.groups
    assert first.base_cost is not None and found.contestants[0].cost is not None
    assert list(found.unmeasured) == [huge.base, long.base, both.base]
    assert "Not even the base by itself can be measured" in found.unmeasured[huge.base]
    assert "Ask for 5 fewer" in found.unmeasured[long.base]
    assert len(heard.warnings) == 3
    assert len(heard.bases) == 1
    assert found.failed


def test_a_base_that_cannot_be_built_leaves_the_others_alone(tmp_path: Path) -> None:
    huge, small = config(tmp_path, 3), config(tmp_path, 1)
    LlamaConfig(vocab_size=10**13, hidden_size=64, num_hidden_layers=1).save_pretrained(huge)
    found = costs(small, tmp_path / "out", grids={"model.name": [huge, small]})
    assert list(found.unmeasured) == [f"base {huge}"]
    assert "does not fit into the memory" in found.unmeasured[f"base {huge}"]
    assert [c.cost is not None for c in found.contestants] == [False, True]


def test_one_group_has_its_base_alone_and_its_error_ends_the_command(tmp_path: Path) -> None:
    model = config(tmp_path, 1)
    found = costs(model, tmp_path / "out", grids={"data.max_length": [16]})
    assert found.groups == ()
    assert found.base_cost is not None
    assert found.protocol["length"] == 16
    with pytest.raises(UsageError, match="Ask for 5 fewer"):
        costs(model, tmp_path / "out", grids={"data.max_length": [POSITIONS + 5]})


@pytest.mark.parametrize(
    ("grids", "error"),
    [
        ({"train.optimizer": ["adamw_torch", "adamw_toch"]}, "adamw_toch"),
        ({"model.bits": [16, 5]}, "model.bits"),
    ],
)
def test_a_wrong_value_is_refused_before_a_base_is_built(
    tmp_path: Path, grids: dict[str, list[Any]], error: str
) -> None:
    heard = Heard()
    with pytest.raises(RecipeError, match=error):
        costs(config(tmp_path, 1), tmp_path / "out", heard, grids=grids)
    assert heard.bases == []


def test_adapters_at_once_are_told(tmp_path: Path) -> None:
    found = costs(config(tmp_path, 1), tmp_path / "out", adapters=2)
    assert found.protocol["adapters"] == 2
    cost = found.contestants[0].cost
    assert cost is not None and cost.adapters == 2

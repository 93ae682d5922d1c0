"""Damaged adapters: the message names the damage; an unreadable file is one error."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch

from prefixtune_cli.adapter_folder import check_fits
from prefixtune_cli.errors import AdapterError, RunDirError
from prefixtune_cli.merge_info.one_adapter import gather
from prefixtune_cli.merge_info.saved_adapter import read
from prefixtune_cli.pointed import point
from prefixtune_cli.recipe.schema import ModelSection

from .conftest import MEMORY, WEIGHTS, Make, change, lora, memory, prefix

M0 = MEMORY.format(0, "self_attn", "M")


@pytest.fixture
def folder(make: Make) -> Path:
    return make("plus", memory())


def findings(folder: Path) -> list[tuple[str, str]]:
    return [(found.kind, found.key) for found in gather(point(folder)).findings]


@pytest.mark.parametrize(
    "config",
    [
        memory(),
        memory(feature_map="mlp", layers=[1]),
        memory(sites="attention+ffn", rank=2),
        lora(target_modules="all-linear"),
        lora(modules_to_save=["lm_head"]),
        lora(init_lora_weights="pissa_niter_2"),
        prefix(),
    ],
    ids=["plus", "mlp", "both-sites", "lora", "modules-to-save", "pissa", "prefix"],
)
def test_a_sound_adapter_has_no_findings(make: Make, config) -> None:
    facts = gather(point(make("sound", config)))
    assert facts.base is not None
    assert facts.findings == ()


def test_values_that_are_not_finite_are_counted(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[M0][0, 0, :3] = float("nan")
        tensors[M0][1, 0, 0] = float("-inf")

    change(folder, spoil)
    facts = gather(point(folder))
    assert [(found.kind, found.key) for found in facts.findings] == [("nan", M0), ("infinite", M0)]
    assert "3 of 1024 values are NaN" in facts.findings[0].text


def test_a_tensor_of_zeros_is_named(folder: Path) -> None:
    change(folder, lambda tensors: tensors[M0].zero_())
    assert findings(folder) == [("zero", M0)]


def test_missing_extra_and_misshapen_keys_are_named(folder: Path) -> None:
    extra, m1 = MEMORY.format(7, "self_attn", "M"), MEMORY.format(1, "self_attn", "M")

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        tensors[extra] = tensors.pop(M0)
        tensors[m1] = tensors[m1][:3].contiguous()

    change(folder, swap)
    assert sorted(findings(folder)) == [("extra", extra), ("missing", M0), ("shape", m1)]
    text = next(found.text for found in gather(point(folder)).findings if found.kind == "shape")
    assert "is [3, 16, 16], and on this base [4, 16, 16]" in text


def test_a_mix_of_dtypes_is_told(folder: Path) -> None:
    change(folder, lambda tensors: tensors.update({M0: tensors[M0].bfloat16()}))
    assert findings(folder) == [("dtypes", "")]
    assert gather(point(folder)).dtypes == {"bfloat16": 1, "float32": 1}


def test_an_adapter_that_its_base_cannot_take_is_a_finding(make: Make, folder: Path) -> None:
    config = (
        (folder / "adapter_config.json").read_text().replace('"layers": "all"', '"layers": [0, 9]')
    )
    (folder / "adapter_config.json").write_text(config)
    (found,) = gather(point(folder)).findings
    assert found.kind == "misfit"
    assert "[9]" in found.text


def test_a_prefix_of_a_base_with_fewer_layers_does_not_fit(make: Make, random_base: Path) -> None:
    """Its own configuration names the shapes of the other base, and is not believed."""
    folder = make("prefix", prefix())
    settings = folder / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"num_layers": 1}))

    def halve(tensors: dict[str, torch.Tensor]) -> None:
        whole = tensors["prompt_embeddings"]
        tensors["prompt_embeddings"] = whole[:, : whole.shape[1] // 2].contiguous()

    change(folder, halve)
    assert findings(folder) == [("shape", "prompt_embeddings")]
    with pytest.raises(AdapterError, match="does not fit the base"):
        check_fits(ModelSection(name=str(random_base)), folder)


def test_the_hash_is_that_of_the_file(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    assert read(point(folder)).sha256 == hashlib.sha256(content).hexdigest()
    assert read(point(folder)).bytes_on_disk == len(content)


def test_a_truncated_file_a_pickle_and_a_missing_config_are_one_error_each(folder: Path) -> None:
    weights, config = folder / WEIGHTS, folder / "adapter_config.json"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(AdapterError, match="cannot be read"):
        read(point(folder))
    weights.unlink()
    torch.save({}, folder / "adapter_model.bin")
    with pytest.raises(AdapterError, match=r"pickle \(adapter_model\.bin\), which is never read"):
        read(point(folder))
    weights.write_bytes(content)
    config.unlink()
    with pytest.raises(AdapterError, match=r"has weights but no adapter_config\.json"):
        read(point(folder))


def test_what_is_no_adapter_is_told_from_what_is_no_folder(
    tmp_path: Path, random_base: Path
) -> None:
    with pytest.raises(AdapterError, match="There is no run or adapter"):
        read(point(tmp_path / "nowhere"))
    with pytest.raises(AdapterError, match="is a base, not a run or an adapter"):
        read(point(random_base))
    with pytest.raises(AdapterError, match="is a file, not a run or an adapter"):
        read(point(random_base / "config.json"))


def test_runs_without_an_adapter_are_told(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("adapter: {method: lora}\n")
    with pytest.raises(RunDirError, match="has no adapter yet"):
        read(point(tmp_path))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "recipe.yaml").write_text("adapter: {method: full}\n")
    with pytest.raises(AdapterError, match="its method is full"):
        read(point(tmp_path))

"""Adapters on their base: what does not fit, is too new, is damaged or is a pickle."""

import json
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from prefixtune_cli import model as models
from prefixtune_cli.adapter_folder import check_fits, load_adapter, read_adapter_config
from prefixtune_cli.errors import AdapterError
from prefixtune_cli.recipe.schema import Lora, ModelSection, PrefixTuningPlus


def section(base: Path, bits: int = 32) -> ModelSection:
    return ModelSection.model_validate({"name": str(base), "bits": bits})


@pytest.fixture
def adapter(random_base: Path, tmp_path: Path) -> Path:
    models.attach(models.load_base(section(random_base)), PrefixTuningPlus()).save_pretrained(
        tmp_path / "adapter"
    )
    return tmp_path / "adapter"


def other_base(folder: Path, **changes: int) -> Path:
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    } | changes
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(folder)
    return folder


def test_an_adapter_of_another_base_is_told_in_heads_and_layers(
    adapter: Path, tmp_path: Path
) -> None:
    base = other_base(tmp_path / "other", num_attention_heads=8)
    with pytest.raises(AdapterError) as caught:
        load_adapter(models.load_base(section(base)), adapter)
    message = str(caught.value)
    assert "trained for 2 layers with 4 heads of width 16" in message
    assert "2 layers with 8 heads of width 8 (2 key/value heads)" in message
    assert "--model" in message


def test_an_adapter_of_a_shallower_base_is_refused_too(adapter: Path, tmp_path: Path) -> None:
    base = other_base(tmp_path / "deep", num_hidden_layers=3)
    with pytest.raises(AdapterError, match="no weights for 2 of 6 places"):
        load_adapter(models.load_base(section(base)), adapter)


def test_an_adapter_of_another_architecture_is_refused_by_its_first_misfit(
    adapter: Path, tmp_path: Path
) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)).save_pretrained(
        tmp_path / "gpt2"
    )
    with pytest.raises(AdapterError, match=r"does not fit the base .*size mismatch for .*M: "):
        check_fits(section(tmp_path / "gpt2"), adapter)


def test_a_lora_adapter_of_another_base_is_refused_with_the_first_misfit(
    random_base: Path, tmp_path: Path
) -> None:
    attached = models.attach(models.load_base(section(random_base)), Lora(r=2))
    attached.save_pretrained(tmp_path / "lora")
    base = other_base(tmp_path / "other", hidden_size=32)
    with pytest.raises(AdapterError, match="size mismatch"):
        load_adapter(models.load_base(section(base)), tmp_path / "lora")


def test_an_adapter_of_a_newer_version_says_to_update(adapter: Path, random_base: Path) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"format_version": 99}))
    with pytest.raises(AdapterError, match=r"format version 99.*pip install --upgrade"):
        load_adapter(models.load_base(section(random_base)), adapter)


def test_a_pickle_is_never_read(adapter: Path, random_base: Path) -> None:
    torch.save({}, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"pickle \(adapter_model\.bin\), which is never read"):
        load_adapter(models.load_base(section(random_base)), adapter)


def test_a_folder_without_an_adapter_and_a_broken_config_are_refused(
    adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="holds no adapter"):
        read_adapter_config(tmp_path)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(AdapterError, match="cannot be read"):
        read_adapter_config(adapter)


def test_a_damaged_weights_file_is_refused(adapter: Path, random_base: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="cannot be read"):
        load_adapter(models.load_base(section(random_base)), adapter)


@pytest.mark.parametrize("check", ["load", "fits"])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank": 2}, "trained for 2 layers with 4 heads of width 16, and this base has 2 layers"),
        (
            {"sites": "ffn", "feature_map": "elu"},
            r"size mismatch for .*layers\.0\.mlp\.prefix_tuning_plus_memory\.",
        ),
    ],
    ids=["low-rank", "ffn"],
)
def test_an_adapter_of_other_heads_is_refused_in_every_form(
    random_base: Path, tmp_path: Path, options: dict[str, object], said: str, check: str
) -> None:
    adapter = models.attach(
        models.load_base(section(random_base)), PrefixTuningPlus.model_validate(options)
    )
    adapter.save_pretrained(tmp_path / "adapter")
    other = section(other_base(tmp_path / "other", num_attention_heads=8))
    fits = models.load_base(other) if check == "load" else other
    give = load_adapter if check == "load" else check_fits
    with pytest.raises(AdapterError, match=said):
        give(fits, tmp_path / "adapter")

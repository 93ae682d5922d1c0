"""Adapters that do not fit, are too new, or are pickles; quantization; requirements on a base."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from prefixtune_cli import model as models
from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter_folder import check_fits, load_adapter, read_adapter_config
from prefixtune_cli.errors import AdapterError, ModelError, ResourceError
from prefixtune_cli.recipe.schema import Lora, ModelSection, PrefixTuningPlus
from prefixtune_cli.tokenizer import load_tokenizer


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


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_keeps_its_own_modules_and_gives_the_adapter_a_gradient(
    bits: int, random_base: Path
) -> None:
    base = models.load_base(section(random_base, bits))
    before = {name: type(module) for name, module in base.named_modules()}
    assert any("bnb" in str(kind) or "bitsandbytes" in str(kind) for kind in before.values())
    attached = models.attach(base, PrefixTuningPlus())
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): type(module)
        for name, module in attached.named_modules()
        if not name.endswith("self_attn")
    }
    assert all(after[name] is kind for name, kind in before.items() if name and name in after)
    ids = torch.arange(5, 25)[None]
    attached(input_ids=ids, labels=ids).loss.backward()
    gradients = [p.grad for p in attached.parameters() if p.requires_grad]
    assert gradients
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients)


def test_a_base_of_16_bits_is_bfloat16_and_one_to_be_trained_whole_float32(
    random_base: Path,
) -> None:
    assert models.load_base(section(random_base, 16)).dtype == torch.bfloat16
    assert models.load_base(section(random_base, 16), trainable=True).dtype == torch.float32


def test_a_model_that_the_hook_does_not_reach_is_named(tmp_path: Path) -> None:
    from transformers import BloomConfig, BloomForCausalLM

    base = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2))
    with pytest.raises(ModelError, match="BloomForCausalLM cannot be adapted"):
        models.attach(base, PrefixTuningPlus())


def test_a_base_that_lacks_a_weight_is_refused_rather_than_randomised(
    random_base: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "holed"
    shutil.copytree(random_base, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ModelError, match=r"lacks 1 of its weights, the first is model\.layers\.1\.mlp\.up"
    ):
        models.load_base(section(folder))


def test_a_truncated_base_is_refused(random_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(random_base, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="Cannot load the model"):
        models.load_base(section(folder))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_told_before_the_base_loads(random_base: Path) -> None:
    wanted = section(random_base).model_copy(update={"device": "cuda"})
    with pytest.raises(ResourceError, match=r"no CUDA GPU here.*--device cpu"):
        models.load_base(wanted)


def test_a_model_without_a_tokenizer_is_refused(random_base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no-tokenizer"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(random_base / name, folder)
    with pytest.raises(ModelError, match="Cannot load the tokenizer"):
        load_tokenizer(section(folder))


def test_a_tokenizer_without_a_padding_token_pads_with_the_end_token(
    random_base: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "unpadded")
    loaded = load_tokenizer(section(tmp_path / "unpadded"))
    assert loaded.pad_token == loaded.eos_token


def test_the_recipes_adapter_reaches_peft_in_every_field(random_base: Path) -> None:
    chosen = PrefixTuningPlus(
        feature_map="mlp", feature_dim=5, normalize_query=True, share_heads="kv", layers=[1],
        sites="attention",
    )  # fmt: skip
    config = models.peft_config(chosen)
    assert isinstance(config, PrefixTuningPlusConfig)
    given = chosen.model_dump(exclude={"method", "preset", "basis"})  # basis belongs to the trainer
    assert {name: getattr(config, name) for name in given} == given
    attached = get_peft_model(models.load_base(section(random_base)), config)
    assert isinstance(attached, PeftModel)
    assert {name: tuple(p.shape) for name, p in attached.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.layers.1.self_attn.prefix_tuning_plus_memory.default.{part}": shape
        for part, shape in {"M": (2, 5, 16), "W_phi": (2, 5, 16), "b_phi": (2, 5)}.items()
    }


def test_the_recipes_sites_reach_peft_in_every_field(random_base: Path) -> None:
    chosen = PrefixTuningPlus(sites="attention+ffn", block_size=32, rank=3, layers=[1])
    config = models.peft_config(chosen)
    assert isinstance(config, PrefixTuningPlusConfig)
    assert (config.sites, config.block_size, config.rank) == ("attention+ffn", 32, 3)
    attached = get_peft_model(models.load_base(section(random_base)), config)
    assert {name: tuple(p.shape) for name, p in attached.named_parameters() if p.requires_grad} == {
        f"base_model.model.model.layers.1.{module}.prefix_tuning_plus_memory.default.{part}": shape
        for module, parts in {
            "self_attn": {"M_down": (4, 16, 3), "M_up": (4, 3, 16)},
            "mlp": {"M_down": (2, 32, 3), "M_up": (2, 3, 32)},
        }.items()
        for part, shape in parts.items()
    }


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


def test_a_block_size_that_does_not_fit_the_base_is_one_error(random_base: Path) -> None:
    base = models.load_base(section(random_base))
    with pytest.raises(ModelError, match=r"block_size must divide .*, 64, got 24\. Near it are"):
        models.attach(base, PrefixTuningPlus(sites="ffn", block_size=24))

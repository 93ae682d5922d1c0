"""What a base must be; quantization; what a recipe's adapter becomes."""

import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.compare.speed.inference import Answer
from prefixtune_cli.errors import ModelError, ResourceError
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.shared_prefix import Request, log_likelihoods
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuning, PrefixTuningPlus
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train.prefix import start_at_rows


def section(base: Path, bits: int = 32) -> ModelSection:
    return ModelSection.model_validate({"name": str(base), "bits": bits})


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


def test_a_block_size_that_does_not_fit_the_base_is_one_error(random_base: Path) -> None:
    base = models.load_base(section(random_base))
    with pytest.raises(ModelError, match=r"block_size must divide .*, 64, got 24\. Near it are"):
        models.attach(base, PrefixTuningPlus(sites="ffn", block_size=24))


def score(base: PreTrainedModel) -> Callable[[], object]:
    shared = tuple(range(5, 65))  # long enough to be computed once
    requests = [Request(shared, (last,)) for last in (70, 71, 72)]
    limit = BatchLimit(4, 1000, Silent())
    return lambda: list(log_likelihoods(base, requests, max_length=99, pad_id=0, limit=limit))


def answer(base: PreTrainedModel) -> Callable[[], object]:
    answer = Answer(base, torch.tensor([[5, 6, 7]]))
    return lambda: (answer.begin(), answer.go_on(2))


def start_a_prefix(base: PreTrainedModel) -> Callable[[], object]:
    section = PrefixTuning(num_virtual_tokens=2, init="rows")
    model, rows = models.attach(base, section), Dataset.from_dict({"input_ids": [[5, 6, 7]]})
    return lambda: start_at_rows(model, section, rows, 0)


@pytest.mark.parametrize("prepared", [score, answer, start_a_prefix])
def test_a_cache_goes_by_the_name_that_is_not_deprecated(
    prepared: Callable[[PreTrainedModel], Callable[[], object]],
    random_base: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(_: logging.Logger, said: str, *args: object) -> None:
        raise AssertionError(said)

    call = prepared(models.load_base(section(random_base)).eval())
    monkeypatch.setattr("logging.Logger.warning_once", refuse)  # by which transformers says so
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()

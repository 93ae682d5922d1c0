"""Every method of peft's registry is trained, scored, saved, loaded and removed, or refused with a reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli import peft_methods
from prefixtune_cli.adapter_folder import (
    attach_trained,
    check_fits,
    check_goes_on,
    load_adapter,
)
from prefixtune_cli.errors import AdapterError, ModelError, RecipeError
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.generate import answer_batched
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import IN_FRONT, IN_THE_CACHE, ModelSection
from prefixtune_cli.sampling import Sampling

# Without these settings, a method does not fit a base of width 64.
SMALL: dict[str, dict[str, Any]] = {
    "adamss": {"num_subspaces": 2},
    "c3a": {"block_size": 16},
    "cartridge": {"num_virtual_tokens": 4},
    "p-tuning": {"num_virtual_tokens": 4},
    "prompt-tuning": {"num_virtual_tokens": 4},
    "road": {"group_size": 16},
    "shira": {"r": 4},
    "trainable-tokens": {"token_indices": [36, 37]},
    "vblora": {"vector_length": 16},
    "waveft": {"n_frequency": 64},
}
TRAINED = [
    *("adamss", "beft", "boft", "c3a", "cartridge", "deft", "delora"),
    *("fourierft", "frod", "glora", "gralora", "hira", "hra", "ia3", "lily", "ln-tuning", "loha"),
    *("lokr", "lora", "miss", "oft", "osf", "p-tuning", "peanut", "prefix-tuning"),
    *("prompt-tuning", "psoft", "pvera", "randlora", "road", "shadow", "shira", "supertuning"),
    *("tinylora", "trainable-tokens", "unilora", "vblora", "vera", "waveft"),
]
IDS = torch.tensor([[36, 37, 38, 39, 40, 41, 42], [50, 51, 36, 53, 54, 55, 56]])


def base_section(folder: Path, bits: int = 32) -> ModelSection:
    return ModelSection.model_validate({"name": str(folder), "bits": bits})


def adapter_of(method: str, **config: Any) -> Any:
    return resolve(flags={"adapter": {"method": method, "config": config}}).adapter


@pytest.fixture(scope="module")
def tokenizer(random_base: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(random_base)


def test_every_method_of_peft_is_trained_or_refused_and_none_else() -> None:
    ours = {"prefix-tuning-plus"}
    registry = set(peft_methods.names()) - ours
    assert registry == set(TRAINED) | set(peft_methods.REFUSED)
    assert not set(TRAINED) & set(peft_methods.REFUSED)
    prompts = {
        peft_methods.canonical(kind.value.lower())
        for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()
        if "num_virtual_tokens" in config.__dataclass_fields__
    }
    assert prompts - set(peft_methods.REFUSED) == IN_FRONT | IN_THE_CACHE


def one_step(model: PeftModel, dtype: torch.dtype = torch.float32) -> None:
    """A step as in the trainer: the adapter in float32, everything else under autocast."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    model.train()
    before = [p.detach().clone() for p in trained]
    for _ in range(2):  # the first step of a product of two matrices may change only one
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = model(input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS).loss
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert any(not torch.equal(a, b) for a, b in zip(before, trained, strict=True))
    model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    return found[:, -IDS.shape[1] :]


@pytest.mark.parametrize("method", TRAINED)
def test_a_method_is_trained_scored_saved_loaded_and_taken_off(
    method: str, random_base: Path, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    section = base_section(random_base)
    models.check_method(section, adapter_of(method, **SMALL.get(method, {})))
    base = models.load_base(section).eval()
    plain = logits(base)
    torch.manual_seed(0)
    model = models.attach(base, adapter_of(method, **SMALL.get(method, {})))
    assert isinstance(model, PeftModel)
    one_step(model)
    expected = logits(model)
    assert not torch.equal(expected, plain)
    with models.without_adapter(model):
        assert torch.equal(logits(model), plain)

    rows = [
        {"input_ids": ids, "labels": [-100] * (len(ids) - 3) + ids[-3:]}
        for ids in (IDS[0].tolist(), IDS[1].tolist()[:-1])
    ]
    scorer = Scorer(model, tokenizer, BatchLimit.of_rows(2, Silent()), Silent())
    scored = scorer.losses(rows, "loss")
    for row, (nats, count) in zip(rows, scored, strict=True):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        direct = F.cross_entropy(alone[0, -4:-1], ids[0, -3:], reduction="sum").item()
        assert (nats, count) == (pytest.approx(direct, rel=1e-4), 3)

    sampling = Sampling(max_new_tokens=3)
    prompt = IDS[0].tolist()
    (answer,) = answer_batched(model, tokenizer, [prompt], end_id=None, sampling=sampling)
    for _ in range(3):  # without a cache
        ids = torch.tensor([prompt])
        with torch.no_grad():
            prompt = [*prompt, int(model(input_ids=ids).logits[0, -1].argmax())]
    assert answer == tokenizer.decode(prompt[-3:], skip_special_tokens=True)

    model.save_pretrained(tmp_path)
    check_fits(section, tmp_path)
    loaded = load_adapter(models.load_base(section), tmp_path).eval()
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=1e-5)
    adapter = adapter_of(method, **SMALL.get(method, {}))
    if method == "p-tuning":
        with pytest.raises(AdapterError, match="the network of p-tuning is not saved"):
            check_goes_on(section, adapter, tmp_path)
    else:
        check_goes_on(section, adapter, tmp_path)
        further = attach_trained(models.load_base(section), adapter, tmp_path).eval()
        torch.testing.assert_close(logits(further), expected, rtol=0, atol=1e-5)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert {name for name, p in further.named_parameters() if p.requires_grad} == trained
    models.detach(model)
    assert torch.equal(logits(base), plain)


def test_a_prefix_without_its_network_is_not_trained_on(random_base: Path, tmp_path: Path) -> None:
    section = base_section(random_base)
    flags = {"method": "prefix-tuning", "prefix_projection": True, "num_virtual_tokens": 4}
    adapter = resolve(flags={"adapter": flags}).adapter
    model = models.attach(models.load_base(section), adapter)
    assert isinstance(model, PeftModel)
    model.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="the network of prefix_projection is not saved"):
        check_goes_on(section, adapter, tmp_path)


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("method", TRAINED)
def test_a_method_is_trained_on_a_base_of_fewer_bits_or_refused_before_it_loads(
    method: str, bits: int, random_base: Path
) -> None:
    section, adapter = base_section(random_base, bits), adapter_of(method, **SMALL.get(method, {}))
    if bits == 4 and method in peft_methods.NOT_QUANTIZED:
        with pytest.raises(ModelError, match=f"Method {method} computes with the base's weights"):
            models.check_method(section, adapter)
        return
    models.check_method(section, adapter)
    base = models.load_base(section).eval()
    plain = logits(base)
    model = models.attach(base, adapter)
    assert isinstance(model, PeftModel)
    one_step(model, torch.bfloat16)
    assert torch.isfinite(logits(model)).all()
    model.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2)
    with models.without_adapter(model):
        assert torch.equal(logits(model), plain)
    models.detach(model)
    assert torch.equal(logits(base), plain)


@pytest.mark.parametrize("method", sorted(peft_methods.REFUSED))
def test_a_method_that_needs_more_than_tokens_is_refused_with_the_reason(method: str) -> None:
    with pytest.raises(RecipeError) as told:
        models.peft_config(adapter_of(method))
    assert str(told.value) == (
        f"Method {method} cannot be trained by ptp: {peft_methods.REFUSED[method]}."
    )


@pytest.mark.parametrize(
    ("method", "config", "told"),
    [
        ("adamsz", {}, "There is no method adamsz. Did you mean adamss? Known are prefix-tun"),
        (
            "ia3",
            {"target_module": ["q"]},
            "adapter.config.target_module is not a setting of method",
        ),
        ("ia3", {"target_module": ["q"]}, "ia3. Did you mean target_modules?"),
        ("vera", {"r": "eight"}, "adapter.config.r must be a valid integer, got 'eight'"),
        ("lora", {"use_dora": 3}, "adapter.config.use_dora must be a valid boolean, got 3"),
        ("lora", {"init_lora_weights": "pissa"}, "'pissa' changes the base's weights"),
        ("vera", {"bias": "all"}, "'all' would train the base's own biases"),
        ("trainable-tokens", {}, "needs adapter.config.token_indices, as in --set 'adapter.config"),
        ("boft", {"boft_block_size": 0}, "adapter.config does not fit method boft: "),
    ],
)
def test_a_wrong_method_or_setting_is_told_in_words(
    method: str, config: dict[str, Any], told: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        models.peft_config(adapter_of(method, **config))
    assert told in str(caught.value)


def test_further_settings_of_lora_reach_peft(random_base: Path) -> None:
    config = {"use_dora": True, "use_rslora": True, "modules_to_save": ["norm"]}
    model = models.attach(models.load_base(base_section(random_base)), adapter_of("lora", **config))
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert any("lora_magnitude_vector" in name for name in trained)
    assert any("norm.modules_to_save" in name for name in trained)
    found = model.active_peft_config
    assert (found.use_dora, found.use_rslora, found.r, found.lora_alpha) == (True, True, 16, 32)


def test_an_architecture_that_peft_does_not_know_has_all_linear_layers_adapted() -> None:
    base = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=64))
    base.config.model_type = "unheard-of"
    model = models.attach(base, adapter_of("vera", r=4))
    assert {"c_attn", "c_proj", "c_fc"} <= {
        name.split(".")[-3] for name, _ in model.named_parameters() if "vera_lambda_b" in name
    }


def test_an_adapter_whose_shape_does_not_fit_is_refused(random_base: Path, tmp_path: Path) -> None:
    section = base_section(random_base)
    with pytest.raises(ModelError, match=r"adapter: .*block size"):
        models.attach(models.load_base(section), adapter_of("c3a"))
    models.attach(models.load_base(section), adapter_of("ia3")).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(AdapterError, match="pickle"):
        load_adapter(models.load_base(section), tmp_path)

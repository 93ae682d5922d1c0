"""`merge`: adapters on a tiny base, merged without its weights, against their joint effect on it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from peft import (
    IA3Config,
    LoraConfig,
    PeftConfig,
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
)
from peft.utils import merge_utils
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from prefixtune_cli import model as models
from prefixtune_cli.adapter import PrefixTuningPlusConfig
from prefixtune_cli.adapter_folder import check_fits, load_adapter
from prefixtune_cli.errors import (
    AdapterError,
    ModelError,
    PtpError,
    ResourceError,
    RunDirError,
    UsageError,
)
from prefixtune_cli.merge import adapters as of_several
from prefixtune_cli.merge import into_base as of_one
from prefixtune_cli.merge.folder import Merged
from prefixtune_cli.merge_info.base import without_weights
from prefixtune_cli.merge_info.saved_adapter import integrity, read
from prefixtune_cli.pointed import point
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import ModelSection

TOKENS = torch.arange(5, 25).view(2, 10)


def merge(adapters: list[str], **options) -> Merged:
    return of_several.merge([point(adapter) for adapter in adapters], **options)


def merge_into_base(adapter: str, **options) -> Merged:
    return of_one.merge_into_base(point(adapter), **options)


def base_model(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(base: Path, folder: Path, config: PeftConfig, seed: int = 0, copies: bool = False) -> str:
    """An adapter of random numbers, as training would leave it; with `copies`, as peft alone would write it."""
    model = get_peft_model(base_model(base), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * (1 if "prompt" in name else 0.3))
    model.save_pretrained(str(folder), save_embedding_layers="auto" if copies else False)
    return str(folder)


def pt_plus(**options: object) -> PeftConfig:
    return PrefixTuningPlusConfig(task_type="CAUSAL_LM", **options)


def lora(**options: object) -> PeftConfig:
    options = {"target_modules": ["q_proj", "v_proj"], "r": 4, **options}
    return LoraConfig(task_type="CAUSAL_LM", **options)


@pytest.fixture
def pair(random_base: Path, tmp_path: Path) -> list[str]:
    return [save(random_base, tmp_path / name, pt_plus(), seed) for seed, name in enumerate("ab")]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def of_folder(base: Path, folder: str | Path) -> torch.Tensor:
    return logits(PeftModel.from_pretrained(base_model(base), str(folder)).eval())


def updates(base: Path, folder: str | Path) -> dict[str, torch.Tensor]:
    """How much each weight of the base differs from what a LoRA makes of it."""
    plain = base_model(base).state_dict()
    folded = PeftModel.from_pretrained(base_model(base), str(folder)).merge_and_unload()
    return {key: value - plain[key] for key, value in folded.state_dict().items()}


def test_the_linear_merge_is_both_adapters_active_with_their_weights(random_base, pair, tmp_path):
    merge(pair, out=tmp_path / "c", weights=[0.7, 0.3], reporter=Silent())
    both = PeftModel.from_pretrained(base_model(random_base), pair[0], adapter_name="a")
    both.load_adapter(pair[1], adapter_name="b")
    for name, parameter in both.named_parameters():
        if ".prefix_tuning_plus_memory." in name:
            parameter.data *= 0.7 if ".a." in name else 0.3
    both.base_model.set_adapter(["a", "b"])
    expected = logits(both.eval())
    assert (expected - logits(base_model(random_base))).abs().max() > 1e-2
    torch.testing.assert_close(of_folder(random_base, tmp_path / "c"), expected)


def test_what_is_written_is_a_plain_adapter_folder_and_a_record(random_base, pair, tmp_path):
    merged = merge(pair, out=tmp_path / "c", method="dare", seed=3, reporter=Silent())
    assert {file.name for file in (tmp_path / "c").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "merge.json",
    }
    record = json.loads((tmp_path / "c" / "merge.json").read_text())
    assert record == merged.record
    assert record["base"] == str(random_base)
    assert (record["method"], record["weights"]) == ("dare", [0.5, 0.5])
    assert (record["density"], record["seed"]) == (0.2, 3)
    for source, folder in zip(record["sources"], pair, strict=True):
        content = (Path(folder) / "adapter_model.safetensors").read_bytes()
        assert source["sha256"] == hashlib.sha256(content).hexdigest()
    assert merged.weights_bytes == (tmp_path / "c" / "adapter_model.safetensors").stat().st_size


@pytest.mark.parametrize(
    ("method", "weights"), [("linear", 0.5), ("dare", 0.5), ("task-arithmetic", 1.0), ("ties", 1.0)]
)
def test_without_weights_means_are_means_and_sums_are_sums(pair, tmp_path, method, weights):
    merged = merge(pair, out=tmp_path / "c", method=method, reporter=Silent())
    assert merged.record["weights"] == [weights, weights]


def test_ties_and_dare_are_pefts_on_m(pair, tmp_path):
    key = "base_model.model.model.layers.0.self_attn.prefix_tuning_plus_memory.M"
    both = [load_file(Path(folder) / "adapter_model.safetensors")[key] for folder in pair]

    def written(**options: object) -> torch.Tensor:
        merge(pair, out=tmp_path / "c", overwrite=True, reporter=Silent(), **options)
        return load_file(tmp_path / "c" / "adapter_model.safetensors")[key]

    ones = torch.ones(2)
    assert torch.equal(written(method="ties", density=0.4), merge_utils.ties(both, ones, 0.4))
    torch.manual_seed(5)
    assert torch.equal(
        written(method="dare", density=0.4, seed=5), merge_utils.dare_linear(both, ones / 2, 0.4)
    )


def test_the_same_seed_drops_the_same_and_leaves_the_callers_numbers_alone(pair, tmp_path):
    def written(out: str, seed: int) -> torch.Tensor:
        merge(pair, out=tmp_path / out, method="dare", seed=seed, reporter=Silent())
        found = load_file(tmp_path / out / "adapter_model.safetensors")
        return torch.cat([value.flatten() for value in found.values()])

    state = torch.get_rng_state()
    assert torch.equal(written("c", 0), written("d", 0))
    assert not torch.equal(written("e", 1), written("f", 2))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_run_and_an_adapter_folder_merge(random_base, pair, tmp_path):
    run = as_run(pair[0], tmp_path / "run", random_base)
    merge([run, pair[1]], out=tmp_path / "c", reporter=Silent())
    merge(pair, out=tmp_path / "d", reporter=Silent())
    assert torch.equal(
        of_folder(random_base, tmp_path / "c"), of_folder(random_base, tmp_path / "d")
    )


@pytest.mark.parametrize("method", ["linear", "task-arithmetic"])
def test_the_linear_merge_of_loras_is_the_sum_of_their_updates(random_base, tmp_path, method):
    """Different ranks, modules and scales: averaging A and B separately would be wrong."""
    first = save(random_base, tmp_path / "a", lora(lora_alpha=16, use_rslora=True), 1)
    second = save(random_base, tmp_path / "b", lora(r=2, target_modules=["v_proj", "up_proj"]), 2)
    merge(
        [first, second], out=tmp_path / "c", method=method, weights=[0.7, -0.3], reporter=Silent()
    )
    of_a, of_b = updates(random_base, first), updates(random_base, second)
    for key, update in updates(random_base, tmp_path / "c").items():
        torch.testing.assert_close(update, 0.7 * of_a[key] - 0.3 * of_b[key], rtol=1e-4, atol=1e-5)


def test_ties_of_loras_is_taken_of_their_updates(random_base, tmp_path):
    """If both adapters are the same, TIES at full density gives it back: the SVD keeps the rank of BA."""
    first = save(random_base, tmp_path / "a", lora(), 1)
    same = save(random_base, tmp_path / "b", lora(), 1)
    merge([first, same], out=tmp_path / "c", method="ties", density=1.0, reporter=Silent())
    expected = updates(random_base, first)
    for key, update in updates(random_base, tmp_path / "c").items():
        torch.testing.assert_close(update, expected[key], rtol=1e-3, atol=1e-4)


def test_dare_of_loras_keeps_to_the_base_s_smallest_width(random_base, tmp_path):
    wide = [save(random_base, tmp_path / name, lora(r=40), i) for i, name in enumerate("ab")]
    merge(wide, out=tmp_path / "c", method="dare", density=0.9, reporter=Silent())
    assert PeftConfig.from_pretrained(str(tmp_path / "c")).r == 32  # v_proj gives 32 numbers
    assert torch.isfinite(of_folder(random_base, tmp_path / "c")).all()


def test_the_base_s_weights_are_not_read(random_base, pair, tmp_path):
    """A base that has lost its weights still suffices."""
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    (hollow / "config.json").write_bytes((random_base / "config.json").read_bytes())
    (hollow / "model.safetensors").write_bytes(b"not weights")
    for folder in pair:
        settings = Path(folder) / "adapter_config.json"
        settings.write_text(settings.read_text().replace(str(random_base), str(hollow)))
    merge(pair, out=tmp_path / "c", reporter=Silent())
    assert (tmp_path / "c" / "adapter_model.safetensors").exists()


def as_run(trained: str, folder: Path, base: Path, **recipe: object) -> str:
    """The adapter in a run directory."""
    folder.mkdir()
    (folder / "recipe.yaml").write_text(
        yaml.safe_dump({"model": {"name": str(base)}, "data": {"train": "x.jsonl"}, **recipe})
    )
    _copy(Path(trained), folder / "adapter")
    return str(folder)


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())


def refused(error: type[PtpError], said: str, adapters: list[str], out: Path, **options) -> None:
    before = sorted(out.parent.rglob("*"))
    with pytest.raises(error, match=said):
        merge(adapters, out=out, reporter=Silent(), **options)
    assert sorted(out.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "each of the 2 adapters, got 1"),
        ({"weights": [1.0, float("nan")]}, "finite numbers, got 1.0, nan"),
        ({"method": "mean"}, "linear, task-arithmetic, ties, dare, got 'mean'"),
        ({"density": 0.5}, "--density belongs to --method ties and dare"),
        ({"method": "ties", "density": 0.0}, "above 0 and up to 1, got 0.0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused(pair, tmp_path, options, said):
    refused(UsageError, said, pair, tmp_path / "c", **options)


def test_one_adapter_is_no_merge(pair, tmp_path):
    refused(UsageError, "needs two adapters or more, got 1.*--into-base", pair[:1], tmp_path / "c")
    refused(AdapterError, "given twice", [pair[0], pair[0]], tmp_path / "c")


def test_a_folder_without_an_adapter_is_refused(pair, tmp_path):
    refused(AdapterError, "not a run directory", [*pair, str(tmp_path)], tmp_path / "c")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (pt_plus(), lora(), "differ in method: prefix-tuning-plus in the first, and lora"),
        (pt_plus(), pt_plus(feature_map="gelu"), "differ in feature_map: elu in the first"),
        (pt_plus(share_heads="kv"), pt_plus(), "differ in share_heads: kv in the first"),
        (pt_plus(), pt_plus(sites="ffn"), "differ in sites: attention in the first"),
        (pt_plus(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "one softmax"),
        (IA3Config(task_type="CAUSAL_LM"), lora(), "its method is ia3, and ptp merges"),
        (lora(), lora(use_dora=True), "with use_dora True it has more than A and B"),
        (pt_plus(modules_to_save=["lm_head"]), pt_plus(), "modules_to_save .'lm_head'"),
    ],
    ids=lambda value: getattr(value, "peft_type", value),
)
def test_adapters_that_do_not_fit_each_other_are_refused(
    random_base, tmp_path, first, second, said
):
    both = [save(random_base, tmp_path / "a", first), save(random_base, tmp_path / "b", second)]
    refused(AdapterError, said, both, tmp_path / "c")


def test_a_lora_whose_initialisation_changed_the_base_is_refused(random_base, tmp_path):
    both = [save(random_base, tmp_path / name, lora()) for name in "ab"]
    settings = tmp_path / "b" / "adapter_config.json"
    config = json.loads(settings.read_text())
    settings.write_text(json.dumps(config | {"init_lora_weights": "pissa"}))
    refused(AdapterError, "init_lora_weights 'pissa', has changed the", both, tmp_path / "c")


def test_a_disk_that_cannot_be_written_to_leaves_nothing(pair, tmp_path):
    (tmp_path / "file").write_text("")
    refused(ResourceError, "cannot be written", pair, tmp_path / "file" / "c")


def test_adapters_of_different_bases_are_refused(random_base, pair, tmp_path):
    other = tmp_path / "other"
    _copy(random_base, other)
    settings = Path(pair[1]) / "adapter_config.json"
    settings.write_text(settings.read_text().replace(str(random_base), str(other)))
    refused(AdapterError, f"differ in base: {random_base} in the first", pair, tmp_path / "c")


def test_shapes_that_do_not_fit_the_base_are_refused(random_base, pair, tmp_path):
    wide = base_model(random_base).config
    wide.num_key_value_heads = wide.num_attention_heads = 8
    model = get_peft_model(AutoModelForCausalLM.from_config(wide), pt_plus())
    model.peft_config["default"].base_model_name_or_path = str(random_base)
    model.save_pretrained(str(tmp_path / "w"))
    refused(
        AdapterError, "2 layers with 8 heads of width", [*pair, str(tmp_path / "w")], tmp_path / "c"
    )


def test_maps_that_differ_are_not_merged_by_ties(random_base, tmp_path):
    maps = pt_plus(feature_map="mlp")
    both = [save(random_base, tmp_path / name, maps, seed) for seed, name in enumerate("ab")]
    refused(AdapterError, "cannot be merged by ties: the rows", both, tmp_path / "c", method="ties")


def test_a_run_of_full_fine_tuning_is_refused(random_base, pair, tmp_path):
    run = as_run(pair[1], tmp_path / "full", random_base, adapter={"method": "full"})
    refused(AdapterError, "run of method full.*nothing to merge", [pair[0], run], tmp_path / "c")


def test_a_folder_that_is_taken_is_replaced_only_if_a_merge_wrote_it(pair, tmp_path):
    out = tmp_path / "c"
    merge(pair, out=out, reporter=Silent())
    refused(RunDirError, "not empty. Type --overwrite", pair, out)
    merge(pair, out=out, weights=[1, 0], overwrite=True, reporter=Silent())
    assert json.loads((out / "merge.json").read_text())["weights"] == [1, 0]
    (out / "merge.json").unlink()
    refused(RunDirError, "was not written by `ptp merge`", pair, out, overwrite=True)
    refused(RunDirError, "is one of the adapters", pair, Path(pair[0]), overwrite=True)
    refused(RunDirError, "is a file", pair, Path(pair[0]) / "adapter_config.json", overwrite=True)


@pytest.mark.parametrize("config", [lora(), IA3Config(task_type="CAUSAL_LM")], ids=type)
def test_a_folded_adapter_is_a_plain_model_with_the_same_logits(random_base, tmp_path, config):
    base = tmp_path / "base"
    base_model(random_base).save_pretrained(base)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(base)
    adapter = save(base, tmp_path / "a", config)
    merged = merge_into_base(adapter, out=tmp_path / "m", reporter=Silent())
    folded = base_model(tmp_path / "m")
    expected = of_folder(base, adapter)
    assert (expected - logits(base_model(base))).abs().max() > 1e-2
    torch.testing.assert_close(logits(folded), expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "m")
    assert tokenizer("hello")["input_ids"] == AutoTokenizer.from_pretrained(base)("hello").input_ids
    assert merged.record["method"] == "into-base"
    assert not (tmp_path / "m" / "adapter_config.json").exists()


@pytest.fixture(scope="module")
def untied(random_base, tmp_path_factory):
    """A base with separate weights for the embedding and the output layer."""
    folder = tmp_path_factory.mktemp("untied")
    config = AutoConfig.from_pretrained(random_base, tie_word_embeddings=False)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    return folder


AT_THE_ENDS = {
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved whole": {"modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj", "lm_head"], "trainable_token_indices": [5, 6]},
}


@pytest.mark.parametrize(
    ("where", "base", "copies"),
    [
        *((where, "random_base", True) for where in AT_THE_ENDS),
        ("both", "random_base", False),
        ("both", "untied", True),
    ],
)
def test_an_adapter_at_the_embedding_or_the_head_fits_is_sound_folds_and_comes_off(
    where, base, copies, tmp_path, request
):
    folder = tmp_path / "base"
    base_model(request.getfixturevalue(base)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(request.getfixturevalue(base)).save_pretrained(folder)
    adapter = save(folder, tmp_path / "a", lora(**AT_THE_ENDS[where]), copies=copies)
    section = ModelSection(name=str(folder), bits=32)
    check_fits(section, adapter)
    loaded = load_adapter(models.load_base(section), adapter).eval()
    expected = of_folder(folder, adapter)
    torch.testing.assert_close(logits(loaded), expected)
    models.detach(loaded)
    assert torch.equal(logits(loaded.get_base_model()), logits(base_model(folder)))
    found = read(point(adapter))
    assert not integrity(found, without_weights(section, found.config))
    if where == "tokens":  # trained in both, though the base has one weight for both
        with pytest.raises(AdapterError, match="two kinds of changes at lm_head"):
            merge_into_base(adapter, out=tmp_path / "m", reporter=Silent())
        return
    merge_into_base(adapter, out=tmp_path / "m", reporter=Silent())
    torch.testing.assert_close(logits(base_model(tmp_path / "m")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_loras_at_the_embedding_are_merged_whether_they_hold_copies_or_not(
    random_base, tmp_path, method
):
    options = AT_THE_ENDS["both"]
    sources = [
        save(random_base, tmp_path / str(seed), lora(**options), seed=seed, copies=bool(seed))
        for seed in (0, 1)
    ]
    merge(sources, out=tmp_path / "m", method=method, reporter=Silent())
    check_fits(ModelSection(name=str(random_base)), tmp_path / "m")
    if method == "linear":
        parts = [of_folder(random_base, source) for source in sources]
        assert (of_folder(random_base, tmp_path / "m") - parts[0]).abs().max() > 1e-2


@pytest.mark.parametrize("changed", ["value", "shape"])
def test_a_copy_of_another_base_s_embedding_is_refused(random_base, tmp_path, changed):
    adapter = save(random_base, tmp_path / "a", lora(**AT_THE_ENDS["embedding"]), copies=True)
    file = tmp_path / "a" / "adapter_model.safetensors"
    weights = load_file(file)
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    weights[key] = weights[key] + 1 if changed == "value" else weights[key][:-1].clone()
    save_file(weights, file)
    section = ModelSection(name=str(random_base), bits=32)
    with pytest.raises(
        AdapterError, match=r"holds a copy of model\.embed_tokens\.weight, which differs"
    ):
        load_adapter(models.load_base(section), adapter)
    if changed == "shape":
        with pytest.raises(AdapterError, match=r"does not fit.*2047, 64\) in the adapter"):
            check_fits(section, adapter)


def test_a_folded_model_keeps_the_base_s_dtype_and_the_run_s_template(random_base, tmp_path):
    adapter = save(random_base, tmp_path / "a", lora())
    run = as_run(adapter, tmp_path / "run", random_base, adapter={"method": "lora", "r": 4})
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    merge_into_base(run, out=tmp_path / "m", reporter=Silent())
    folded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert folded.dtype == torch.bfloat16
    template = AutoTokenizer.from_pretrained(tmp_path / "m").chat_template
    assert template == "{{ messages[0].content }}"
    adapted = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(random_base, dtype="auto"), adapter
    ).eval()
    near = (logits(folded).float() - logits(adapted).float()).abs().max()
    far = (logits(folded).float() - logits(base_model(random_base))).abs().max()
    assert near < far / 10


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (pt_plus(), "no weight matrix gives φ.q.ᵀM.*`ptp export`"),
        (
            PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
            "stand before the input",
        ),
        (lora(lora_bias=True), "peft says: .*base layer has no bias"),
    ],
    ids=lambda value: getattr(value, "peft_type", ""),
)
def test_what_cannot_be_folded_is_refused_with_the_reason(random_base, tmp_path, config, said):
    adapter = save(random_base, tmp_path / "a", config)
    with pytest.raises(AdapterError, match=said):
        merge_into_base(adapter, out=tmp_path / "m", reporter=Silent())
    assert not (tmp_path / "m").exists()


def test_a_quantized_base_is_no_place_to_fold_into(random_base, tmp_path):
    base = tmp_path / "base"
    _copy(random_base, base)
    adapter = save(base, tmp_path / "a", lora())
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="quantized weights cannot take up an adapter"):
        merge_into_base(adapter, out=tmp_path / "m", reporter=Silent())


def test_a_run_on_4_bits_is_folded_into_the_whole_weights_and_says_so(random_base, tmp_path):
    class Heard(Silent):
        said = ""

        def notice(self, text: str) -> None:
            self.said += text

    adapter = save(random_base, tmp_path / "a", lora())
    model = {"name": str(random_base), "bits": 4}
    run = as_run(adapter, tmp_path / "run", random_base, adapter={"method": "lora"}, model=model)
    merge_into_base(run, out=tmp_path / "m", reporter=(heard := Heard()))
    assert (
        "at 4 bits. The adapter is folded into the weights that these were made from" in heard.said
    )

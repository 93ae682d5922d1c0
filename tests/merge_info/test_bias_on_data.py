"""The analysis on data, against biases that are captured and counted in the simplest way."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefixtune_cli.adapter import Memory, MemoryLayer, PrefixTuningPlusConfig
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import AdapterError, DataError, UsageError
from prefixtune_cli.merge_info.bias import bucket, bucket_range
from prefixtune_cli.merge_info.bias_on_data import OnData, analyse
from prefixtune_cli.merge_info.saved_adapter import read
from prefixtune_cli.pointed import point
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import DataSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def section(random_base: Path) -> ModelSection:
    return ModelSection(name=str(random_base), bits=32, device="cpu")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    words = "the storm over the harbour had been loud all night and nobody slept well ".split()
    rows = [{"text": " ".join(words[i % 7 :] * (1 + i % 5))} for i in range(12)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def base_model(section: ModelSection) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(section.name, dtype=torch.float32).eval()


def save(section: ModelSection, folder: Path, config: PeftConfig, fill=None) -> Path:
    """An adapter whose memories `fill` writes; without it, they are random."""
    model = get_peft_model(base_model(section), config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        for name, module in model.named_modules():
            if isinstance(module, Memory) and fill is not None:
                fill(name, module)
    model.save_pretrained(str(folder))
    return folder


def pt_plus(**options: object) -> PeftConfig:
    return PrefixTuningPlusConfig(task_type="CAUSAL_LM", **options)


def run(
    adapters: list[Path], section: ModelSection, data: str, out: Path, rows: int = 99
) -> OnData:
    who = [read(point(adapter, section.model_dump())) for adapter in adapters]
    return analyse(who, data, rows=rows, out=out, reporter=Silent())


def sequences(section: ModelSection, data: str) -> list[list[int]]:
    reading = DataSection(train_on="all")
    return tokenize(load_rows(data, reading), load_tokenizer(section), reading).dataset[
        "input_ids"
    ][:]


def expected_spectrum(biases: np.ndarray) -> np.ndarray:
    """[tokens, heads, d] to the mean spectrum of the heads, by numpy's own covariance."""
    shares = []
    for head in range(biases.shape[1]):
        values = np.linalg.eigvalsh(np.cov(biases[:, head].T, bias=True))[::-1].clip(min=0)
        shares.append(values / values.sum())
    return np.mean(shares, axis=0)


@pytest.mark.parametrize("sites", ["attention", "attention+ffn"])
def test_spectrum_and_size_are_those_of_the_captured_biases(section, texts, tmp_path, sites):
    folder = save(section, tmp_path / "a", pt_plus(sites=sites))
    found = run([folder], section, texts, tmp_path / "out").to_json()["adapters"][0]
    model = PeftModel.from_pretrained(base_model(section), str(folder)).eval()
    queries, outputs = [], []
    layer = model.get_base_model().model.layers[1]
    attention: MemoryLayer = layer.self_attn
    memory = attention.prefix_tuning_plus_memory["default"]
    memory.register_forward_pre_hook(lambda read, args: queries.append(args[0]))
    attention.base_layer.o_proj.register_forward_pre_hook(
        lambda _, args: outputs.append(args[0][0])
    )
    for ids in sequences(section, texts):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    with torch.no_grad():
        reads = [memory(query)[0] for query in queries[:]]
    of_layer = [one for one in found["layers"] if one["layer"] == 1]
    assert [one["site"] for one in of_layer] == sites.split("+")
    biases = torch.cat(reads).double()
    np.testing.assert_allclose(
        of_layer[0]["eigenvalues"], expected_spectrum(biases.numpy()), atol=1e-9
    )
    plain = [o.double().view(r.shape) - r.double() for o, r in zip(outputs, reads, strict=True)]
    ratio = biases.norm() / torch.cat(plain).norm()
    assert of_layer[0]["ratio"] == pytest.approx(float(ratio), rel=1e-5)
    first = torch.cat([r[:16].double() for r in reads]).norm()
    first /= torch.cat([p[:16] for p in plain]).norm()
    assert of_layer[0]["by_position"][0] == {
        "from": 0,
        "to": 15,
        "ratio": pytest.approx(float(first), rel=1e-5),
    }


def test_the_ffn_s_bias_is_held_against_the_ffn_s_own_output(section, texts, tmp_path):
    folder = save(section, tmp_path / "a", pt_plus(sites="ffn"))
    found = run([folder], section, texts, tmp_path / "out").adapters[0]
    assert [(sums.layer, sums.site) for sums in found.layers] == [(0, "ffn"), (1, "ffn")]
    model = PeftModel.from_pretrained(base_model(section), str(folder)).eval()
    own, whole = [], []
    ffn = model.get_base_model().model.layers[0].mlp
    ffn.base_layer.register_forward_hook(lambda _, args, output: own.append(output[0]))
    ffn.register_forward_hook(lambda _, args, output: whole.append(output[0]))
    for ids in sequences(section, texts):
        with torch.no_grad():
            model(input_ids=torch.tensor([ids]))
    added = torch.cat(whole) - torch.cat(own)
    ratio = float(added.norm() / torch.cat(own).norm())
    assert found.layers[0].ratio() == pytest.approx(ratio, rel=1e-4)


def test_a_memory_of_one_direction_has_an_effective_rank_of_one(section, texts, tmp_path):
    """M = u vᵀ in layer 0: every bias is a multiple of v. In layer 1, M is zero: nothing varies."""

    def one_direction(name: str, memory: Memory) -> None:
        heads, features, width = memory.M.shape
        outer = torch.outer(torch.randn(features), torch.randn(width))
        memory.M.copy_(outer.expand(heads, -1, -1) if ".layers.0." in name else torch.zeros(()))

    folder = save(section, tmp_path / "a", pt_plus(), one_direction)
    found = run([folder], section, texts, tmp_path / "out")
    first, second = found.to_json()["adapters"][0]["layers"]
    assert first["effective_rank"] == pytest.approx(1, abs=1e-4)
    assert first["share_of_first"]["1"] == pytest.approx(1, abs=1e-6)
    assert (second["eigenvalues"], second["effective_rank"], second["ratio"]) == ([], 0, 0)
    title, columns, rows = found.tables[0]
    assert title == "Spectrum of the bias's covariance"
    assert columns == [
        "layer", "adapter", "effective rank", "first eigenvalue", "first 5", "first 10",
    ]  # fmt: skip
    assert rows[0] == ["0", "a", "1.0 of 16", "100.0 %", "100.0 %", "100.0 %"]
    assert rows[1] == ["1", "a", "does not vary", "", "", ""]


def test_a_prefix_s_bias_is_what_attention_gives_with_it_less_without_it(section, texts, tmp_path):
    """The input of the first layer does not depend on the adapter, so two runs of the model show its effect."""
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    folder = save(section, tmp_path / "p", config)
    found = run([folder], section, texts, tmp_path / "out").to_json()["adapters"][0]
    assert found["method"] == "prefix-tuning"
    outputs: list[torch.Tensor] = []
    base = base_model(section)
    base.model.layers[0].self_attn.o_proj.register_forward_pre_hook(
        lambda _, args: outputs.append(args[0][0].double())
    )
    rows = sequences(section, texts)
    with torch.no_grad():
        for ids in rows:
            base(input_ids=torch.tensor([ids]))
        plain = torch.cat(outputs)
        outputs.clear()
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()
        for ids in rows:
            adapted(input_ids=torch.tensor([ids]))
    biases = (torch.cat(outputs) - plain).view(len(plain), 4, 16)
    first = found["layers"][0]
    np.testing.assert_allclose(first["eigenvalues"], expected_spectrum(biases.numpy()), atol=1e-4)
    assert first["ratio"] == pytest.approx(float(biases.norm() / plain.norm()), rel=1e-3)


def test_a_memory_stays_where_a_long_input_drowns_a_prefix(section, tmp_path):
    """The paper's point, by construction: one prefix against more and more keys, and an M that answers every query."""
    file = tmp_path / "long.jsonl"
    words = " ".join("storm over the harbour tonight" for _ in range(60))
    file.write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    prefix = save(
        section, tmp_path / "p", PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=1)
    )
    memory = save(section, tmp_path / "m", pt_plus())
    both = run([prefix, memory], section, str(file), tmp_path / "out")
    of_prefix, of_memory = (
        [one["ratio"] for one in biases["layers"][0]["by_position"]]
        for biases in both.to_json()["adapters"]
    )
    assert of_prefix[2] < of_prefix[0] / 4
    assert of_memory[2] > of_memory[0] / 2
    assert [" ".join(row[:2]) for row in both.tables[0][2]] == ["0 p", "0 m", "1 p", "1 m"]
    assert [row[:2] for row in both.tables[1][2]] == [
        ["0", "p"],
        ["1", "p"],
        ["0", "m"],
        ["1", "m"],
    ]
    assert both.tables[1][1][:5] == ["layer", "adapter", "all", "0–15", "16–63"]


def test_both_pictures_are_drawn_and_the_rows_are_spread(section, texts, tmp_path):
    folder = save(section, tmp_path / "a", pt_plus())
    found = run([folder], section, texts, tmp_path / "out", rows=4)
    assert [path.name for path in found.written] == ["bias-spectrum.png", "bias-by-position.png"]
    assert all(path.read_bytes().startswith(PNG) for path in found.written)
    assert (found.data["rows"], found.data["analysed"]) == (12, 4)
    chosen = [len(sequences(section, texts)[i]) for i in (0, 4, 7, 11)]
    assert found.data["tokens"] == sum(chosen)


def test_a_run_is_taken_with_its_way_to_read_data(section, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "Who?", "reply": "You"}) + "\n", encoding="utf-8")
    folder = tmp_path / "run"
    save(section, folder / "adapter", pt_plus())
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {section.name}}}\n"
        "data: {train: x.jsonl, map: {prompt: question, completion: reply}}\n"
    )
    found = run([folder], section, str(file), tmp_path / "out")
    assert found.adapters[0].name == "run"
    assert found.data["tokens"] == found.data["longest"] > 2


def test_adapters_without_such_a_bias_are_left_out_or_refused(section, texts, tmp_path):
    lora = save(
        section, tmp_path / "lora", LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    )
    with pytest.raises(UsageError, match=r"no adapter given is of these methods \(lora\)"):
        run([lora], section, texts, tmp_path / "out")

    class Heard(Silent):
        def warning(self, text: str) -> None:
            said.append(text)

    said: list[str] = []
    adapters = [lora, save(section, tmp_path / "a", pt_plus())]
    who = [read(point(adapter, section.model_dump())) for adapter in adapters]
    found = analyse(who, texts, rows=2, out=tmp_path / "out", reporter=Heard())
    assert [biases.name for biases in found.adapters] == ["a"]
    assert said[0].startswith("lora is left out of the analysis on data")


def test_what_does_not_fit_is_refused_before_the_base_loads(section, texts, tmp_path):
    other = save(section, tmp_path / "a", pt_plus(layers=[1]))
    settings = other / "adapter_config.json"
    settings.write_text(settings.read_text().replace('"layers": [\n    1\n  ]', '"layers": [7]'))
    with pytest.raises(AdapterError, match=r"layers names \[7\]"):
        run([other], section, texts, tmp_path / "out")
    fitting = save(section, tmp_path / "b", pt_plus())
    with pytest.raises(DataError):
        run([fitting], section, str(tmp_path / "none.jsonl"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_transformers_attention_is_left_as_it_was(section, texts, tmp_path):
    from transformers import AttentionInterface

    before = AttentionInterface.get_interface
    run([save(section, tmp_path / "a", pt_plus())], section, texts, tmp_path / "out", rows=1)
    assert AttentionInterface.get_interface is before


def test_buckets_are_four_times_as_far_each():
    assert [bucket(position) for position in (0, 15, 16, 63, 64, 255, 256, 1023, 1024)] == [
        0, 0, 1, 1, 2, 2, 3, 3, 4,
    ]  # fmt: skip
    assert [bucket_range(number) for number in range(4)] == [
        (0, 15),
        (16, 63),
        (64, 255),
        (256, 1023),
    ]

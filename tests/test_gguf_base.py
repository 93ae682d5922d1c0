"""A base in one GGUF file: the same model as its original folder in every command, and clear refusals."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from prefixtune_cli import gguf_base
from prefixtune_cli import model as models
from prefixtune_cli.errors import ModelError
from prefixtune_cli.evaluate.subjects import assemble, hash_of_base
from prefixtune_cli.merge.into_base import merge_into_base
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.pointed import choose, point
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.gguf_header import GgufHeader, is_gguf, read_header
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Lora, ModelSection, PrefixTuningPlus
from prefixtune_cli.tokenizer import check_base, load_config, load_tokenizer

pytest.importorskip("gguf")
from tests.gguf_files import write_gguf, write_strange

IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


@pytest.fixture(scope="module")
def file(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(random_base, tmp_path_factory.mktemp("gguf") / "model.gguf")


def logits(model: object) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model.eval()(input_ids=IDS).logits)  # type: ignore[attr-defined]


def refusal(file: Path | str) -> str:
    with pytest.raises(ModelError) as caught:
        check_base(ModelSection(name=str(file)))
    return str(caught.value)


@pytest.mark.parametrize("bits", [32, 16, 8, 4])
def test_a_gguf_base_answers_as_the_folder_with_the_same_weights(
    bits: int, file: Path, random_base: Path
) -> None:
    model = models.load_base(ModelSection(name=str(file), bits=bits))
    assert torch.equal(
        logits(model), logits(models.load_base(ModelSection(name=str(random_base), bits=bits)))
    )
    assert model.dtype == (torch.float32 if bits == 32 else torch.bfloat16)


def test_half_precision_weights_come_through(random_base: Path, tmp_path: Path) -> None:
    """From a file in float16, as most files called F16 are."""
    half = write_gguf(random_base, tmp_path / "half.gguf", torch.float16)
    there = models.load_base(ModelSection(name=str(half), bits=32))
    here = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float16).float()
    assert torch.equal(logits(there), logits(here))


def test_the_loaded_base_is_a_plain_model_that_can_be_saved(file: Path, tmp_path: Path) -> None:
    model = models.load_base(ModelSection(name=str(file)))
    assert model.name_or_path == model.config.name_or_path == str(file)
    assert not getattr(model, "is_quantized", False)
    assert getattr(model, "hf_quantizer", None) is None
    assert getattr(model, "quantization_method", None) is None
    assert getattr(model.config, "quantization_config", None) is None
    model.save_pretrained(tmp_path)
    again = models.load_base(ModelSection(name=str(tmp_path)))
    assert torch.equal(logits(model), logits(again))


def test_the_tokenizer_and_its_chat_template_come_from_the_file(
    file: Path, random_base: Path
) -> None:
    tokenizer = load_tokenizer(ModelSection(name=str(file)))
    plain = AutoTokenizer.from_pretrained(random_base)
    assert tokenizer.chat_template == plain.chat_template
    text = plain.apply_chat_template([{"role": "user", "content": "Book 2 rooms!"}], tokenize=False)
    assert tokenizer(text).input_ids == plain(text).input_ids
    assert tokenizer.eos_token == plain.eos_token and tokenizer.pad_token == plain.pad_token
    assert tokenizer.name_or_path == str(file)


def test_a_file_without_an_ending_is_recognised_and_what_lies_beside_it_is_not_read(
    file: Path, tmp_path: Path
) -> None:
    """Ollama's files have no ending, and a download folder may hold another model's tokenizer."""
    blob = tmp_path / "sha256-5f4d"
    shutil.copy(file, blob)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert is_gguf(blob)
    section = ModelSection(name=str(blob))
    check_base(section)
    assert load_config(section).model_type == "llama"
    assert len(load_tokenizer(section)) == len(load_tokenizer(ModelSection(name=str(file))))
    models.load_base(section)


def test_an_adapter_names_the_file_in_full_and_is_found_on_it_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent.parent)
    short = str(file.relative_to(file.parent.parent))  # also a possible hub id
    base = models.load_base(ModelSection(name=short, bits=32))
    model = models.attach(base, PrefixTuningPlus())
    model.save_pretrained(tmp_path / "adapter")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["base_model_name_or_path"] == str(file)
    cast = assemble(choose(adapters=[str(tmp_path / "adapter")]))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert cast.base_sha256 == hash_of_base(ModelSection(name=str(file))) == digest


def test_a_lora_is_folded_into_a_plain_folder(file: Path, tmp_path: Path) -> None:
    model = models.attach(models.load_base(ModelSection(name=str(file), bits=32)), Lora())
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    model.save_pretrained(tmp_path / "lora")
    merge_into_base(point(tmp_path / "lora"), out=tmp_path / "merged", reporter=Silent())
    folded = models.load_base(ModelSection(name=str(tmp_path / "merged"), bits=32))
    torch.testing.assert_close(logits(folded), logits(model), atol=0.05, rtol=0.05)
    assert load_tokenizer(ModelSection(name=str(tmp_path / "merged"))).chat_template


def test_a_plan_needs_the_configuration_of_the_file_alone(file: Path) -> None:
    assert base_config(ModelSection(name=str(file))).num_hidden_layers == 2


def test_a_run_is_named_without_the_ending(file: Path) -> None:
    assert resolve(flags={"model": {"name": str(file)}}).run_name == "model-data-prefix-tuning-plus"


def test_the_configuration_is_read_anew_where_the_file_has_changed(
    random_base: Path, tmp_path: Path
) -> None:
    changing = write_gguf(random_base, tmp_path / "changing.gguf")
    first = gguf_base.load_config(changing)
    first.num_hidden_layers = 99  # a caller's change does not affect other callers
    assert gguf_base.load_config(changing).num_hidden_layers == 2
    write_gguf(random_base, changing, torch.float16, llama__rope__scaling__type="none")
    assert gguf_base.load_config(changing).num_hidden_layers == 2


@pytest.fixture(scope="module")
def llama_3(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with rotary frequencies scaled as Llama 3.1's are."""
    folder = tmp_path_factory.mktemp("llama-3")
    config = LlamaConfig.from_pretrained(random_base)
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(random_base).save_pretrained(folder)
    return folder


def factors_of(folder: Path) -> torch.Tensor:
    """llama.cpp's converter writes these as rope_freqs.weight."""
    rotary = LlamaForCausalLM.from_pretrained(folder).model.rotary_emb
    width = 2 * len(rotary.inv_freq)
    return (1 / 500000.0 ** (torch.arange(0, width, 2) / width)) / rotary.inv_freq


def test_the_scaled_frequencies_of_llama_3_come_through(llama_3: Path, tmp_path: Path) -> None:
    """transformers ignores the tensor with the scaling."""
    factors = factors_of(llama_3)
    assert factors.max() > 31
    file = write_gguf(llama_3, tmp_path / "llama-3.gguf", rope_freqs=factors)
    section = ModelSection(name=str(file), bits=32)
    check_base(section)
    there, here = models.load_base(section), LlamaForCausalLM.from_pretrained(llama_3)
    assert torch.equal(there.model.rotary_emb.inv_freq, here.model.rotary_emb.inv_freq)
    assert torch.equal(logits(there), logits(here))


def test_linear_and_yarn_scaling_come_through(random_base: Path, tmp_path: Path) -> None:
    about = {"llama__rope__scaling__factor": 4.0}
    linear = write_gguf(
        random_base, tmp_path / "linear.gguf", llama__rope__scaling__type="linear", **about
    )
    assert gguf_base.load_config(linear).rope_parameters["rope_type"] == "linear"
    assert gguf_base.load_config(linear).rope_parameters["factor"] == 4.0
    yarn = write_gguf(
        random_base,
        tmp_path / "yarn.gguf",
        llama__rope__scaling__type="yarn",
        llama__rope__scaling__original_context_length=1024,
        **about,
    )
    assert gguf_base.load_config(yarn).rope_parameters["original_max_position_embeddings"] == 1024


def test_gemma_3_has_its_scaling_where_it_attends_to_everything() -> None:
    config = Gemma3TextConfig(num_hidden_layers=2)
    about = {"general.architecture": "gemma3", "gemma3.rope.scaling.type": "linear"}
    header = GgufHeader(Path("g.gguf"), {**about, "gemma3.rope.scaling.factor": 8.0}, {})
    gguf_base._scale_frequencies(header, config)
    assert config.rope_parameters["full_attention"]["factor"] == 8.0
    assert config.rope_parameters["sliding_attention"]["rope_type"] == "default"


def test_frequencies_that_cannot_be_taken_over_are_refused(
    random_base: Path, llama_3: Path, tmp_path: Path
) -> None:
    longrope = write_gguf(
        random_base, tmp_path / "longrope.gguf", llama__rope__scaling__type="longrope"
    )
    assert "scales its rotary frequencies (longrope)" in refusal(longrope)
    strange = write_gguf(llama_3, tmp_path / "strange.gguf", rope_freqs=factors_of(llama_3).sqrt())
    assert "scales its rotary frequencies (rope_freqs.weight)" in refusal(strange)


def test_without_the_package_one_line_says_what_to_install(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.utils.is_gguf_available", lambda: False)
    said = refusal(file)
    assert "pip install 'prefixtune-cli[gguf]'" in said and "\n" not in said


def test_looking_at_data_says_which_of_a_folder_of_gguf_files_to_give(file: Path) -> None:
    with pytest.raises(ModelError, match=f"--model {file}"):
        load_tokenizer(ModelSection(name=str(file.parent)))


def test_an_architecture_that_transformers_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    said = refusal(write_strange(tmp_path / "model.gguf", "rwkv7"))
    assert "architecture 'rwkv7'" in said and "safetensors" in said


def test_a_part_of_a_model_is_refused_with_the_command_that_joins_them(tmp_path: Path) -> None:
    for name in ("model.gguf", "model-00002-of-00003.gguf"):
        said = refusal(write_strange(tmp_path / name, split__count=3))
        assert "one of 3 files" in said and "llama-gguf-split --merge" in said


def test_an_adapter_in_a_gguf_file_is_no_base(tmp_path: Path) -> None:
    assert "of type 'adapter'" in refusal(
        write_strange(tmp_path / "lora.gguf", general__type="adapter")
    )


@pytest.mark.parametrize("kept", [4, 20, 3000, -100_000])
def test_a_file_that_is_cut_off_is_refused(kept: int, file: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:kept])
    said = refusal(tmp_path / "cut.gguf")
    assert "ompare its size" in said


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "old.gguf").write_bytes(b"GGUF\x01\x00\x00\x00" + bytes(16))
    assert "version 1" in refusal(tmp_path / "old.gguf")


def test_a_header_is_read_past_arrays_of_every_kind(file: Path) -> None:
    """The chat template and the weights come after the vocabulary."""
    header = read_header(file)
    assert header.architecture == "llama" and header.parts == 1
    assert "tokenizer.chat_template" in header.metadata
    assert "tokenizer.ggml.tokens" not in header.metadata
    assert len(header.floats("output_norm.weight") or ()) == 64

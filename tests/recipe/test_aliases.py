"""`model.name`: tiny, an alias, a folder, or a hub id; anything else gets an error that lists these."""

from pathlib import Path

import pytest

from prefixtune_cli.errors import ModelError
from prefixtune_cli.recipe.aliases import (
    HUB_ID,
    MODELS,
    check_local_model,
    packaged_model,
    resolve,
)


def test_an_alias_is_its_hub_id_in_either_case() -> None:
    assert resolve("llama2-7b-chat") == "meta-llama/Llama-2-7b-chat-hf"
    assert resolve("Qwen2.5-3B-Instruct") == "Qwen/Qwen2.5-3B-Instruct"


def test_aliases_are_told_apart_and_name_hub_ids() -> None:
    assert len({model.alias for model in MODELS}) == len(MODELS)
    assert len({model.hub_id for model in MODELS}) == len(MODELS)
    assert all(HUB_ID.fullmatch(model.hub_id) for model in MODELS)
    assert all(model.alias == model.alias.lower() for model in MODELS)


def test_tiny_is_the_packaged_model() -> None:
    assert resolve("tiny") == str(packaged_model())


def test_a_hub_id_and_a_folder_are_themselves(tmp_path: Path) -> None:
    assert resolve("someone/Some-Model_1.5") == "someone/Some-Model_1.5"
    assert resolve(str(tmp_path)) == str(tmp_path)


def test_an_alias_goes_before_a_folder_of_the_same_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3-0.6b").mkdir()
    assert resolve("qwen3-0.6b") == "Qwen/Qwen3-0.6B"
    assert resolve("./qwen3-0.6b") == "qwen3-0.6b"


def test_an_unknown_name_is_told_the_nearest_aliases_and_the_forms() -> None:
    with pytest.raises(ModelError) as caught:
        resolve("lama3.1-8b")
    assert "not a hub id of the form organisation/name" in str(caught.value)
    assert "Did you mean llama3.1-8b" in str(caught.value)


@pytest.mark.parametrize("name", ["./missing/model", "/missing/model", "a/b/c", "what is this", ""])
def test_what_is_no_form_of_a_model_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="There is no model"):
        resolve(name)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "is not a model: it has no config.json"),
        ({"config.json": "{}"}, "has a config.json but no weights"),
        ({"config.json": "{"}, "is not JSON"),
        ({"a model.gguf": ""}, "holds GGUF files; give the file itself: --model '"),
        ({"config.json": "{}", "q4.gguf": "", "q8.gguf": ""}, "give one of them: --model "),
        (
            {"adapter_config.json": '{"base_model_name_or_path": "org/base"}'},
            "is an adapter, not a base model. Its base is org/base.",
        ),
        ({"adapter_config.json": "{"}, "Its base is named in its adapter_config.json."),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(
    files: dict[str, str], message: str, tmp_path: Path
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ModelError) as caught:
        check_local_model(tmp_path)
    assert message in str(caught.value)


def test_a_gguf_file_is_a_model_by_its_first_bytes(tmp_path: Path) -> None:
    (tmp_path / "sha256-00ff").write_bytes(b"GGUF\x03")
    check_local_model(tmp_path / "sha256-00ff")
    (tmp_path / "named.gguf").write_bytes(b"<html>")
    with pytest.raises(ModelError, match="is a file, but not a GGUF file"):
        check_local_model(tmp_path / "named.gguf")


@pytest.mark.parametrize("name", ["models/missing.gguf", "missing.gguf", "org/name/missing.gguf"])
def test_a_missing_gguf_file_is_not_taken_for_a_hub_id(name: str) -> None:
    with pytest.raises(ModelError, match=r"There is no file .*hf download"):
        resolve(name)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        check_local_model(tmp_path / "model.safetensors")


@pytest.mark.parametrize("weights", ["model-00001-of-00002.safetensors", "pytorch_model.bin"])
def test_a_folder_with_config_and_weights_is_a_model(weights: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / weights).write_text("")
    check_local_model(tmp_path)

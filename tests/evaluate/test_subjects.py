"""The evaluated models: the base with the adapter switched off, and one adapter after another on it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune_cli import model as models
from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.errors import AdapterError, RunDirError, UsageError
from prefixtune_cli.evaluate.outcome import BASE
from prefixtune_cli.evaluate.subjects import Cast, Subject, assemble
from prefixtune_cli.pointed import choose
from prefixtune_cli.recipe.load import dump, resolve
from prefixtune_cli.recipe.schema import Lora, ModelSection, PrefixTuning, PrefixTuningPlus
from prefixtune_cli.run_dir import RunDir

SECTIONS = {"plus": PrefixTuningPlus(), "lora": Lora(), "prefix": PrefixTuning()}
IDS = torch.tensor([[5, 6, 7, 8, 9, 10]])


def save_adapter(random_base: Path, section: Any, folder: Path, seed: int = 0) -> Path:
    """An adapter that changes the base's output."""
    model = models.attach(models.load_base(ModelSection(name=str(random_base), bits=32)), section)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    return {
        name: save_adapter(random_base, section, folder / name)
        for name, section in SECTIONS.items()
    }


def cast_of(random_base: Path, *adapters: Path, **how: Any) -> Cast:
    typed, base = how.get("typed", {"bits": 32}), how.get("base", True)
    found = choose(model=str(random_base), adapters=list(map(str, adapters)), typed=typed)
    return assemble(found, base=base)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=IDS).logits)


def alone(random_base: Path, adapter: Path | None) -> torch.Tensor:
    base = models.load_base(ModelSection(name=str(random_base), bits=32)).eval()
    return logits(base if adapter is None else load_adapter(base, adapter).eval())


def test_every_subject_answers_as_if_it_were_alone_whatever_came_before(
    random_base: Path, adapters: dict[str, Path]
) -> None:
    cast = cast_of(random_base, *adapters.values())
    assert [subject.name for subject in cast.subjects] == [BASE, *SECTIONS]
    expected = {s.name: alone(random_base, s.adapter) for s in cast.subjects}
    assert len({tuple(e.flatten().tolist()) for e in expected.values()}) == 4
    turns = [*cast.subjects, *reversed(cast.subjects), cast.subjects[2], cast.subjects[0]]
    with cast.loaded():
        for subject in turns:
            with cast.on_stage(subject) as model:
                assert torch.equal(logits(model), expected[subject.name]), subject.name


def test_a_single_adapter_is_attached_once_and_switched_off_for_the_base(
    random_base: Path, adapters: dict[str, Path]
) -> None:
    cast = cast_of(random_base, adapters["plus"])
    with cast.loaded() as base:
        assert [subject.name for subject in cast.subjects] == [BASE, "adapter"]
        with cast.on_stage(cast.subjects[1]) as first:
            pass
        with cast.on_stage(cast.subjects[0]) as model:
            assert model is base
            assert any("prefix_tuning_plus" in name for name, _ in base.named_parameters())
            assert torch.equal(logits(model), alone(random_base, None))
        with cast.on_stage(cast.subjects[1]) as again:
            assert again is first


def test_a_whole_model_stands_in_for_the_adapter_of_a_full_run(
    random_base: Path, tmp_path: Path
) -> None:
    run = RunDir(tmp_path / "full")
    flags = {"model": {"name": str(random_base), "bits": 32}, "adapter": {"method": "full"}}
    run.path.mkdir()
    run.recipe.write_text(dump(resolve(flags=flags)), encoding="utf-8")
    trained = models.load_base(ModelSection(name=str(random_base), bits=32))
    with torch.no_grad():
        trained.get_input_embeddings().weight[5] += 1
    trained.save_pretrained(run.adapter)
    cast = assemble(choose(runs=[str(run.path)]))
    with cast.loaded():
        with cast.on_stage(cast.subjects[0]) as model:
            assert torch.equal(logits(model), alone(random_base, None))
        with cast.on_stage(cast.subjects[1]) as model:
            assert torch.equal(logits(model), logits(trained))


def test_the_key_changes_with_the_adapters_content_the_base_and_its_precision(
    random_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    def key(adapter: Path, base: Path = random_base, **how: Any) -> str:
        cast = cast_of(base, adapter, **how)
        return json.dumps(cast.key(cast.subjects[-1]), sort_keys=True)

    first = key(adapters["plus"])
    copied = Path(shutil.copytree(adapters["plus"], tmp_path / "copy"))
    assert key(copied) == first
    assert key(copied, typed={"bits": 16}) != first
    assert key(save_adapter(random_base, SECTIONS["plus"], copied, seed=1)) != first
    other = Path(shutil.copytree(random_base, tmp_path / "base"))
    assert key(adapters["plus"], other) == first
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert key(adapters["plus"], other) != first


def test_a_template_belongs_to_the_key_of_the_base(random_base: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(random_base, tmp_path / "base"))
    before = cast_of(other).base_sha256
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert cast_of(other).base_sha256 != before


@pytest.mark.parametrize("name", SECTIONS)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_loads(
    name: str, adapters: dict[str, Path]
) -> None:
    with pytest.raises(AdapterError, match=r"does not fit the base.*Its base was"):
        assemble(choose(model="tiny", adapters=[str(adapters[name])], typed={"bits": 32}))


@pytest.mark.parametrize("name", SECTIONS)
def test_an_adapter_of_a_deeper_base_is_refused(
    name: str, random_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The shallow base would find weights for all its layers, and the others would be dropped silently."""
    shallow = Path(shutil.copytree(random_base, tmp_path / "base"))
    config = json.loads((shallow / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config.pop("layer_types", None)
    (shallow / "config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="does not fit the base"):
        cast_of(shallow, adapters[name])


def test_names_tell_adapters_apart(
    random_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    same = Path(shutil.copytree(adapters["plus"], tmp_path / "plus"))
    found = [s.name for s in cast_of(random_base, adapters["plus"], same).subjects]
    assert found == [BASE, str(adapters["plus"]), str(same)]
    with pytest.raises(UsageError, match="given twice"):
        cast_of(random_base, same, same)


def test_without_a_base_only_adapters_take_part(
    random_base: Path, adapters: dict[str, Path]
) -> None:
    cast = cast_of(random_base, adapters["lora"], base=False)
    assert [subject.name for subject in cast.subjects] == ["adapter"]
    with pytest.raises(UsageError, match="leaves nothing"):
        cast_of(random_base, base=False)


def test_runs_of_different_bases_are_not_compared(
    random_base: Path, adapters: dict[str, Path], tmp_path: Path
) -> None:
    runs = []
    for name, bits in (("a", 32), ("b", 16)):
        run = RunDir(tmp_path / name)
        shutil.copytree(adapters["plus"], run.adapter)
        flags = {"model": {"name": str(random_base), "bits": bits}}
        run.recipe.write_text(dump(resolve(flags=flags)), encoding="utf-8")
        runs.append(str(run.path))
    with pytest.raises(UsageError, match=r"different bases.*a: .* at 32 bits.*b: .* at 16 bits"):
        assemble(choose(runs=runs))
    cast = assemble(choose(runs=runs, typed={"bits": 32}))
    assert [subject.name for subject in cast.subjects] == [BASE, "a", "b"]


def test_a_run_without_an_adapter_is_refused(random_base: Path, tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with pytest.raises(AdapterError, match="not a run directory"):
        assemble(choose(runs=[str(tmp_path)]))
    flags = {"model": {"name": str(random_base)}}
    run.recipe.write_text(dump(resolve(flags=flags)), encoding="utf-8")
    with pytest.raises(RunDirError, match="--resume"):
        assemble(choose(runs=[str(tmp_path)]))


def test_subjects_are_written_down_with_their_hash() -> None:
    assert Subject("adapter", Path("x"), sha256="ab").to_json() == {
        "name": "adapter",
        "folder": "x",
        "sha256": "ab",
    }

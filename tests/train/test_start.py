"""`--from`: a run goes on at the very weights of a trained adapter, or says why it cannot before the base loads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.errors import PtpError, RunDirError
from prefixtune_cli.evaluate.held_out import score
from prefixtune_cli.pointed import settings_of_start
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train import Summary, train
from prefixtune_cli.train.prepare import prepare_data
from prefixtune_cli.train.trainer import SafeTrainer
from tests.heard import Heard
from tests.ports import free_port
from tests.train.test_run import recipe
from tests.train.two_ranks import in_two_processes

Weights = dict[str, torch.Tensor]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LORA = {"method": "lora", "r": 4, "alpha": 8}


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def starts(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """A finished run of each method; that of Prefix-Tuning+ has a chat template of its own."""
    folder = tmp_path_factory.mktemp("starts")
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    steps = {"max_steps": 6, "learning_rate": 0.05, "save_steps": 3}
    for name, adapter, data in (
        ("prefix-tuning-plus", {"layers": [1]}, {"chat_template": str(template)}),
        ("lora", LORA, {}),
        ("prefix-tuning", {"method": "prefix-tuning", "init": "rows", "num_virtual_tokens": 4}, {}),
    ):
        train(recipe(random_base, colours, folder / name, adapter=adapter, train=steps, data=data))
    return {path.name: path for path in folder.iterdir() if path.is_dir()}


def from_start(start: Path, data: Path, out: Path, *sets: str, **train: Any) -> Recipe:
    """A recipe as it is typed: of model and adapter, nothing."""
    settings = {
        "data": {"train": str(data), "eval_split": 0.125, "max_length": 64},
        "train": {
            "start_from": str(start), "max_steps": 8, "batch_size": 8, "log_steps": 1, "save_steps": 4, **train,
        },
        "evaluate": {"max_new_tokens": 8},
        "out": str(out),
    }  # fmt: skip
    return resolve(None, sets, settings, of_start=settings_of_start)


@pytest.fixture
def first_weights(monkeypatch: pytest.MonkeyPatch) -> list[Weights]:
    """The adapter's weights when the first step begins."""
    plain, seen = SafeTrainer.training_step, list[Weights]()

    def step(self: SafeTrainer, *args: Any, **kwargs: Any) -> Any:
        if not seen:
            found = get_peft_model_state_dict(self.model, save_embedding_layers=False)
            seen.append({name: value.detach().clone() for name, value in found.items()})
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(SafeTrainer, "training_step", step)
    return seen


@pytest.mark.parametrize(
    ("method", "sets"),
    [
        ("prefix-tuning-plus", ["adapter.basis=false"]),
        ("lora", ["adapter.dropout=0.1"]),
        ("lora", ["model.bits=4"]),  # for which TRL rounds the adapter to bfloat16
        ("prefix-tuning", []),
    ],
    ids=str,
)
def test_the_first_step_begins_at_the_starts_weights(
    method: str,
    sets: list[str],
    starts: dict[str, Path],
    colours: Path,
    tmp_path: Path,
    first_weights: list[Weights],
) -> None:
    heard = Heard()
    chosen = from_start(starts[method], colours, tmp_path / "run", *sets, max_steps=1)
    summary = train(chosen, reporter=heard)
    expected = weights_of(starts[method] / "adapter")
    (found,) = first_weights
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name
    assert summary.start == str(starts[method])
    assert f"Going on from the adapter in {starts[method] / 'adapter'}." in heard.notices
    of_other_bits = [text for text in heard.warnings if "with 32 bits, and goes on with 4" in text]
    assert len(of_other_bits) == ("model.bits=4" in sets)
    assert {"held-out loss of the start", "answers of the start"} <= {*heard.tasks}


def test_the_adapter_is_compared_with_its_start(
    starts: dict[str, Path], random_base: Path, colours: Path, tmp_path: Path
) -> None:
    chosen = from_start(starts["lora"], colours, tmp_path / "run", learning_rate=1e-9)
    summary = train(chosen, reporter=(heard := Heard()))
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    model = load_adapter(base, starts["lora"] / "adapter").eval()
    tokenizer = load_tokenizer(chosen.model, starts["lora"] / "adapter")
    data = prepare_data(chosen, tokenizer, Heard())
    found, _ = score(
        model, tokenizer, data.answers, data.questions.asked, chosen.evaluate, end_id=data.end_id, name="x"
    )  # fmt: skip
    assert summary.of_start is not None
    assert summary.of_start.loss == pytest.approx(found.loss, rel=1e-5)
    assert summary.of_start.exact_match == found.exact_match
    assert abs(summary.base.loss - found.loss) > 0.1, "else the base would do as well"
    assert (summary.compared_with, summary.verdict) == ("start", "no better")
    assert any("no better than its start" in text for text in heard.warnings)
    assert Summary.read(RunDir(chosen.folder)) == summary


def test_in_the_basis_the_first_loss_is_the_starts_and_the_template_too(
    starts: dict[str, Path],
    colours: Path,
    tmp_path: Path,
    first_weights: list[Weights],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start = starts["prefix-tuning-plus"]
    losses, plain_step, texts = {}, SafeTrainer.training_step, []

    def step(self: SafeTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        texts.append(self.processing_class.decode(inputs["input_ids"][0]))
        return plain_step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(SafeTrainer, "training_step", step)
    for name in ("basis", "plain"):
        chosen = from_start(
            start, colours, tmp_path / name, f"adapter.basis={name == 'basis'}", max_steps=1
        )
        assert chosen.adapter.layers == [1]  # type: ignore[union-attr]
        train(chosen)
        losses[name] = RunDir(tmp_path / name).read_metrics()[0]["loss"]
        assert (tmp_path / name / "adapter" / "chat_template.jinja").read_text() == TEMPLATE
    assert losses["basis"] == pytest.approx(losses["plain"], rel=1e-5)
    assert all(text.startswith("<user>Say the colour") for text in texts)
    expected = weights_of(start / "adapter")
    for name, value in first_weights[0].items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-5)


def cut(whole: RunDir, out: Path, checkpoints: int) -> RunDir:
    """A copy of a finished run as a kill has left it, with its first checkpoints alone."""
    shutil.copytree(whole.path, out)
    run_dir = RunDir(out)
    for saved in run_dir.checkpoints()[checkpoints:]:
        shutil.rmtree(saved)
    shutil.rmtree(run_dir.adapter)
    run_dir.summary.unlink()
    return run_dir


@pytest.mark.parametrize("checkpoints", [0, 1])
def test_a_killed_run_ends_with_the_same_bytes_and_not_from_another_start(
    checkpoints: int, starts: dict[str, Path], colours: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    shutil.copytree(starts["prefix-tuning-plus"], start)
    whole = RunDir(tmp_path / "whole")
    chosen = from_start(start, colours, whole.path)
    train(chosen)
    about = json.loads(whole.environment.read_text())["start"]
    assert about["folder"] == str(start / "adapter")
    killed = cut(whole, tmp_path / "killed", checkpoints)
    resumed = chosen.model_copy(update={"out": str(killed.path)})
    heard = Heard()
    train(resumed, resume=True, reporter=heard)
    where = "checkpoint-4" if checkpoints else "the start"
    assert any(f"Resuming {killed.path} from {where}" in text for text in heard.notices)
    files = [run.adapter / "adapter_model.safetensors" for run in (whole, killed)]
    assert files[0].read_bytes() == files[1].read_bytes()

    changed = weights_of(start / "adapter")
    for value in changed.values():
        value.mul_(1.001)
    save_file(changed, start / "adapter" / "adapter_model.safetensors", {"format": "pt"})
    again = cut(whole, tmp_path / "again", checkpoints)
    with pytest.raises(RunDirError, match=rf"has changed since \(sha256 {about['sha256'][:8]}…"):
        train(chosen.model_copy(update={"out": str(again.path)}), resume=True)


def test_two_processes_go_on_as_one_also_if_the_base_is_sharded(
    starts: dict[str, Path], colours: Path, tmp_path: Path
) -> None:
    start, jobs = starts["prefix-tuning-plus"], []
    train(from_start(start, colours, tmp_path / "one"))
    for name in ("ddp", "fsdp"):
        chosen = from_start(start, colours, tmp_path / name, batch_size=4, parallel=name)
        seen = str(tmp_path / f"seen-{name}")
        jobs.append({"recipe": chosen.model_dump(), "port": free_port(), "seen": seen})
    in_two_processes(jobs, tmp_path / "jobs.json")
    begun, one = weights_of(start / "adapter"), weights_of(tmp_path / "one" / "adapter")
    for name in ("ddp", "fsdp"):
        two = weights_of(tmp_path / name / "adapter")
        for key, value in one.items():
            moved = (value - begun[key]).abs().max()
            assert (two[key] - value).abs().max() < 0.02 * moved, (name, key)


def test_an_unfinished_run_gives_its_newest_checkpoint_and_the_recipe_names_it(
    starts: dict[str, Path], colours: Path, tmp_path: Path, first_weights: list[Weights]
) -> None:
    killed = cut(RunDir(starts["lora"]), tmp_path / "killed", 1)
    heard, out = Heard(), RunDir(tmp_path / "run")
    train(from_start(killed.path, colours, out.path, max_steps=1), reporter=heard)
    saved = killed.checkpoint(3)
    assert resolve(str(out.recipe)).train.start_from == str(saved)
    assert any("its checkpoint of step 3 is used" in text for text in heard.notices)
    (found,) = first_weights
    assert all(torch.equal(found[name], value) for name, value in weights_of(saved).items())


def test_a_bare_folder_gives_its_base_and_its_settings(
    starts: dict[str, Path], random_base: Path, colours: Path, tmp_path: Path
) -> None:
    for name in ("lora", "prefix-tuning-plus"):
        bare = tmp_path / name
        shutil.copytree(starts[name] / "adapter", bare)
        chosen = from_start(bare, colours, tmp_path / f"from-{name}", "model.bits=32", max_steps=1)
        assert chosen.model.name == str(random_base)
        theirs = resolve(str(RunDir(starts[name]).recipe)).adapter.model_dump()
        ours = chosen.adapter.model_dump()
        apart = {key for key in theirs if theirs[key] != ours[key]}
        # peft saves the names that `all-linear` stands for.
        assert apart == ({"target_modules"} if name == "lora" else set())
        assert isinstance(train(chosen), Summary)


@pytest.fixture(scope="module")
def other_base(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of the same shape with other weights."""
    folder = tmp_path_factory.mktemp("other") / "base"
    shutil.copytree(random_base, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("method", "sets", "said"),
    [
        ("lora", ["adapter.method=ia3"], "is of method lora, so training cannot go on from it with method ia3"),
        ("lora", ["adapter.method=full"], "does not go with method full"),
        ("lora", ["adapter.r=8"], "adapter.r: 4 there, 8 here\nType its own: --set adapter.r=4"),
        ("lora", ["adapter.config={use_dora: true}"], "--set adapter.config.use_dora=false"),
        ("prefix-tuning-plus", ["adapter.layers=all"], '"all" here\nType its own: --set \'adapter.layers=[1]\''),
        ("prefix-tuning", ["adapter.num_virtual_tokens=8"], "adapter.num_virtual_tokens: 4 there, 8 here"),
        ("lora", ["model.name=OTHER"], "so training cannot go on from it on"),
        ("lora", ["model.name=tiny"], "does not fit|belongs to the base"),
        ("lora", ["out=START"], "written over the adapter that it goes on from"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_base_loads(
    method: str,
    sets: list[str],
    said: str,
    starts: dict[str, Path],
    other_base: Path,
    colours: Path,
    tmp_path: Path,
) -> None:
    start, heard = starts[method], Heard()
    typed = [
        text.replace("OTHER", str(other_base)).replace("START", str(start / "new")) for text in sets
    ]
    out = tmp_path / "run" if "out=" not in sets[0] else start
    with pytest.raises(PtpError) as caught:
        train(
            from_start(start, colours, out, *typed).model_copy(update={"out": str(out)}),
            overwrite=True,
            reporter=heard,
        )
    assert any(part in str(caught.value) for part in said.split("|")), caught.value
    assert not any(text.startswith("Loading ") for text in heard.notices)
    assert (start / "adapter").is_dir()


def test_a_run_of_method_full_has_no_adapter_to_go_on_from(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    run_dir = RunDir(tmp_path / "full")
    run_dir.create(overwrite=False)
    run_dir.recipe.write_text(f"model: {{name: {random_base}}}\nadapter: {{method: full}}\n")
    shutil.copytree(random_base, run_dir.adapter)
    with pytest.raises(PtpError, match=f"type: --model {run_dir.adapter}"):
        from_start(run_dir.path, colours, tmp_path / "run")


def test_a_base_that_is_not_there_is_replaced_by_the_named_one_with_a_warning(
    starts: dict[str, Path], random_base: Path, colours: Path, tmp_path: Path
) -> None:
    bare, heard = tmp_path / "bare", Heard()
    shutil.copytree(starts["lora"] / "adapter", bare)
    config = json.loads((bare / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (bare / "adapter_config.json").write_text(json.dumps(config))
    chosen = from_start(
        bare, colours, tmp_path / "run", f"model.name={random_base}", "model.bits=32", max_steps=1
    )
    train(chosen, reporter=heard)
    assert any("whether" in text and "is not checked" in text for text in heard.warnings)

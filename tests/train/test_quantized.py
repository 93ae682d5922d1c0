"""Training on 4-bit and 8-bit bases on a CPU: which dtypes compute, what is kept, and how well it learns.

The tests replace nothing: hooks that torch calls for every module of a whole run record the dtypes.
"""

import io
import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from prefixtune_cli.answer_file import COLUMN, AnswerFile
from prefixtune_cli.data.lines import Row
from prefixtune_cli.errors import ModelError
from prefixtune_cli.evaluate.matching import exactly_matches
from prefixtune_cli.evaluate.paired import mean_difference
from prefixtune_cli.generate import answer_file, conversation, load_speaker
from prefixtune_cli.model import load_base
from prefixtune_cli.pointed import point
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.sampling import Sampling
from prefixtune_cli.train import train
from tests.cli.conftest import Ptp, ptp  # noqa: F401

pytest.importorskip("bitsandbytes")

NARROW, WIDE = torch.bfloat16, torch.float32


@pytest.fixture(params=[4, 8])
def bits(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def held_out(colours: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight rows of the task, as questions to ask again."""
    file = tmp_path_factory.mktemp("held-out") / "held-out.jsonl"
    file.write_text("".join(colours.read_text().splitlines(keepends=True)[:8]))
    return file


def recipe(base: Path | str, out: Path, **changes: dict[str, Any]) -> Recipe:
    settings: dict[str, Any] = {
        "model": {"name": str(base), "device": "cpu"},
        "data": {"max_length": 64},
        "train": {"max_steps": 6, "batch_size": 8, "log_steps": 3, "save_steps": 6},
        "evaluate": {"max_new_tokens": 8},
        "out": str(out),
    }
    for section, values in changes.items():
        settings[section] = {**settings.get(section, {}), **values}
    return Recipe.model_validate(settings)


class Seen:
    """The dtypes of a run's computations by module class, and the weights at its first call."""

    def __init__(self) -> None:
        self.calls: dict[str, int] = defaultdict(int)
        self.inputs: dict[str, set[torch.dtype]] = defaultdict(set)
        self.outputs: dict[str, set[torch.dtype]] = defaultdict(set)
        self.weights: dict[str, set[torch.dtype]] = defaultdict(set)
        self.gradients: list[torch.Tensor] = []
        self.frozen: dict[int, tuple[torch.nn.Parameter, torch.Tensor]] = {}
        self._watched: set[int] = set()

    def __call__(self, module: torch.nn.Module, args: Any, output: Any) -> None:
        name = type(module).__name__
        if module.training:
            self.calls[name] += 1
        for part, where in ((args, self.inputs), (output, self.outputs)):
            for tensor in part if isinstance(part, tuple) else (part,):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    where[name].add(tensor.dtype)
        for parameter in module.parameters(recurse=False):
            self.weights[name].add(parameter.dtype)
            if id(parameter) in self._watched:
                continue
            self._watched.add(id(parameter))
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._keep_gradient)
            else:
                self.frozen[id(parameter)] = (parameter, parameter.detach().clone())

    def _keep_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        self.gradients.append(parameter.grad.clone())


@contextmanager
def watched() -> Iterator[Seen]:
    seen = Seen()
    handle = register_module_forward_hook(seen)
    try:
        yield seen
    finally:
        handle.remove()


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(RunDir(run).adapter / "adapter_model.safetensors")


def test_a_run_computes_in_bfloat16_with_m_and_its_gradients_in_float32(
    random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    """Before, during and after training, including evaluations; and no byte of a frozen weight changes."""
    chosen = recipe(
        random_base,
        tmp_path / "run",
        model={"bits": bits},
        data={"train": str(colours), "eval_split": 0.125},
        train={"eval_steps": 3},
    )
    with watched() as seen:
        summary = train(chosen)
    linear = {4: "Linear4bit", 8: "Linear8bitLt"}[bits]
    assert seen.calls[linear] >= 6 * 2 * 7
    for name in (linear, "LlamaRMSNorm", "LlamaMLP", "Memory", "MemoryLayer", "Linear"):
        assert seen.outputs[name] == {NARROW}, name
    for name in (linear, "LlamaRMSNorm", "LlamaMLP", "Memory", "Linear"):
        assert seen.inputs[name] == {NARROW}, name
    assert seen.weights["LlamaRMSNorm"] == seen.weights["Embedding"] == {NARROW}
    assert seen.weights["Linear"] == {NARROW}  # the output layer
    assert seen.weights[linear] == {torch.uint8 if bits == 4 else torch.int8}
    assert seen.weights["Memory"] == {WIDE}
    assert len(seen.gradients) >= 6 * 2
    for gradient in seen.gradients:
        assert gradient.dtype == WIDE
        assert torch.isfinite(gradient).all()
        assert gradient.norm() > 0
    assert {weight.dtype for weight in adapter_of(tmp_path / "run").values()} == {WIDE}
    assert len(seen.frozen) == 2 * 7 + 2 * 2 + 2
    for parameter, before in seen.frozen.values():
        assert torch.equal(parameter, before)
    assert summary.adapter.loss < summary.base.loss


def test_an_evaluation_between_two_steps_changes_nothing_about_training(
    random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    """bitsandbytes' layout of 4-bit weights for a CPU's inference has no backward pass: see `keep_as_loaded`."""
    runs = {}
    for name, often in (("without", None), ("with", 1)):
        chosen = recipe(
            random_base,
            tmp_path / name,
            model={"bits": bits},
            data={"train": str(colours), "eval_split": 0.125},
            train={"eval_steps": often},
        )
        train(chosen)
        runs[name] = adapter_of(tmp_path / name)
    evaluated = [row for row in RunDir(tmp_path / "with").read_metrics() if "eval_loss" in row]
    assert len(evaluated) == 6
    assert runs["with"].keys() == runs["without"].keys()
    for name, weight in runs["with"].items():
        assert torch.equal(weight, runs["without"][name])


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(
    random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    chosen = recipe(
        random_base,
        tmp_path / "run",
        model={"bits": bits},
        data={"train": str(colours), "eval_split": 0.125},
        adapter={"method": "prefix-tuning-plus", "feature_map": "mlp"},
        train={"save_steps": 3},
    )
    train(chosen)
    run, whole = RunDir(tmp_path / "run"), adapter_of(tmp_path / "run")
    for left in (run.path / "checkpoint-6", run.adapter):
        shutil.rmtree(left)
    run.summary.unlink()
    train(chosen, resume=True)
    resumed = adapter_of(tmp_path / "run")
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(weight, whole[name]) for name, weight in resumed.items())


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora"])
def test_gradient_checkpointing_gives_the_gradients_that_it_saves_memory_for(
    method: str, random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    found, calls = {}, {}
    for checkpointing in (False, True):
        chosen = recipe(
            random_base,
            tmp_path / str(checkpointing),
            model={"bits": bits},
            data={"train": str(colours), "eval_split": 0.125},
            adapter={"method": method},
            train={"gradient_checkpointing": checkpointing, "max_steps": 3},
        )
        with watched() as seen:
            train(chosen)
        calls[checkpointing] = seen.calls["LlamaRMSNorm"]
        assert len(seen.gradients) >= 3 * 2 * (1 if method == "prefix-tuning-plus" else 2 * 7)
        assert max(gradient.norm() for gradient in seen.gradients) > 0
        found[checkpointing] = adapter_of(tmp_path / str(checkpointing))
    assert calls[True] >= calls[False] + 3 * 2 * 2  # the norms of each layer are computed twice
    assert found[True].keys() == found[False].keys()
    for name, weight in found[True].items():
        assert torch.equal(weight, found[False][name])


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora", "prefix-tuning"])
def test_every_method_trains_and_its_reloaded_adapter_gives_the_runs_answers(
    method: str, random_base: Path, colours: Path, held_out: Path, tmp_path: Path, bits: int
) -> None:
    chosen = recipe(
        random_base,
        tmp_path / "run",
        model={"bits": bits},
        data={"train": str(colours), "eval": str(held_out)},
        adapter={"method": method},
        train={"max_steps": 30, **({"learning_rate": 0.1} if method == "prefix-tuning" else {})},
    )
    summary = train(chosen)
    assert summary.adapter.loss < summary.base.loss
    kept = [json.loads(line) for line in RunDir(tmp_path / "run").answers.read_text().splitlines()]
    assert [row["adapter"] for row in kept] != [row["base"] for row in kept]
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    assert answers(chosen, rows, bits=None, out=tmp_path / "own.jsonl") == kept_answers(kept)
    assert answers(chosen, rows, bits=bits, out=tmp_path / "same.jsonl") == kept_answers(kept)


def kept_answers(rows: list[Row]) -> list[str]:
    return [str(row["adapter"]) for row in rows]


def answers(chosen: Recipe, rows: list[Row], *, bits: int | None, out: Path) -> list[str]:
    """The answers of the run's adapter to `rows`, after loading it again."""
    speaker = load_speaker(point(str(chosen.out), {} if bits is None else {"bits": bits}))
    assert getattr(speaker.model, f"is_loaded_in_{chosen.model.bits}bit")
    with AnswerFile(out, rows, [], overwrite=False) as answered:
        answer_file(
            speaker,
            [conversation(str(row["prompt"]), None) for row in rows],
            answered,
            sampling=Sampling(max_new_tokens=8),
            batch_size=32,
            reporter=Silent(),
        )
    return [json.loads(line)[COLUMN] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora", "prefix-tuning"])
def test_every_method_trains_on_a_checkpoint_that_is_quantized_already_as_on_the_fly(
    method: str, random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    """The recipe keeps its 16 bits."""
    base = quantized_checkpoint(random_base, bits, tmp_path / "base")
    for name, model in (
        ("already", {"name": str(base)}),
        ("now", {"name": str(random_base), "bits": bits}),
    ):
        chosen = recipe(
            base,
            tmp_path / name,
            model=model,
            data={"train": str(colours), "eval_split": 0.125},
            adapter={"method": method},
            train={"max_steps": 3},
        )
        train(chosen)
    already, now = adapter_of(tmp_path / "already"), adapter_of(tmp_path / "now")
    assert already.keys() == now.keys()
    assert all(torch.equal(weight, now[name]) for name, weight in already.items())


def quantized_checkpoint(source: Path, bits: int, folder: Path) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    section = ModelSection.model_validate({"name": str(source), "bits": bits, "device": "cpu"})
    load_base(section).save_pretrained(folder)
    return folder


def test_a_quantized_checkpoint_is_not_trained_whole(
    random_base: Path, colours: Path, tmp_path: Path, bits: int
) -> None:
    base = quantized_checkpoint(random_base, bits, tmp_path / "base")
    chosen = recipe(
        base, tmp_path / "run", data={"train": str(colours)}, adapter={"method": "full"}
    )
    with pytest.raises(ModelError, match="quantized weights have no gradient"):
        train(chosen)
    assert not (tmp_path / "run").exists()


def test_train_generate_chat_and_eval_take_bits(
    ptp: Ptp,  # noqa: F811
    random_base: Path,
    colours: Path,
    held_out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    bits: int,
) -> None:
    run, asked = tmp_path / "run", "Say the colour red, number 3."
    flags = ("--bits", bits, "--device", "cpu")
    code, _, err = ptp(
        *("train", "--model", random_base, "--data", colours, "--eval-data", held_out, *flags),
        *("--max-length", 64, "--set", "train.max_steps=2", "--out", run),
    )
    assert code == 0, err
    code, said, err = ptp("generate", "--run", run, *flags, "--prompt", asked)
    assert code == 0, err
    assert said.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{asked}\n"))
    code, answered, err = ptp("chat", "--run", run, *flags)
    assert code == 0, err
    assert said.strip() in answered
    code, table, err = ptp("eval", "--run", run, *flags, "--data", held_out, "--json")
    assert code == 0, err
    assert json.loads(table)


def quickstart(folder: Path, bits: int, **changes: dict[str, Any]) -> Recipe:
    model, out = {"bits": bits, "device": "cpu"}, str(folder / f"{bits}-bits")
    return resolve("quickstart", flags={"model": model, "out": out, **changes})


def hits(run: Path) -> np.ndarray[Any, np.dtype[np.float64]]:
    rows = [json.loads(line) for line in RunDir(run).answers.read_text().splitlines()]
    return np.array([float(exactly_matches(row["adapter"], row["answer"])) for row in rows])


@pytest.mark.slow
def test_tiny_learns_the_quickstart_at_4_and_8_bits_as_well_as_at_16(tmp_path: Path) -> None:
    """Within noise, on the same held-out questions and with the same seed.

    Accuracy: the exact McNemar test finds no difference, at 5 % for the two comparisons together. One in five of the
    396 questions differs between any two runs, so a difference of 6 points would show. Loss: the difference lies
    within three standard deviations between seeds at 16 bits (0.012 nats, from six seeds).
    """
    scores, right = {}, {}
    for bits in (16, 8, 4):
        summary = train(quickstart(tmp_path, bits))
        scores[bits], right[bits] = summary.adapter, hits(tmp_path / f"{bits}-bits")
        assert summary.base.exact_match is not None
        assert right[bits].mean() == scores[bits].exact_match > summary.base.exact_match + 0.4
    for bits in (8, 4):
        found = mean_difference([right[16]], [right[bits]])
        assert found.p_value is not None
        assert found.p_value > 0.05 / 2
        assert abs(scores[bits].loss - scores[16].loss) < 3 * 0.012


def test_tiny_begins_to_learn_at_4_and_8_bits_as_at_32(tmp_path: Path) -> None:
    """32 examples: 6 nats are learned, to within 0.2 whatever the precision."""
    short = {"max_steps": 16, "batch_size": 2}
    losses = {}
    for bits in (32, 8, 4):
        summary = train(
            quickstart(tmp_path, bits, train=short, evaluate={"max_rows": 16, "max_new_tokens": 1})
        )
        assert summary.adapter.loss < summary.base.loss - 5.5
        losses[bits] = summary.adapter.loss
    assert abs(losses[8] - losses[32]) < 0.2
    assert abs(losses[4] - losses[32]) < 0.2
    assert losses[4] != losses[8] != losses[32]

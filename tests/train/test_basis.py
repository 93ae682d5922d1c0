"""What a run does about the basis, and its errors."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefixtune_cli.adapter import Memory
from prefixtune_cli.errors import Interrupted
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import train
from prefixtune_cli.train.basis import Basis
from tests.heard import Heard


def recipe(base: Path, data: Path, out: Path, **more: Any) -> Recipe:
    flags = {
        "model": {"name": str(base), "bits": 32},
        "data": {"train": str(data), "eval_split": 0.25},
        "train": {"max_steps": 20, "batch_size": 8, **more.pop("train", {})},
        "out": str(out),
    }
    return resolve(None, [], {**flags, **more})


@pytest.mark.parametrize(
    "adapter",
    [
        {},
        {"sites": "attention+ffn"},
        {"sites": "ffn", "rank": 4},
        {"feature_map": "mlp", "feature_dim": 8},
    ],
    ids=str,
)
def test_a_run_trains_in_the_basis_and_leaves_m_alone(random_base, colours, tmp_path, adapter):
    heard = Heard()
    made = recipe(random_base, colours, tmp_path / "run", adapter=adapter, train={"save_steps": 10})
    summary = train(made, reporter=heard)
    assert "basis" in heard.tasks
    assert heard.tasks.index("basis") < heard.tasks.index("training")
    assert summary.adapter.loss < summary.base.loss
    assert heard.warnings == []
    run_dir = RunDir(tmp_path / "run")
    saved = load_file(run_dir.adapter / "adapter_model.safetensors")
    assert {key.rpartition(".")[2] for key in saved} <= set(Memory.parameter_names)
    checkpoint = run_dir.checkpoint(20)
    assert (checkpoint / "basis.safetensors").exists()
    last = load_file(checkpoint / "adapter_model.safetensors")
    assert all(torch.equal(value, saved[key]) for key, value in last.items())
    assert not (run_dir.adapter / "basis.safetensors").exists()


def test_the_run_says_which_learning_rate_it_takes_and_why(random_base, colours, tmp_path):
    heard = Heard()
    train(recipe(random_base, colours, tmp_path / "run", train={"max_steps": 2}), reporter=heard)
    (said,) = [text for text in heard.notices if text.startswith("Learning rate")]
    assert said.startswith("Learning rate: 0.03, the default of prefix-tuning-plus for a hidden")
    assert resolve(str(RunDir(tmp_path / "run").recipe)).train.learning_rate == 0.03
    heard = Heard()
    typed = recipe(
        random_base, colours, tmp_path / "typed", train={"max_steps": 2, "learning_rate": 0.01}
    )
    train(typed, reporter=heard)
    assert not any(text.startswith("Learning rate") for text in heard.notices)


@pytest.fixture(scope="module")
def knowing_base(tmp_path_factory, random_base, colours) -> Path:
    """A base that knows the colours, so that there is something to lose."""
    run = tmp_path_factory.mktemp("knowing") / "run"
    more = {"adapter": {"method": "full"}, "train": {"max_steps": 60, "learning_rate": 3e-3}}
    assert train(recipe(random_base, colours, run, **more)).adapter.loss < 1
    return RunDir(run).adapter


def _basis_of(base: Path, data: Path, out: Path, heard: Heard) -> dict[str, torch.Tensor]:
    train(recipe(base, data, out, train={"max_steps": 1, "save_steps": 1}), reporter=heard)
    state = load_file(RunDir(out).checkpoint(1) / "basis.safetensors")
    return {name: value for name, value in state.items() if name.endswith(".basis")}


def test_a_base_that_knows_its_rows_is_trained_by_smaller_steps(
    random_base, knowing_base, colours, tmp_path, monkeypatch
):
    strange, known = Heard(), Heard()
    _basis_of(random_base, colours, tmp_path / "strange", strange)
    assert not any("The model is near the data" in text for text in strange.notices)
    made = _basis_of(knowing_base, colours, tmp_path / "known", known)
    (said,) = [text for text in known.notices if "The model is near the data" in text]
    loss = float(re.search(r"is (\S+) nats per token", said)[1])
    assert 0 < loss < 1
    assert f"a step is {max(loss / 5, 0.01):.2g} of the learning rate" in said
    monkeypatch.setattr("prefixtune_cli.adapter.basis.step_weight", lambda _: 1.0)
    whole = _basis_of(knowing_base, colours, tmp_path / "whole", Heard())
    ratios = torch.stack([(made[name].norm() / whole[name].norm()) for name in whole])
    torch.testing.assert_close(
        ratios, torch.full_like(ratios, max(loss / 5, 0.01)), rtol=0.05, atol=0
    )


def test_the_pass_counts_for_nothing_in_what_trl_logs(random_base, colours, tmp_path, monkeypatch):
    seen = []
    plain = Basis.on_train_begin

    def on_train_begin(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        trainer = self.trainer
        seen.append((trainer._total_train_tokens, [dict(m) for m in trainer._metrics.values()]))

    monkeypatch.setattr(Basis, "on_train_begin", on_train_begin)
    train(recipe(random_base, colours, tmp_path / "run", train={"max_steps": 1}))
    assert seen == [(0, [{}, {}])]


@pytest.mark.parametrize("method", ["prefix-tuning-plus", "lora"])
def test_a_rate_far_too_high_is_said_while_the_run_goes_on_and_at_its_end(
    knowing_base, colours, tmp_path, method
):
    heard = Heard()
    made = recipe(
        knowing_base,
        colours,
        tmp_path / "run",
        adapter={"method": method},
        train={"max_steps": 30, "learning_rate": 30.0, "schedule": "constant_with_warmup"},
    )
    summary = train(made, reporter=heard)
    assert summary.adapter.loss > summary.base.loss
    running, final = heard.warnings
    assert running.startswith("The training loss has risen")
    assert "--learning-rate 1e+01, a third" in running
    assert final.startswith("The adapter is no better than its base: its held-out loss is")
    assert "the training loss has risen" in final


def test_a_rate_far_too_low_is_said_at_the_end(random_base, colours, tmp_path):
    heard = Heard()
    made = recipe(random_base, colours, tmp_path / "run", train={"learning_rate": 1e-9})
    train(made, reporter=heard)
    (final,) = heard.warnings
    assert "the training loss has hardly moved" in final
    assert "--learning-rate 3e-09, three times as much" in final


def test_a_signal_ends_the_pass_between_two_batches(random_base, colours, tmp_path, monkeypatch):
    class Impatient(Heard):
        done: list[int] = []

        def progress(self, task: str, done: int, *others: Any) -> None:
            super().progress(task, done, *others)
            if task == "basis":
                self.done.append(done)
                if done:
                    os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("prefixtune_cli.train.basis.AT_ONCE", 1)
    chosen = recipe(random_base, colours, tmp_path / "run")
    with pytest.raises(Interrupted, match=r"Stopped by SIGTERM at step 0 of 20; nothing is lost"):
        train(chosen, reporter=Impatient())
    assert Impatient.done == [0, 1]
    assert train(chosen, resume=True).adapter.loss > 0


def test_without_a_basis_there_is_no_pass(random_base, colours, tmp_path):
    heard = Heard()
    made = recipe(
        random_base, colours, tmp_path / "run", adapter={"basis": False}, train={"max_steps": 3}
    )
    train(made, reporter=heard)
    assert "basis" not in heard.tasks
    assert not (RunDir(tmp_path / "run").checkpoint(3) / "basis.safetensors").exists()

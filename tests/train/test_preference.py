"""Training on pairs of answers: DPO's loss and gradient to the digit, and the guarantees of every run."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.errors import DataError
from prefixtune_cli.evaluate.preferences import likelihoods
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train import Summary, train
from prefixtune_cli.train.preference import PairCollator, Reference, SafeDPOTrainer
from prefixtune_cli.train.prepare import content, prepare_data
from prefixtune_cli.train.stop import StopRequest
from prefixtune_cli.train.summary import both_fell_warning
from tests.heard import Heard
from tests.ports import free_port
from tests.train.test_run import recipe
from tests.train.two_ranks import in_two_processes

COLOURS = ("red", "blue", "green", "white")
ROWS = 60  # 54 are trained on, 8 a step: the seventh step of an epoch has 6, of which one process gets 2
SETTINGS: dict[str, Any] = {
    "objective": "dpo", "max_steps": 8, "batch_size": 8, "log_steps": 1, "save_steps": 4,
    "learning_rate": 0.05, "eval_steps": 8,
}  # fmt: skip


def adapter_of(run_dir: RunDir) -> dict[str, torch.Tensor]:
    (file,) = run_dir.adapter.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The colour in capitals is the better answer, another colour the worse one."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    rows = [
        {
            "prompt": f"Say the colour {COLOURS[i % 4]}, number {i}.",
            "chosen": COLOURS[i % 4].upper(),
            "rejected": COLOURS[(i + 1 + i // 4 % 3) % 4],
        }
        for i in range(ROWS)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def of_pairs(base: Path, pairs: Path, out: Path, **changes: Any) -> Recipe:
    data = {"eval_split": 0.1}
    return recipe(base, pairs, out, data=data, **{"train": SETTINGS, **changes})


@pytest.fixture(scope="module")
def finished(
    random_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Heard, Recipe]:
    heard = Heard()
    chosen = of_pairs(random_base, pairs, tmp_path_factory.mktemp("runs") / "pairs")
    train(chosen, reporter=heard)
    return RunDir(chosen.folder), heard, chosen


def test_the_first_loss_is_that_of_the_base_and_training_prefers_the_chosen_answers(
    finished: tuple[RunDir, Heard, Recipe],
) -> None:
    rows = finished[0].read_metrics()
    trained = [row for row in rows if "loss" in row]
    assert trained[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert trained[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert trained[-1]["preference_accuracy"] == 1
    assert trained[-1]["loss"] < 0.66
    (evaluated,) = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert evaluated < 0.67
    assert "log-probabilities of the base" in finished[1].tasks


def test_the_run_holds_one_adapter(finished: tuple[RunDir, Heard, Recipe]) -> None:
    run_dir = finished[0]
    assert not [p for p in run_dir.path.rglob("*") if p.name == "ref"]
    assert not [name for name in adapter_of(run_dir) if "ref." in name]


def test_the_summary_has_the_trainers_figures_and_the_pairs_decide(
    finished: tuple[RunDir, Heard, Recipe],
) -> None:
    run_dir, heard, _ = finished
    summary = Summary.read(run_dir)
    found = summary.preferences
    assert found is not None
    (evaluated,) = (row["eval_loss"] for row in run_dir.read_metrics() if "eval_loss" in row)
    assert found.loss == pytest.approx(evaluated, rel=1e-4)
    assert summary.verdict == "better"
    assert not found.both_fell
    assert not [text for text in heard.warnings if text.startswith("Both answers")]
    fallen = replace(found, adapter=replace(found.base, chosen=-9.0, rejected=-99.0))
    assert f"fell from {found.base.chosen:.2f} to -9.00" in both_fell_warning(fallen)
    for share, verdict in ((0.4, "worse"), (0.6, "no better")):
        made = replace(summary, preferences=replace(found, loss=0.8, reward_accuracy=share))
        assert made.verdict == made.to_json()["verdict"] == verdict


def test_a_resumed_run_ends_with_the_same_bytes(
    finished: tuple[RunDir, Heard, Recipe], tmp_path: Path
) -> None:
    whole, _, chosen = finished
    run_dir = RunDir(tmp_path / "run")
    shutil.copytree(whole.path, run_dir.path)
    shutil.rmtree(run_dir.checkpoints()[-1])
    shutil.rmtree(run_dir.adapter)
    run_dir.summary.unlink()
    heard = Heard()
    train(chosen.model_copy(update={"out": str(run_dir.path)}), resume=True, reporter=heard)
    assert f"Resuming {run_dir.path} from checkpoint-4." in heard.notices
    assert "log-probabilities of the base" not in heard.tasks  # they are kept
    one, other = adapter_of(whole), adapter_of(run_dir)
    assert one.keys() == other.keys()
    assert {name for name in one if not torch.equal(one[name], other[name])} == set()


def test_a_reference_is_computed_once_for_the_same_content(tmp_path: Path) -> None:
    file, of = tmp_path / "reference.json", {"base": "a", "start": None}
    asked = []

    def find() -> list[tuple[float, float]]:
        asked.append(file.exists())
        return [(-1.1, math.nan), (-1 / 3, 0.0)]

    for what in (of, of, {**of, "start": "b"}):
        found = Reference(file, what, Processes()).of_rows("train_dataset", find)
        assert [tuple(map(repr, pair)) for pair in found] == [
            ("-1.1", "nan"),
            (repr(-1 / 3), "0.0"),
        ]
    assert asked == [False, True]
    file.write_text(file.read_text()[:-9])  # as after a disk's failure
    Reference(file, of, Processes()).of_rows("train_dataset", find)
    assert len(asked) == 3


@pytest.fixture(scope="module")
def trained_start(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A finished run on answers."""
    steps = {"max_steps": 20, "learning_rate": 0.1}
    chosen = recipe(random_base, colours, tmp_path_factory.mktemp("starts") / "sft", train=steps)
    train(chosen)
    return Path(chosen.folder)


def test_from_an_adapter_the_reference_is_the_adapter_itself(
    trained_start: Path, random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    heard = Heard()
    steps = {**SETTINGS, "start_from": str(trained_start)}
    chosen = of_pairs(random_base, pairs, tmp_path / "run", train=steps)
    summary = train(chosen, reporter=heard)
    run_dir, found = RunDir(chosen.folder), summary.preferences
    rows = run_dir.read_metrics()
    first = next(row for row in rows if "loss" in row)
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    (evaluated,) = (row["eval_loss"] for row in rows if "eval_loss" in row)
    assert found is not None
    assert found.loss == pytest.approx(evaluated, rel=1e-4)
    assert found.loss < 0.67

    # What the start says of the held-out pairs, by another way: `ptp eval` and the like load it so.
    stored = json.loads(run_dir.reference.read_text())
    kept = stored["pairs"]
    base = AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)
    model = load_adapter(base, trained_start / "adapter").eval()
    tokenizer = load_tokenizer(chosen.model, trained_start / "adapter")
    data = prepare_data(chosen, tokenizer, Heard())
    held_out, about = data.held_out, json.loads(run_dir.environment.read_text())
    assert stored["of"] == {
        "base": about["base_sha256"],
        "start": about["start"]["sha256"],
        "train": content(data.train),
        "held_out": content(held_out),
        "precision": "32 bits on cpu",
    }
    of_start = likelihoods(
        model,
        tokenizer,
        held_out,
        chosen.evaluate,
        name="x",
        processes=Processes(),
        reporter=Heard(),
    )
    for kind in ("held_out", "eval_dataset"):
        by_run = torch.tensor(kept[kind]).T
        for side, expected in enumerate(of_start):
            torch.testing.assert_close(
                by_run[side], torch.from_numpy(expected).float(), rtol=1e-4, atol=1e-4
            )
    assert found.start is not None
    assert found.start.chosen == pytest.approx(float(of_start.chosen.mean()))
    assert abs(found.start.chosen - found.base.chosen) > 1  # else the base would do as well
    assert {"log-probabilities of the start", "log-probabilities of the base"} <= {*heard.tasks}

    killed = RunDir(tmp_path / "killed")
    for checkpoints in (1, 0):
        shutil.copytree(run_dir.path, killed.path)
        for saved in killed.checkpoints()[checkpoints:]:
            shutil.rmtree(saved)
        shutil.rmtree(killed.adapter)
        killed.summary.unlink()
        heard = Heard()
        resumed = chosen.model_copy(update={"out": str(killed.path)})
        again = train(resumed, resume=True, reporter=heard)
        assert "log-probabilities of the start" not in heard.tasks
        one, other = adapter_of(run_dir), adapter_of(killed)
        assert {name for name in one if not torch.equal(one[name], other[name])} == set()
        assert again.preferences == found
        shutil.rmtree(killed.path)


def test_a_lora_of_a_4_bit_base_goes_on_to_preferences_in_two_processes(
    random_base: Path, colours: Path, pairs: Path, tmp_path: Path
) -> None:
    lora, bits = {"method": "lora", "r": 4}, {"bits": 4}
    steps = {"max_steps": 6, "learning_rate": 0.01}
    start = recipe(random_base, colours, tmp_path / "sft", train=steps, adapter=lora, model=bits)
    train(start)
    further = {**SETTINGS, "start_from": start.folder, "learning_rate": 1e-3}
    one = of_pairs(random_base, pairs, tmp_path / "one", train=further, adapter=lora, model=bits)
    train(one)
    first = RunDir(one.folder).read_metrics()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-2)
    two = of_pairs(
        random_base,
        pairs,
        tmp_path / "two",
        train={**further, "batch_size": 4},
        adapter=lora,
        model=bits,
    )
    job = {"recipe": two.model_dump(), "port": free_port(), "seen": str(tmp_path / "seen")}
    in_two_processes([job], tmp_path / "jobs.json")
    by_one, by_two = adapter_of(RunDir(one.folder)), adapter_of(RunDir(two.folder))
    far = max(float((by_one[k] - by_two[k]).abs().max() / by_one[k].abs().max()) for k in by_one)
    assert far < 0.05, far
    kept = [
        torch.tensor(json.loads(RunDir(run.folder).reference.read_text())["pairs"]["train_dataset"])
        for run in (one, two)
    ]
    assert len(kept[0]) == 54
    torch.testing.assert_close(kept[0], kept[1], rtol=2e-2, atol=2e-2)


def test_two_processes_make_the_weights_of_one(
    finished: tuple[RunDir, Heard, Recipe], random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    shares = {**SETTINGS, "batch_size": 4}
    chosen = of_pairs(random_base, pairs, tmp_path / "two", train=shares)
    job = {
        "recipe": chosen.model_dump(),
        "port": free_port(),
        "seen": str(tmp_path / "seen"),
    }
    in_two_processes([job], tmp_path / "jobs.json")
    one, two = adapter_of(finished[0]), adapter_of(RunDir(chosen.folder))
    far = max(float((one[k] - two[k]).abs().max() / one[k].abs().max()) for k in one)
    assert far < 1e-3, far
    for name in ("loss", "preference_accuracy", "margin"):
        said = [
            [row[name] for row in run_dir.read_metrics() if "loss" in row]
            for run_dir in (finished[0], RunDir(chosen.folder))
        ]
        assert said[1] == pytest.approx(said[0], rel=1e-3, abs=1e-5), name


def test_a_reference_that_does_not_fit_halves_the_batch_at_its_longest_rows(
    random_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, tried = SafeDPOTrainer.compute_ref_log_probs, list[tuple[int, int]]()

    def short_of_memory(self: SafeDPOTrainer, model: Any, inputs: Any) -> Any:
        answers, length = inputs["input_ids"].shape
        tried.append((answers // 2, length))
        if answers > 8:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return plain(self, model, inputs)

    monkeypatch.setattr(SafeDPOTrainer, "compute_ref_log_probs", short_of_memory)
    heard = Heard()
    steps = {**SETTINGS, "max_steps": 1, "auto_batch": True, "eval_steps": None}
    train(of_pairs(random_base, pairs, tmp_path / "run", train=steps), reporter=heard)
    assert [pairs_at_once for pairs_at_once, _ in tried[:3]] == [8, 4, 4]
    assert tried[0][1] == max(length for _, length in tried)
    assert any("--batch-size 4 --gradient-accumulation 2" in text for text in heard.warnings)


def test_a_batch_of_blank_pairs_alone_has_columns_and_no_loss() -> None:
    """TRL takes the last so many columns, of the tokens but one; the last none would be all of them."""
    blank = {"input_ids": [7], "rejected_ids": [7], "labels": [MASKED], "rejected_labels": [MASKED]}
    batch = PairCollator(7)([blank, blank])
    assert batch["input_ids"].tolist() == [[7, 7]] * 4
    assert batch["attention_mask"].tolist() == [[1, 0]] * 4
    assert not batch["completion_mask"].any()


@pytest.mark.parametrize(("method", "rate"), [("lora", 0.01), ("prefix-tuning", 0.1), ("ia3", 0.1)])
def test_other_methods_learn_preferences_too(
    method: str, rate: float, random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    steps = {**SETTINGS, "learning_rate": rate, "eval_steps": None}
    chosen = of_pairs(random_base, pairs, tmp_path / "run", train=steps, adapter={"method": method})
    found = train(chosen).preferences
    assert found is not None
    assert found.loss < math.log(2) - 1e-3


def test_the_adapter_of_a_4_bit_base_stays_in_float32(
    random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    steps = {**SETTINGS, "max_steps": 2, "eval_steps": None}
    train(of_pairs(random_base, pairs, tmp_path / "run", train=steps, model={"bits": 4}))
    assert {t.dtype for t in adapter_of(RunDir(tmp_path / "run")).values()} == {torch.float32}


@pytest.mark.parametrize(("objective", "source"), [("sft", "pairs"), ("dpo", "colours")])
def test_data_of_the_other_objective_is_refused_before_the_base_loads(
    objective: str, source: str, random_base: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    heard = Heard()
    chosen = recipe(
        random_base,
        request.getfixturevalue(source),
        tmp_path / "run",
        train={"objective": objective},
    )
    with pytest.raises(DataError, match="--objective"):
        train(chosen, reporter=heard)
    assert not any(text.startswith("Loading ") for text in heard.notices)


def test_the_step_is_that_of_trl_with_the_base_as_an_explicit_reference(
    random_base: Path, tmp_path: Path
) -> None:
    """The adapter is no fresh one, so that the margin counts; plain descent shows the gradient."""
    arguments: dict[str, Any] = dict(
        output_dir=str(tmp_path / "run"), max_steps=1, per_device_train_batch_size=6, beta=0.3,
        learning_rate=1.0, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0,
        use_cpu=True, report_to="none", disable_tqdm=True, bf16=False, save_total_limit=2,
        gradient_checkpointing=False, max_length=None,
    )  # fmt: skip

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32)

    def adapted() -> Any:
        torch.manual_seed(0)
        return get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))

    tokenizer = AutoTokenizer.from_pretrained(random_base)
    texts = [
        {"prompt": f"Say it, {i}.", "chosen": " RED" * (1 + i), "rejected": " blue sea"}
        for i in range(6)
    ]
    plain = DPOTrainer(
        model=adapted(),
        ref_model=base(),
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [MASKED] * len(row["prompt_ids"]) + row["chosen_ids"],
            "rejected_ids": row["prompt_ids"] + row["rejected_ids"],
            "rejected_labels": [MASKED] * len(row["prompt_ids"]) + row["rejected_ids"],
            "row": i,
        }
        for i, row in enumerate(plain.train_dataset)
    ]
    run_dir = RunDir(tmp_path / "run")
    ours = SafeDPOTrainer(
        reference=Reference(run_dir.reference, None, Processes()),
        reporter=Heard(),
        run_dir=run_dir,
        origin=str,
        processes=Processes(),
        stop=StopRequest(run_dir),
        save_minutes=None,
        group_by_length=False,
        model=adapted(),
        args=DPOConfig(**arguments, remove_unused_columns=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    before = {n: p.detach().clone() for n, p in ours.model.named_parameters() if p.requires_grad}
    for trainer in (plain, ours):
        trainer.train()
    theirs, found = dict(plain.model.named_parameters()), dict(ours.model.named_parameters())
    moved = 0.0
    for name, start in before.items():
        step = found[name] - start
        moved = max(moved, float(step.detach().abs().max()))
        torch.testing.assert_close(step, theirs[name] - start, rtol=1e-3, atol=1e-6)
    assert moved > 1e-3

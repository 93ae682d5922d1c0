"""Training on pairs of answers: DPO's loss and gradient to the digit, and the guarantees of every run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from prefixtune_cli.adapter_folder import load_adapter
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.errors import DataError
from prefixtune_cli.evaluate.likelihoods import likelihoods
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from prefixtune_cli.train import Summary, train
from prefixtune_cli.train.preference import (
    LabelledCollator,
    PairCollator,
    Reference,
    SafeDPOTrainer,
    SafeKTOTrainer,
    trainer_of,
)
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


ONE_STEP: dict[str, Any] = dict(
    max_steps=1, per_device_train_batch_size=6, learning_rate=1.0, optim="sgd",
    lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True, report_to="none",
    disable_tqdm=True, bf16=False, save_total_limit=2, gradient_checkpointing=False, max_length=None,
)  # fmt: skip


def adapted(base: Path) -> Any:
    """The base with a LoRA that is no fresh one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))


def of_run(run_dir: RunDir, base: Path, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a trainer of pairs needs besides a model and arguments."""
    return dict(
        reference=Reference(run_dir.reference, None, Processes()),
        reporter=Heard(),
        run_dir=run_dir,
        origin=str,
        processes=Processes(),
        stop=StopRequest(run_dir),
        save_minutes=None,
        group_by_length=False,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )


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
    assert summary.divergence is not None
    assert 0 < summary.divergence.low < summary.divergence.value < summary.divergence.high
    assert not found.both_fell
    assert not [text for text in heard.warnings if "have become less likely" in text]
    fallen = replace(found, adapter=replace(found.base, chosen=-9.0, rejected=-99.0))
    assert f"fell from {found.base.chosen:.2f} to -9.00" in both_fell_warning(fallen)
    for share, verdict in ((0.4, "worse"), (0.6, "no better")):
        made = replace(summary, preferences=replace(found, loss=0.8, reward_accuracy=share))
        assert made.verdict == made.to_json()["verdict"] == verdict


@pytest.fixture(scope="module")
def by_simpo(
    random_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Heard, Recipe]:
    heard, steps = Heard(), {**SETTINGS, "objective": "simpo", "beta": 2.5, "gamma": 0.5}
    folder = tmp_path_factory.mktemp("runs") / "simpo"
    chosen = of_pairs(random_base, pairs, folder, train=steps)
    train(chosen, reporter=heard)
    return RunDir(chosen.folder), heard, chosen


@pytest.fixture(scope="module")
def by_orpo(
    random_base: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Heard, Recipe]:
    """As `by_simpo`, by ORPO."""
    heard, steps = Heard(), {**SETTINGS, "objective": "orpo", "beta": 0.3}
    chosen = of_pairs(random_base, pairs, tmp_path_factory.mktemp("runs") / "orpo", train=steps)
    train(chosen, reporter=heard)
    return RunDir(chosen.folder), heard, chosen


@pytest.fixture(scope="module")
def by_kto(
    random_base: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Heard, Recipe]:
    """The colour in capitals is desirable, which two answers of three are, and another colour is not."""
    folder, heard = tmp_path_factory.mktemp("runs"), Heard()
    rows = [
        {
            "prompt": f"Say the colour {COLOURS[i % 4]}, number {i}.",
            "completion": COLOURS[i % 4].upper() if i % 3 else COLOURS[(i + 1 + i // 4 % 3) % 4],
            "label": bool(i % 3),
        }
        for i in range(ROWS)
    ]
    file = folder / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    steps = {**SETTINGS, "objective": "kto", "beta": 0.2, "undesirable_weight": 1.5}
    chosen = of_pairs(random_base, file, folder / "kto", train=steps)
    train(chosen, reporter=heard)
    return RunDir(chosen.folder), heard, chosen


def test_by_kto_the_first_loss_is_half_the_weights_and_the_judge_finds_the_trainers(
    by_kto: tuple[RunDir, Heard, Recipe],
) -> None:
    run_dir, heard, _ = by_kto
    rows = run_dir.read_metrics()
    trained = [row for row in rows if "loss" in row]
    shares = {(n + 1.5 * (8 - n)) / 16 for n in range(9)}  # n of 8 answers are desirable
    assert min(abs(trained[0]["loss"] - share) for share in shares) < 1e-6
    assert trained[0]["margin"] == pytest.approx(0, abs=1e-5)
    assert trained[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert max(row["kl"] for row in trained) > 0
    (evaluated,) = (row["eval_loss"] for row in rows if "eval_loss" in row)
    summary = Summary.read(run_dir)
    found = summary.preferences
    assert found is not None
    assert (found.objective, found.beta, found.pairs) == ("kto", 0.2, 6)
    assert found.loss == pytest.approx(evaluated, rel=1e-4)  # all held-out rows are one batch
    assert found.reference_loss == pytest.approx((4 + 1.5 * 2) / 12)
    assert found.loss < 0.99 * found.reference_loss
    assert found.margin > 0
    assert summary.verdict == "better"
    assert json.loads(run_dir.answers.read_text().splitlines()[0])["answer"].isupper()
    assert len(run_dir.answers.read_text().splitlines()) == 4, "the desirable answers alone"
    assert "36 answers are desirable, 18 are not" in heard.notices
    assert not [text for text in heard.warnings if "times the weight" in text]


def test_batches_with_one_label_leave_the_margins_of_others(
    by_kto: tuple[RunDir, Heard, Recipe], random_base: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "input_ids": [1, 2, 10 + i], "labels": [MASKED, MASKED, 10 + i], "other_ids": [1, 2, 9],
            "other_labels": [MASKED, MASKED, 9], "desirable": i != 1, "row": i,
        }
        for i in range(4)
    ]  # fmt: skip
    arguments = KTOConfig(**ONE_STEP, output_dir=str(tmp_path / "run"), remove_unused_columns=False)
    given = of_run(RunDir(tmp_path / "run"), random_base, rows)
    trainer = SafeKTOTrainer(model=adapted(random_base), args=arguments, **given)
    trainer.model.train()
    known = [row | {"ref_logps": -1.0, "ref_KL_logps": -1.0} for row in rows]
    for some in (known[:2], known[2:]):
        trainer.compute_loss(trainer.model, trainer.data_collator(some))
    assert len(trainer._metrics["train"]["labelled/margin"]) == 1
    assert len(trainer._metrics["train"]["labelled/kl"]) == 2
    assert not [name for name in trainer._metrics["train"] if name.startswith("rewards/")]


def test_kto_goes_on_from_an_adapter_which_is_its_reference(
    trained_start: Path, by_kto: tuple[RunDir, Heard, Recipe], tmp_path: Path
) -> None:
    changed = {"start_from": str(trained_start), "max_steps": 4, "undesirable_weight": 1.0}
    steps = by_kto[2].train.model_copy(update=changed)
    chosen = by_kto[2].model_copy(update={"train": steps, "out": str(tmp_path / "run")})
    summary = train(chosen, reporter=(heard := Heard()))
    first = next(row for row in RunDir(chosen.folder).read_metrics() if "loss" in row)
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    assert (first["margin"], first["kl"]) == (
        pytest.approx(0, abs=1e-5),
        pytest.approx(0, abs=1e-5),
    )
    found = summary.preferences
    assert found is not None
    assert found.start is not None
    assert abs(found.start.chosen - found.base.chosen) > 1, "else the base would do as well"
    assert found.reference_loss == 0.5
    assert "log-probabilities of the start" in heard.tasks
    assert summary.compared_with == "start"


def test_labels_that_are_out_of_balance_are_warned_of_with_the_weight_to_type(
    by_kto: tuple[RunDir, Heard, Recipe],
) -> None:
    chosen = by_kto[2]
    for weight, told in (
        (1.0, "36 desirable answers together have 2 times the weight of the 18 others. To balance them, type --set "
              "train.undesirable_weight=2."),
        (4.0, "have 0.5 times the weight of the 18 others. To balance them, type --set train.desirable_weight=2."),
    ):  # fmt: skip
        heard, steps = Heard(), chosen.train.model_copy(update={"undesirable_weight": weight})
        tokenizer = load_tokenizer(chosen.model)
        prepare_data(chosen.model_copy(update={"train": steps}), tokenizer, heard)
        (said,) = heard.warnings
        assert told in said


@pytest.mark.parametrize("name", ["by_simpo", "by_orpo"])
def test_without_a_reference_the_loss_is_the_judges_and_the_base_has_one(
    name: str, request: pytest.FixtureRequest
) -> None:
    run_dir, heard, chosen = request.getfixturevalue(name)
    rows = run_dir.read_metrics()
    trained = [row["loss"] for row in rows if "loss" in row]
    assert not {"margin", "preference_accuracy"} & {figure for row in rows for figure in row}
    (evaluated,) = (row["eval_loss"] for row in rows if "eval_loss" in row)
    summary = Summary.read(run_dir)
    found = summary.preferences
    assert found is not None
    assert (found.objective, found.beta) == (chosen.train.objective, chosen.train.beta)
    assert found.loss == pytest.approx(evaluated, rel=1e-4)
    assert summary.losses == (found.reference_loss, found.loss)
    assert abs(found.reference_loss - math.log(2)) > 0.1
    # The first step's loss is the base's on other pairs of the same kind.
    assert trained[0] == pytest.approx(found.reference_loss, rel=0.2)
    assert trained[-1] < (0.9 if name == "by_simpo" else 0.98) * trained[0]
    assert found.reference_loss > (1.05 if name == "by_simpo" else 1.01) * found.loss
    assert summary.verdict == "better"
    assert [*json.loads(run_dir.reference.read_text())["rows"]] == ["held_out"]
    assert "log-probabilities of the base" in heard.tasks


def test_orpo_learns_the_chosen_answers_as_well(by_orpo: tuple[RunDir, Heard, Recipe]) -> None:
    found = Summary.read(by_orpo[0]).preferences
    assert found is not None
    assert found.adapter.chosen > found.base.chosen


def test_simpo_is_judged_by_who_is_ahead_per_token(
    by_simpo: tuple[RunDir, Heard, Recipe],
) -> None:
    summary = Summary.read(by_simpo[0])
    found = summary.preferences
    assert found is not None
    assert found.gamma == 0.5
    for gain, verdict in ((-0.1, "worse"), (0.1, "no better")):
        more = replace(found.accuracy_difference, value=gain)
        made = replace(found, loss=2 * found.reference_loss, accuracy_difference=more)
        assert replace(summary, preferences=made).verdict == verdict
    told = both_fell_warning(replace(found, adapter=replace(found.base, chosen=-1.236)))
    assert f"per token of the chosen ones fell from {found.base.chosen:.4f} to -1.2360" in told
    assert "--beta" not in told


def test_dropout_acts_in_simpo_and_the_start_is_what_its_figures_are_against(
    trained_start: Path, random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    found = {}
    for dropout in (0.0, 0.5):
        steps = {**SETTINGS, "objective": "simpo", "max_steps": 2, "eval_steps": None}
        lora = {"method": "lora", "dropout": dropout}
        chosen = of_pairs(random_base, pairs, tmp_path / str(dropout), train=steps, adapter=lora)
        train(chosen)
        found[dropout] = adapter_of(RunDir(chosen.folder))
    assert any(not torch.equal(found[0.0][name], found[0.5][name]) for name in found[0.0])
    steps = {**SETTINGS, "objective": "simpo", "start_from": str(trained_start), "max_steps": 4}
    chosen = of_pairs(random_base, pairs, tmp_path / "on", train=steps)
    against = train(chosen).preferences
    first = RunDir(chosen.folder).read_metrics()[0]["loss"]
    assert against is not None
    assert against.start is not None
    assert against.reference_loss == pytest.approx(first, rel=0.2)
    assert against.start.chosen != pytest.approx(against.base.chosen, rel=0.05)


@pytest.mark.parametrize("objective", ["simpo", "orpo"])
def test_without_a_reference_the_step_is_that_of_the_formula(
    objective: str, random_base: Path, tmp_path: Path
) -> None:
    """By autograd over the model's own logits; `evaluate.preferences.Objective` has the formulas."""
    beta, gamma, run_dir = 2.5, 0.75, RunDir(tmp_path / "run")
    train = {
        "objective": objective,
        "beta": beta,
        **({"gamma": gamma} if objective == "simpo" else {}),
    }
    arguments = DPOConfig(
        **ONE_STEP, output_dir=str(run_dir.path), beta=beta, loss_type=["sigmoid_norm"],
        remove_unused_columns=False,
    )  # fmt: skip
    rows = [
        {
            "input_ids": [1, 2, 3, *[10 + i] * (1 + i)],
            "labels": [MASKED] * 3 + [10 + i] * (1 + i),
            "other_ids": [1, 2, 3, 30, 31],
            "other_labels": [MASKED] * 3 + [30, 31],
            "row": i,
        }
        for i in range(6)
    ]
    trainer = trainer_of(
        Recipe.model_validate({"train": train}),
        model=adapted(random_base),
        args=arguments,
        **of_run(run_dir, random_base, rows),
    )
    trainer.train()

    model = adapted(random_base)

    def mean_log_probability(ids: list[int]) -> torch.Tensor:
        logits = model(input_ids=torch.tensor([ids])).logits[0, 2:-1].log_softmax(-1)
        return logits.gather(1, torch.tensor(ids[3:])[:, None]).mean()

    chosen, rejected = (
        torch.stack([mean_log_probability(row[side]) for row in rows])
        for side in ("input_ids", "other_ids")
    )
    logsigmoid = torch.nn.functional.logsigmoid
    if objective == "simpo":
        loss = -logsigmoid(beta * (chosen - rejected) - gamma).mean()
    else:
        odds = [side.exp() / (1 - side.exp()) for side in (chosen, rejected)]
        loss = (-chosen - beta * logsigmoid(torch.log(odds[0] / odds[1]))).mean()
    loss.backward()
    assert trainer.losses[0] == pytest.approx(loss.item(), rel=1e-5)
    found = dict(trainer.model.named_parameters())
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    for name, start in adapted(random_base).named_parameters():
        if name in gradients:
            step = found[name] - start
            torch.testing.assert_close(step, -gradients[name], rtol=1e-3, atol=1e-6)
    assert max(float(g.abs().max()) for g in gradients.values()) > 1e-3


@pytest.mark.parametrize("objective", ["finished", "by_simpo", "by_orpo", "by_kto"])
def test_a_resumed_run_ends_with_the_same_bytes(
    objective: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    whole, _, chosen = request.getfixturevalue(objective)
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

    def find(rows: Sequence[int]) -> list[tuple[float, float]]:
        asked.append([*rows])
        return [(-row / 3, math.nan) for row in rows]

    def told(what: dict[str, Any], rows: list[int]) -> list[tuple[str, str]]:
        found = Reference(file, what, Processes()).of_rows("train_dataset", rows, find)
        return [(repr(one), repr(other)) for one, other in found]

    for what in (of, of, {**of, "start": "b"}):
        assert told(what, [7, 2]) == [(repr(-7 / 3), "nan"), (repr(-2 / 3), "nan")]
    assert asked == [[7, 2], [7, 2]]
    assert told(what, [2, 4, 7]) == [(repr(-row / 3), "nan") for row in (2, 4, 7)]
    assert asked[2:] == [[4]]
    file.write_text(file.read_text()[:-9])  # as after a disk's failure
    told(what, [2])
    assert asked[3:] == [[2]]


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("length", "rows"),
    [({"max_steps": 2}, 32), ({"max_steps": None, "epochs": 0.5}, 32), ({"max_steps": 5}, 54)],
)
def test_a_reference_is_computed_of_the_rows_that_the_steps_take(
    length: dict[str, Any], rows: int, grouped: bool, random_base: Path, pairs: Path, tmp_path: Path
) -> None:
    """Any other row has no reference, and would end the run."""
    steps = {"gradient_accumulation": 2, "eval_steps": None, "group_by_length": grouped}
    run_dir = RunDir(tmp_path / "run")
    train(of_pairs(random_base, pairs, run_dir.path, train={**SETTINGS, **steps, **length}))
    kept = json.loads(run_dir.reference.read_text())["rows"]["train_dataset"]
    assert len(kept) == rows
    assert [*map(int, kept)] == sorted({*map(int, kept)})


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
    kept = {name: [*rows.values()] for name, rows in stored["rows"].items()}
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


@pytest.fixture(scope="module")
def of_4_bits(
    random_base: Path, colours: Path, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunDir, Heard, Recipe]:
    """A LoRA of a 4-bit base that learned answers, and goes on to preferences."""
    folder, heard = tmp_path_factory.mktemp("4-bit"), Heard()
    lora, bits = {"method": "lora", "r": 4}, {"bits": 4}
    steps = {"max_steps": 6, "learning_rate": 0.01}
    start = recipe(random_base, colours, folder / "sft", train=steps, adapter=lora, model=bits)
    train(start)
    further = {**SETTINGS, "start_from": start.folder, "learning_rate": 1e-3}
    on = of_pairs(random_base, pairs, folder / "4-bit", train=further, adapter=lora, model=bits)
    train(on, reporter=heard)
    return RunDir(on.folder), heard, on


RUNS = ("finished", "by_simpo", "by_orpo", "by_kto", "of_4_bits")


@pytest.fixture(scope="module")
def in_two(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, RunDir]:
    """Each run of one process again, with half of a step's rows in each of two; one launch does all."""
    folder, found, jobs = tmp_path_factory.mktemp("two"), dict[str, RunDir](), []
    for name in RUNS:
        chosen = request.getfixturevalue(name)[2]
        halved = chosen.train.model_copy(update={"batch_size": 4})
        shared = chosen.model_copy(update={"train": halved, "out": str(folder / name)})
        seen = str(folder / f"seen-{name}")
        jobs.append({"recipe": shared.model_dump(), "port": free_port(), "seen": seen})
        found[name] = RunDir(folder / name)
    in_two_processes(jobs, folder / "jobs.json")
    return found


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_make_the_weights_of_one(
    name: str, in_two: dict[str, RunDir], request: pytest.FixtureRequest
) -> None:
    by_one, by_two = request.getfixturevalue(name)[0], in_two[name]
    one, two = adapter_of(by_one), adapter_of(by_two)
    far = max(float((one[k] - two[k]).abs().max() / one[k].abs().max()) for k in one)
    assert far < (0.05 if name == "of_4_bits" else 1e-3), far
    if name == "of_4_bits":
        return
    rows = [[row for row in run.read_metrics() if "loss" in row] for run in (by_one, by_two)]
    for figure in {"loss", "preference_accuracy", "margin", "kl"} & {*rows[0][0]}:
        said = [[row[figure] for row in of_run] for of_run in rows]
        assert said[1] == pytest.approx(said[0], rel=1e-3, abs=1e-5), figure


def test_a_lora_of_a_4_bit_base_goes_on_to_preferences_in_two_processes(
    of_4_bits: tuple[RunDir, Heard, Recipe], in_two: dict[str, RunDir]
) -> None:
    run_dir = of_4_bits[0]
    first = run_dir.read_metrics()[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-2)
    kept = [
        torch.tensor([*json.loads(run.reference.read_text())["rows"]["train_dataset"].values()])
        for run in (run_dir, in_two["of_4_bits"])
    ]
    assert len(kept[0]) == 54
    torch.testing.assert_close(kept[0], kept[1], rtol=2e-2, atol=2e-2)


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


def test_a_batch_of_blank_labelled_answers_alone_has_columns_and_no_loss() -> None:
    blank = {
        "input_ids": [7], "other_ids": [7], "labels": [MASKED], "other_labels": [MASKED], "desirable": True,
    }  # fmt: skip
    batch = LabelledCollator(7)([blank, blank])
    for name in ("input_ids", "KL_input_ids"):
        assert batch[name].tolist() == [[7, 7]] * 2
    assert not batch["completion_mask"].any() and not batch["KL_completion_mask"].any()


def test_a_batch_of_blank_pairs_alone_has_columns_and_no_loss() -> None:
    """TRL takes the last so many columns, of the tokens but one; the last none would be all of them."""
    blank = {"input_ids": [7], "other_ids": [7], "labels": [MASKED], "other_labels": [MASKED]}
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
    """Of DPO; the next test is of KTO."""
    arguments = dict(**ONE_STEP, output_dir=str(tmp_path / "run"), beta=0.3)
    tokenizer = AutoTokenizer.from_pretrained(random_base)
    texts = [
        {"prompt": f"Say it, {i}.", "chosen": " RED" * (1 + i), "rejected": " blue sea"}
        for i in range(6)
    ]
    plain = DPOTrainer(
        model=adapted(random_base),
        ref_model=AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32),
        args=DPOConfig(**arguments),
        train_dataset=Dataset.from_list(texts),
        processing_class=tokenizer,
    )
    rows = [
        {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "labels": [MASKED] * len(row["prompt_ids"]) + row["chosen_ids"],
            "other_ids": row["prompt_ids"] + row["rejected_ids"],
            "other_labels": [MASKED] * len(row["prompt_ids"]) + row["rejected_ids"],
            "row": i,
        }
        for i, row in enumerate(plain.train_dataset)
    ]
    run_dir = RunDir(tmp_path / "run")
    ours = SafeDPOTrainer(
        model=adapted(random_base),
        args=DPOConfig(**arguments, remove_unused_columns=False),
        **of_run(run_dir, random_base, rows),
    )
    check_same_step(plain, ours)


def test_the_step_of_kto_is_that_of_trl_with_the_base_as_an_explicit_reference(
    random_base: Path, tmp_path: Path
) -> None:
    arguments = dict(**ONE_STEP, output_dir=str(tmp_path / "run"), beta=0.3, undesirable_weight=1.7)
    texts = [
        {"prompt": f"Say it, {i}.", "completion": " RED" * (1 + i), "label": i % 3 > 0}
        for i in range(6)
    ]
    plain = KTOTrainer(
        model=adapted(random_base),
        ref_model=AutoModelForCausalLM.from_pretrained(random_base, dtype=torch.float32),
        args=KTOConfig(**arguments),
        train_dataset=Dataset.from_list(texts),
        processing_class=AutoTokenizer.from_pretrained(random_base),
    )
    rows = []
    for i, row in enumerate(plain.train_dataset):
        asked, columns = row["prompt_ids"], {"desirable": row["label"], "row": i}
        for name, labels, of_trl in (
            ("input_ids", "labels", "completion_ids"),
            ("other_ids", "other_labels", "KL_completion_ids"),
        ):
            columns[name] = asked + row[of_trl]
            columns[labels] = [MASKED] * len(asked) + row[of_trl]
        rows.append(columns)
    ours = SafeKTOTrainer(
        model=adapted(random_base),
        args=KTOConfig(**arguments, remove_unused_columns=False),
        **of_run(RunDir(tmp_path / "run"), random_base, rows),
    )
    check_same_step(plain, ours)
    (theirs,) = (row for row in plain.state.log_history if "rewards/margins" in row)
    (found,) = (row for row in ours.state.log_history if "labelled/margin" in row)
    for of_ours, of_trl in (
        ("train_loss", "train_loss"),
        ("labelled/kl", "kl"),
        ("labelled/margin", "rewards/margins"),
    ):
        assert found[of_ours] == pytest.approx(theirs[of_trl], rel=1e-3), of_ours
    assert found["labelled/kl"] > 0


def check_same_step(plain: Any, ours: Any) -> None:
    """Both trainers make the same step."""
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

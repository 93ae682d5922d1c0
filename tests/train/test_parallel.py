"""Two processes on the CPU, started by torchrun, give the result of one process with the same global batch."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prefixtune_cli.adapter_folder import check_fits
from prefixtune_cli.errors import UsageError
from prefixtune_cli.run_dir import RunDir, step_of
from prefixtune_cli.train import train
from tests.ports import free_port
from tests.train.test_run import recipe
from tests.train.two_ranks import in_two_processes

# With 56 rows and 6 a step, the tenth step of an epoch has 2 rows, so one process gets none of them.
ROWS, STEPS = 56, 14
ONE = {"max_steps": STEPS, "batch_size": 6, "log_steps": 1, "save_steps": 5, "learning_rate": 3e-3}
TWO = {**ONE, "batch_size": 3}
LORA = {"adapter": {"method": "lora"}}
BITS = {"model": {"bits": 4}}
JOBS: dict[str, dict[str, Any]] = {
    "ddp": {"train": TWO},
    "fsdp": {"train": {**TWO, "parallel": "fsdp"}},
    "lora-ddp": {"train": TWO, **LORA},
    "lora-fsdp": {"train": {**TWO, "parallel": "fsdp"}, **LORA},
    "accumulated": {"train": {**TWO, "batch_size": 1, "gradient_accumulation": 3}},
    "4-bit-ddp": {"train": TWO, **BITS},
    "4-bit-fsdp": {"train": {**TWO, "parallel": "fsdp"}, **BITS},
    "checkpointing": {"train": {**TWO, "parallel": "fsdp", "gradient_checkpointing": True}},
    "evaluated-ddp": {"train": {**TWO, "eval_steps": 4}},
    "evaluated-fsdp": {"train": {**TWO, "eval_steps": 4, "parallel": "fsdp"}},
    "packed": {"train": {**TWO, "packing": True}},
    "often": {"train": {**TWO, "save_steps": 4}},
    "continued": {"train": {**TWO, "save_steps": 4}},
    "signalled-ddp": {"train": TWO},
    "signalled-fsdp": {"train": {**TWO, "parallel": "fsdp"}},
    "small": {"train": {**TWO, "batch_size": 2, "gradient_accumulation": 2}},
    "halved-ddp": {"train": {**TWO, "batch_size": 4, "auto_batch": True}},
    "halved-fsdp": {"train": {**TWO, "batch_size": 4, "auto_batch": True, "parallel": "fsdp"}},
}
# In DDP, one process alone may run out of memory; if sharded, all do together.
BESIDES: dict[str, dict[str, Any]] = {
    "continued": {"continue": "often"},
    "signalled-ddp": {"signalled": 1},
    "signalled-fsdp": {"signalled": 1},
    "halved-ddp": {"fits": 2, "poor": [1]},
    "halved-fsdp": {"fits": 2, "poor": [0, 1]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def one(random_base: Path, colours: Path, folder: Path) -> dict[str, RunDir]:
    """The result of one process with the same rows a step."""
    recipes = {
        "ddp": recipe(random_base, colours, folder / "one", train=ONE),
        "lora-ddp": recipe(random_base, colours, folder / "one-lora", train=ONE, **LORA),
        "packed": recipe(
            random_base, colours, folder / "one-packed", train={**ONE, "packing": True}
        ),
        "evaluated-ddp": recipe(
            random_base, colours, folder / "one-evaluated", train={**ONE, "eval_steps": 4}
        ),
    }
    for chosen in recipes.values():
        train(chosen)
    return {name: RunDir(chosen.folder) for name, chosen in recipes.items()}


@pytest.fixture(scope="module")
def two(random_base: Path, colours: Path, folder: Path) -> dict[str, RunDir]:
    """The runs of JOBS, each by two processes."""
    recipes = {
        name: recipe(random_base, colours, folder / name, **changes)
        for name, changes in JOBS.items()
    }
    jobs = [
        {
            "recipe": chosen.model_dump(),
            "port": free_port(),
            "seen": str(folder / f"seen-{name}"),
            **BESIDES.get(name, {}),
        }
        for name, chosen in recipes.items()
    ]
    for job in jobs:
        if "continue" in job:
            job["continue"] = recipes[job["continue"]].folder
    in_two_processes(jobs, folder / "jobs.json")
    return {name: RunDir(chosen.folder) for name, chosen in recipes.items()}


def adapter(run: RunDir) -> dict[str, torch.Tensor]:
    (file,) = run.adapter.glob("*.safetensors")
    return load_file(file)


def distance(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of two weights, relative to the largest weight of their tensor."""
    assert one.keys() == other.keys()
    return max(float((one[k] - other[k]).abs().max() / one[k].abs().max()) for k in one)


def seen(run: RunDir) -> list[dict[str, Any]]:
    files = [run.path.parent / f"seen-{run.path.name}-{rank}.json" for rank in (0, 1)]
    return [json.loads(file.read_text()) for file in files]


@pytest.mark.parametrize("how", ["ddp", "fsdp", "accumulated", "checkpointing"])
def test_two_processes_give_the_adapter_of_one(
    how: str, one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    assert 0 < distance(adapter(one["ddp"]), adapter(two[how])) < 1e-4


@pytest.mark.parametrize("how", ["signalled-ddp", "signalled-fsdp"])
def test_a_signal_to_one_process_ends_the_pass_for_the_basis_in_both(
    how: str, two: dict[str, RunDir]
) -> None:
    for told in (process["told"] for process in seen(two[how])):
        assert "Stopped by SIGTERM at step 0 of 14; nothing is lost" in told
    assert not two[how].checkpoints()
    assert not two[how].finished


@pytest.mark.parametrize("how", ["lora-ddp", "lora-fsdp"])
def test_two_processes_give_the_lora_of_one(
    how: str, one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    assert 0 < distance(adapter(one["lora-ddp"]), adapter(two[how])) < 1e-3


@pytest.mark.parametrize("how", ["evaluated-ddp", "evaluated-fsdp"])
def test_evaluations_on_the_way_are_those_of_one_process_and_change_nothing(
    how: str, one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    assert distance(adapter(two["ddp"]), adapter(two[how])) < 1e-6
    losses = [
        [row["eval_loss"] for row in run.read_metrics() if "eval_loss" in row]
        for run in (one["evaluated-ddp"], two[how])
    ]
    assert len(losses[0]) == 4  # at 4, 8, 12 and the end
    assert losses[1] == pytest.approx(losses[0], rel=1e-2)


def test_packed_rows_give_the_adapter_of_one_process(
    one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    assert distance(adapter(one["packed"]), adapter(two["packed"])) < 1e-4
    assert distance(adapter(one["packed"]), adapter(one["ddp"])) > 1e-2


def test_two_processes_go_on_in_the_second_epoch_to_the_same_bytes(two: dict[str, RunDir]) -> None:
    whole, continued = two["often"], two["continued"]
    assert [step_of(checkpoint) for checkpoint in whole.checkpoints()] == [8, 12, STEPS]
    assert len(seen(continued)[0]["rows"]) == STEPS - 12
    assert distance(adapter(whole), adapter(continued)) == 0
    assert [row["loss"] for row in continued.read_metrics()] == pytest.approx(
        [row["loss"] for row in whole.read_metrics()], abs=0
    )


@pytest.mark.parametrize("how", ["halved-ddp", "halved-fsdp"])
def test_auto_batch_halves_the_batch_of_all_processes_also_in_the_middle_of_a_backward_pass(
    how: str, two: dict[str, RunDir]
) -> None:
    assert distance(adapter(two["small"]), adapter(two[how])) < 1e-6
    assert max(len(batch) for rank in seen(two[how]) for batch in rank["rows"]) == 2


@pytest.mark.parametrize("how", ["fsdp", "4-bit-fsdp", "halved-fsdp"])
def test_sharded_weights_are_given_back_after_every_step(how: str, two: dict[str, RunDir]) -> None:
    for rank in seen(two[how]):
        assert set(rank["whole"]) == {0}
    assert min(seen(two["ddp"])[0]["whole"]) > 0


def test_sharding_a_4_bit_base_changes_no_bit(two: dict[str, RunDir]) -> None:
    assert distance(adapter(two["4-bit-ddp"]), adapter(two["4-bit-fsdp"])) == 0


@pytest.mark.parametrize("how", ["ddp", "fsdp", "accumulated"])
def test_the_logged_loss_and_gradient_norm_are_those_of_the_global_batch(
    how: str, one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    alone, together = one["ddp"].read_metrics(), two[how].read_metrics()
    assert [row["step"] for row in together] == list(range(1, STEPS + 1))
    for name in ("loss", "grad_norm", "learning_rate"):
        expected = [row[name] for row in alone]
        assert [row[name] for row in together] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_each_row_is_seen_once_an_epoch_also_where_the_last_batch_is_uneven(
    how: str, two: dict[str, RunDir]
) -> None:
    first, second = (found["rows"] for found in seen(two[how]))
    # The trial is not a training step, so it adds no batch here.
    assert len(first) == len(second) == STEPS
    epoch = [row for batch in first[:10] + second[:10] for row in batch]
    assert sorted(row for row in epoch if row >= 0) == sorted(set(epoch) - {-1})
    assert len(set(epoch) - {-1}) == ROWS
    assert [sum(row >= 0 for row in pair[0] + pair[1]) for pair in zip(first, second, strict=True)][
        :10
    ] == [6] * 9 + [2]


def test_rows_are_tokenized_once_and_before_the_process_group_exists(
    two: dict[str, RunDir],
) -> None:
    first, second = (found["tokenized"] for found in seen(two["ddp"]))
    assert first == [False, False]  # the training rows, and the held-out rows
    assert second == []


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_only_the_first_process_writes(how: str, two: dict[str, RunDir]) -> None:
    first, second = (found["written"] for found in seen(two[how]))
    assert any("adapter" in line for line in first)
    assert second == []


@pytest.mark.parametrize("how", ["ddp", "fsdp", "lora-fsdp", "4-bit-fsdp"])
def test_checkpoints_and_the_result_are_plain_peft_adapters(
    how: str, random_base: Path, two: dict[str, RunDir]
) -> None:
    from prefixtune_cli.recipe.schema import ModelSection

    for folder in (two[how].adapter, two[how].checkpoint(STEPS)):
        check_fits(ModelSection(name=str(random_base)), folder)
    last = load_file(two[how].checkpoint(STEPS) / "adapter_model.safetensors")
    assert distance(adapter(two[how]), last) == 0
    states = sorted(path.name for path in two[how].checkpoint(STEPS).glob("rng_state*"))
    assert states == ["rng_state_0.pth", "rng_state_1.pth"]


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_the_scores_are_those_of_all_held_out_rows(
    how: str, one: dict[str, RunDir], two: dict[str, RunDir]
) -> None:
    alone, together = (json.loads(run.summary.read_text()) for run in (one["ddp"], two[how]))
    assert together["held_out_rows"] == alone["held_out_rows"] == 8
    for who in ("base", "adapter"):
        assert together[who]["loss"] == pytest.approx(alone[who]["loss"], rel=1e-4)
        assert together[who]["exact_match"] == alone[who]["exact_match"]
    assert len(two[how].answers.read_text().splitlines()) == 8
    for name in ("trainable_parameters", "total_parameters"):
        assert together[name] == alone[name]


def test_the_number_of_processes_is_part_of_the_environment(two: dict[str, RunDir]) -> None:
    assert json.loads(two["ddp"].environment.read_text())["processes"] == 2


def test_a_run_for_two_processes_is_not_trained_by_one(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    two = {"gpus": 2}
    chosen = recipe(random_base, colours, tmp_path / "run", train=two, model={"device": "cpu"})
    with pytest.raises(UsageError, match=r"asks for 2 processes on this machine, but 1 were"):
        train(chosen)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"train": {"parallel": "fsdp"}}, "train.parallel fsdp spreads a model over several"),
        ({"train": {"parallel": "deepspeed-zero3"}}, "train.parallel deepspeed-zero3 spreads"),
    ],
)
def test_sharding_needs_several_processes(
    changes: dict[str, Any], said: str, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        train(recipe(random_base, colours, tmp_path / "run", **changes))


def trained_by_ptp(base: Path, data: Path, out: Path, *flags: object) -> dict[str, torch.Tensor]:
    """The adapter that `ptp train` makes in its own processes."""
    typed = ["train", "--model", base, "--data", data, "--out", out, "--steps", STEPS]
    typed += ["--max-length", 64, "--eval-split", 0.125, "--learning-rate", 3e-3, *flags]
    done = subprocess.run(
        [sys.executable, "-m", "prefixtune_cli", *map(str, typed)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return adapter(RunDir(out))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["deepspeed-zero2", "deepspeed-zero3"])
def test_deepspeed_gives_the_adapter_of_one_process(
    how: str, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed", reason="pip install 'prefixtune-cli[deepspeed]'")
    on_cpu = ["--device", "cpu", "--bits", 32]
    one = trained_by_ptp(random_base, colours, tmp_path / "one", *on_cpu, "--batch-size", 6)
    flags = [*on_cpu, "--batch-size", 3, "--gpus", 2, "--parallel", how]
    two = trained_by_ptp(random_base, colours, tmp_path / "two", *flags)
    assert distance(one, two) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [32, 4])
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_gpus_give_the_adapter_of_one(
    how: str, bits: int, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    precision = ["--bits", bits, "--gpus"]
    one = trained_by_ptp(random_base, colours, tmp_path / "one", *precision, 1, "--batch-size", 6)
    flags = [*precision, 2, "--batch-size", 3, "--parallel", how]
    two = trained_by_ptp(random_base, colours, tmp_path / "two", *flags)
    assert distance(one, two) < (1e-2 if bits == 32 else 0.3)  # TF32, bfloat16

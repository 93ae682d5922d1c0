"""`ptp plan` on the command line: the table, the verdict, JSON, and one clear error for each kind of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from prefixtune_cli.plan import MOST_ROWS
from tests.cli.conftest import Ptp

METHODS = ["prefix-tuning-plus", "lora", "prefix-tuning", "full"]
CONFIG = {
    "model_type": "llama",
    "vocab_size": 2048,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder with only a config.json."""
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def cells(printed: str, row: str) -> list[str]:
    line = next(line for line in printed.splitlines() if line.startswith(row + "  "))
    return line.removeprefix(row).split()


def test_a_pair_of_answers_takes_two_rows_and_pairs_go_without_full(ptp: Ptp, bare: Path) -> None:
    typed = ["plan", "--model", bare, "--gpu-memory", 1.2, "--max-length", 64, "--batch-size"]
    code, printed, said = ptp(*typed, 3, "--objective", "dpo")
    assert code == 0, said
    assert "with 3 pairs of answers, each two rows of 64 tokens" in " ".join(printed.split())
    head = next(line for line in printed.splitlines() if "lora" in line)
    assert head.split() == [method for method in METHODS if method != "full"]
    [largest] = re.findall(r"The largest batch is (\d+) pairs\.", printed)
    _, of_rows, _ = ptp(*typed, 6)
    assert cells(of_rows, "total")[: len(head.split())] == cells(printed, "total")
    [rows] = re.findall(r"The largest batch is (\d+) rows\.", of_rows)
    assert int(largest) == int(rows) // 2


def test_the_table_has_a_column_a_method_whose_parts_add_up(ptp: Ptp, bare: Path) -> None:
    code, printed, said = ptp("plan", "--model", bare, "--gpu-memory", 24, "--max-length", 64)
    assert code == 0, said
    head = next(line for line in printed.splitlines() if "lora" in line)
    assert head.split() == METHODS
    parts = ("base weights", "adapter", "optimizer", "activations", "logits", "framework reserve")
    for column, total in enumerate(cells(printed, "total")):
        found = [float(cells(printed, part)[column]) for part in parts]
        assert sum(found) == pytest.approx(float(total), abs=0.05)
    assert cells(printed, "total with checkpointing")[METHODS.index("prefix-tuning")] == "-"
    assert "fits a GPU of 24.00 GiB" in printed
    assert "Traceback" not in said


def test_json_has_the_bytes_of_every_method(ptp: Ptp, bare: Path) -> None:
    code, printed, said = ptp("plan", "--model", bare, "--gpu-memory", 2, "--json")
    assert code == 0, said
    found = json.loads(printed)
    assert [plan["method"] for plan in found["plans"]] == METHODS
    for plan_ in found["plans"]:
        assert plan_["total_bytes"] == sum(plan_["bytes"].values())
        assert plan_["fits"] is (plan_["total_bytes"] <= found["available_bytes"])
        assert 0 <= plan_["largest_batch"] <= MOST_ROWS
        assert plan_["fits"] is (plan_["largest_batch"] >= found["batch_size"])
    assert found["available_bytes"] == 2 * 2**30


def test_where_it_does_not_fit_the_flags_to_change_are_named(ptp: Ptp, bare: Path) -> None:
    code, printed, said = ptp("plan", "--model", bare, "--max-length", 512, "--gpu-memory", 1.2)
    assert code == 0, said
    assert "prefix-tuning-plus does not fit a GPU of 1.20 GiB" in printed
    advice = [line.strip() for line in printed.splitlines() if line.startswith("  --")]
    assert advice[0].startswith("--batch-size 4 --gradient-accumulation 2   ")
    assert advice[0].endswith("GiB, fits")
    assert "does not fit yet" in advice[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_plans_for_the_cpu(ptp: Ptp, bare: Path) -> None:
    code, printed, said = ptp("plan", "--model", bare, "--max-length", 64, "--batch-size", 1)
    assert code == 0, said
    assert "No GPU is named, and none is here: this is for a CPU" in printed
    assert "--gpu-memory GIB" in printed
    assert "framework reserve" not in printed
    assert "largest batch" not in printed


def test_a_known_hub_model_is_planned_offline_and_an_unknown_one_is_an_error(ptp: Ptp) -> None:
    typed = ["plan", "--max-length", 64, "--batch-size", 1, "--json"]
    code, printed, said = ptp(*typed, "--model", "smollm2-135m")
    assert code == 0, said
    weights = json.loads(printed)["plans"][0]["bytes"]["weights"]
    assert weights == pytest.approx(2 * 134.5e6, rel=0.01)
    code, printed, said = ptp(*typed, "--model", "some-org/some-model")
    assert (code, printed) == (1, "")
    assert said.count("error: ") == 1
    assert "some-org/some-model is not known here" in said


def test_a_method_that_the_base_does_not_go_with_is_left_out_with_its_reason(
    ptp: Ptp, bare: Path
) -> None:
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (bare / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": stored}))
    typed = ["plan", "--model", bare, "--max-length", 64, "--batch-size", 1]
    code, printed, said = ptp(*typed)
    assert code == 0, said
    assert "full" not in next(line for line in printed.splitlines() if "lora" in line).split()
    assert "Without full: " in said
    code, printed, said = ptp(*typed, "--method", "full")
    assert (code, printed) == (1, "")
    assert "method full cannot train it" in said


def test_memory_of_nothing_is_a_usage_error(ptp: Ptp, bare: Path) -> None:
    code, _, said = ptp("plan", "--model", bare, "--gpu-memory", 0)
    assert code == 2
    assert "--gpu-memory must be above 0" in said

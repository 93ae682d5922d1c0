"""`ptp merge-info` on the command line: its output for a run, a folder and several, and each kind of bad input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import Ptp
from tests.merge_info.conftest import MEMORY, WEIGHTS, Make, change, lora, make, memory, prefix

__all__ = ["make"]  # the fixture


@pytest.fixture
def run(make: Make, random_base: Path, tmp_path: Path) -> Path:
    """A finished run, as `ptp train` leaves it."""
    folder = make("runs/mine/adapter", memory(feature_map="gelu")).parent
    (folder / "recipe.yaml").write_text(
        f"model: {{name: {random_base}, bits: 32}}\ndata: {{train: my.jsonl, max_length: 77}}\n"
        "train: {max_steps: 9, learning_rate: 0.03, batch_size: 7, seed: 5}\n"
    )
    data = {"train": {"source": "my.jsonl", "rows": 123, "sha256": "ab" * 32}}
    start = {"folder": "runs/first/adapter", "sha256": "cd" * 32}
    (folder / "environment.json").write_text(json.dumps({"data": data, "start": start}))
    summary = {"base": {"loss": 3.5}, "adapter": {"loss": 1.25}}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def told(printed: str, label: str) -> str:
    line = next(line for line in printed.splitlines() if line.startswith(label + "  "))
    return line.removeprefix(label).strip()


def test_of_a_run_it_tells_base_data_recipe_cost_and_what_was_learned(
    ptp: Ptp, run: Path, random_base: Path
) -> None:
    code, printed, said = ptp("merge-info", run)
    assert code == 0, said
    assert told(printed, "base").startswith(f"{random_base} (")
    assert told(printed, "method") == "prefix-tuning-plus"
    assert told(printed, "feature_map") == "gelu"
    assert told(printed, "layers") == "0–1 (2)"
    assert told(printed, "heads at attention") == "4"
    assert told(printed, "parameters").startswith("2,048 (")
    assert (
        told(printed, "on disk") == f"{(run / 'adapter' / WEIGHTS).stat().st_size:,} bytes, float32"
    )
    assert told(printed, "data") == "my.jsonl, 123 rows, sha256 abababababababab…"
    assert told(printed, "went on from") == "runs/first/adapter, sha256 cdcdcdcdcdcdcdcd…"
    assert told(printed, "recipe").startswith("9 steps, learning rate 0.03 (cosine), 7 rows a step")
    assert told(printed, "result") == "held-out loss 3.5000 → 1.2500"
    assert told(printed, "folds into the base") == "no"
    assert "φ is not linear" in printed
    assert told(printed, "FLOPs a token").startswith("4,224 (")
    assert told(printed, "FLOPs a token").endswith("% of the base's)")
    assert told(printed, "KV-cache bytes a sequence") == "0"
    assert told(printed, "integrity") == "sound (values, keys and shapes)"
    assert "Layers that hold 90 % of the squared norm: 0–1 (2 of 2)" in printed
    assert "Heads that could be dropped (the smallest heads that hold under 1 %" in printed
    assert f"Written: {run / 'merge-info' / 'heat-map.png'}" in said
    assert (run / "merge-info" / "heat-map.png").stat().st_size > 5000


def test_the_adapter_folder_of_a_run_is_known_as_the_runs(ptp: Ptp, run: Path) -> None:
    code, printed, said = ptp("merge-info", run / "adapter", "--json")
    assert code == 0, said
    (found,) = json.loads(printed)["adapters"]
    assert found["run"] == str(run)
    assert found["data"]["train"]["rows"] == 123
    assert found["recipe"]["train"]["learning_rate"] == 0.03


def test_json_has_the_spectrum_of_every_head_and_the_base_needs_no_weights(
    ptp: Ptp, run: Path, random_base: Path, tmp_path: Path
) -> None:
    out, bare = tmp_path / "pictures", tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text((random_base / "config.json").read_text())
    code, printed, said = ptp("merge-info", run, "--model", bare, "--json", "--out", out)
    assert code == 0, said
    found = json.loads(printed)
    assert found["written"] == [str(out / "heat-map.png")]
    assert found["pairs"] == []
    cells = found["adapters"][0]["learned"]["cells"]
    assert [(cell["layer"], cell["head"]) for cell in cells] == [
        (n, h) for n in (0, 1) for h in range(4)
    ]
    for cell in cells:
        assert sum(value**2 for value in cell["spectrum"]) == pytest.approx(
            cell["norm"] ** 2, rel=1e-4
        )
    assert not (run / "merge-info").exists()


def test_of_a_lora_it_tells_into_which_modules_it_folds(
    ptp: Ptp, make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed, said = ptp(
        "merge-info", make("mine", lora(target_modules=["q_proj", "up_proj"]))
    )
    assert code == 0, said
    assert told(printed, "folds into the base") == "yes: q_proj × 2, up_proj × 2"
    assert told(printed, "FLOPs a token").endswith(", until it is folded")
    head = next(line for line in printed.splitlines() if line.startswith("layer "))
    assert head.split()[:5] == ["layer", "of", "all", "q_proj", "up_proj"]
    assert "Modules that could be dropped" in printed
    assert (tmp_path / "merge-info-mine" / "heat-map.png").exists()


def test_of_a_prefix_it_tells_the_kv_cache_and_draws_nothing(ptp: Ptp, make: Make) -> None:
    code, printed, said = ptp("merge-info", make("mine", prefix(3)))
    assert code == 0, said
    assert told(printed, "KV-cache bytes a sequence") == "768, as 3 tokens more"
    assert "What it has learned" not in printed
    assert "Written" not in said


def test_two_are_held_against_each_other(ptp: Ptp, make: Make, tmp_path: Path) -> None:
    a, b = make("a", memory()), make("b", memory(), seed=1)
    code, printed, said = ptp("merge-info", a, b, "--out", tmp_path / "pictures")
    assert code == 0, said
    assert printed.splitlines()[0].split() == ["adapter", "a", "b"]
    assert "They can be merged" in printed
    assert "near orthogonal" in printed
    rows = [
        line.split() for line in printed.splitlines() if line.split()[:1] in (["0"], ["1"], ["all"])
    ]
    assert [len(row) for row in rows] == [4, 4, 4]
    assert "Rule of thumb" in said
    assert {path.parent.name for path in (tmp_path / "pictures").rglob("*.png")} == {"a", "b"}


def test_what_keeps_two_from_being_merged_is_named(ptp: Ptp, make: Make, tmp_path: Path) -> None:
    typed = ["merge-info", make("a", memory()), make("b", lora()), "--out", tmp_path / "pictures"]
    code, printed, said = ptp(*typed)
    assert code == 0, said
    assert "They cannot be merged: method: prefix-tuning-plus against lora." in printed
    code, printed, _ = ptp(*typed, "--json")
    (pair,) = json.loads(printed)["pairs"]
    assert pair["can_be_merged"] is False
    assert pair["difference"]["what"] == "method"


def test_a_damaged_adapter_is_told_and_is_exit_code_1(ptp: Ptp, run: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[MEMORY.format(0, "self_attn", "M")][0, 0, 0] = float("nan")
        del tensors[MEMORY.format(1, "self_attn", "M")]

    change(run / "adapter", spoil)
    code, printed, said = ptp("merge-info", run)
    assert code == 1
    assert told(printed, "integrity") == "2 findings, below"
    assert "1 of 1024 values are NaN" in said
    assert "layers.1.self_attn.prefix_tuning_plus_memory.M is missing" in said
    code, printed, _ = ptp("merge-info", run, "--json")
    assert code == 1
    assert {found["kind"] for found in json.loads(printed)["adapters"][0]["findings"]} == {
        "nan",
        "missing",
    }


def test_a_base_that_is_not_here_is_said_and_can_be_named(
    ptp: Ptp, make: Make, random_base: Path, tmp_path: Path
) -> None:
    folder = make("plus", memory())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": "some-org/gone"})
    )
    typed = ["merge-info", folder, "--out", tmp_path / "pictures"]
    code, printed, said = ptp(*typed)
    assert code == 0
    assert "some-org/gone" in said
    assert told(printed, "integrity") == "sound (values)"
    assert told(printed, "FLOPs a token") == "4,224"
    code, printed, said = ptp(*typed, "--model", random_base)
    assert code == 0, said
    assert told(printed, "integrity") == "sound (values, keys and shapes)"


@pytest.mark.parametrize(
    ("typed", "code", "message"),
    [
        (["nowhere"], 1, "There is no run or adapter nowhere"),
        ([".", "--rows", 0], 2, "--rows must be above 0"),
        ([], 2, "There is no finished run below runs/"),
    ],
    ids=["no-folder", "rows", "nothing"],
)
def test_bad_input_is_one_clear_error(
    ptp: Ptp,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    typed: list[object],
    code: int,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    found, printed, said = ptp("merge-info", *typed)
    assert (found, printed) == (code, "")
    assert message in said
    assert "Traceback" not in said


def test_a_truncated_file_is_one_clear_error(ptp: Ptp, run: Path) -> None:
    weights = run / "adapter" / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:500])
    code, printed, said = ptp("merge-info", run)
    assert (code, printed) == (1, "")
    assert said.count("error: ") == 1
    assert "cannot be read" in said


def test_pictures_that_cannot_be_written_ask_for_another_folder(ptp: Ptp, run: Path) -> None:
    (run / "merge-info").write_text("a file in the way")
    code, _, said = ptp("merge-info", run)
    assert code == 1
    assert "--out" in said


def test_data_needs_a_base(ptp: Ptp, make: Make) -> None:
    folder = make("plus", memory())
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": None})
    )
    code, _, said = ptp("merge-info", folder, "--data", "sample:intents-test", "--out", folder)
    assert code == 2
    assert "Type --model NAME with it" in said

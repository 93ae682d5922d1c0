"""PEFT's methods on the command line: they train, plan, generate and evaluate, or give one clear error."""

import json
from pathlib import Path

import pytest

from prefixtune_cli.recipe.load import resolve
from tests.cli.conftest import Ptp


@pytest.fixture
def few(tmp_path: Path) -> Path:
    file = tmp_path / "few.jsonl"
    rows = [{"prompt": f"Say red, number {i}.", "completion": "RED"} for i in range(8)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize(
    ("method", "bits", "settings", "kept"),
    [
        ("ia3", 4, {}, {}),
        ("ia3", 16, {}, {}),
        ("prompt_tuning", 16, {"num_virtual_tokens": 3}, {"num_virtual_tokens": 3}),
        ("lora", 16, {"use_dora": "true"}, {"use_dora": True}),
    ],
)
def test_a_method_of_pefts_is_trained_asked_and_evaluated(
    method: str,
    bits: int,
    settings: dict[str, object],
    kept: dict[str, object],
    ptp: Ptp,
    random_base: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    sets = [part for k, v in settings.items() for part in ("--set", f"adapter.config.{k}={v}")]
    typed = ["--model", random_base, "--data", few, "--bits", bits, "--out", out, "--steps", 1]
    code, printed, said = ptp("train", "--method", method, *typed, *sets, "--max-length", 64)
    assert code == 0, said
    assert "in 1 steps" in printed
    adapter = resolve(str(out / "recipe.yaml")).adapter
    assert adapter.method == method.replace("_", "-")
    assert adapter.config == kept  # type: ignore[union-attr]
    written = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert {key: written[key] for key in kept} == kept
    asked = ["--run", out, "--prompt", "Say red.", "--max-new-tokens", 2]
    code, _, said = ptp("generate", *asked)
    assert code == 0, said
    code, printed, said = ptp("eval", "--run", out, "--data", few, "--json")
    assert code == 0, said


def test_a_method_of_pefts_is_planned_beside_the_four(ptp: Ptp, random_base: Path) -> None:
    code, printed, said = ptp("plan", "--model", random_base, "--method", "ia3", "--json")
    assert code == 0, said
    found = json.loads(printed)
    assert found["method"] == "ia3"
    plans = {plan["method"]: plan for plan in found["plans"]}
    assert next(iter(plans)) == "ia3"
    assert 0 < plans["ia3"]["bytes"]["adapter"] < plans["lora"]["bytes"]["adapter"]


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (["--method", "adamsz"], "There is no method adamsz. Did you mean adamss?"),
        (["--method", "xlora"], "Method xlora cannot be trained by ptp: it mixes adapters"),
        (["--method", "loha", "--bits", 4], "Method loha computes with the base's weights"),
        (["--method", "vera", "--lora-r", 4], "adapter.r is not a setting. Settings of peft's m"),
        (["--method", "ia3", "--set", "adapter.config.x=1"], "adapter.config.x is not a setting"),
    ],
)
@pytest.mark.parametrize("command", ["train", "plan"])
def test_an_unknown_method_or_setting_is_one_line_and_nothing_is_loaded(
    command: str,
    typed: list[object],
    told: str,
    ptp: Ptp,
    random_base: Path,
    few: Path,
    tmp_path: Path,
) -> None:
    data = ["--data", few, "--out", tmp_path / "run"] if command == "train" else []
    code, printed, said = ptp(command, "--model", random_base, *data, *typed)
    assert code == (1 if "--bits" in typed else 2)  # 1: not on this base; 2: no such setting
    assert told in " ".join(said.split())
    assert "Traceback" not in said
    assert "Loading" not in said
    assert printed == ""
    assert not (tmp_path / "run").exists()

"""`ptp merge`: its arguments, its output, and what it refuses before anything loads."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM

from prefixtune_cli.adapter import PrefixTuningPlusConfig

from .conftest import Ptp


def save(base: Path, folder: Path, config: PeftConfig) -> Path:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture
def pair(random_base: Path, tmp_path: Path) -> list[Path]:
    config = PrefixTuningPlusConfig(task_type="CAUSAL_LM", init_weights=False)
    return [save(random_base, tmp_path / name, config) for name in "ab"]


def test_two_adapters_become_one_that_answers(ptp: Ptp, pair, random_base, tmp_path):
    code, out, _ = ptp("merge", *pair, "--weights", "-0.3,0.7", "--out", tmp_path / "c")
    assert code == 0
    record = json.loads((tmp_path / "c" / "merge.json").read_text())
    assert (record["method"], record["weights"]) == ("linear", [-0.3, 0.7])
    written, following = out.splitlines()
    assert re.fullmatch(rf"adapter written to {tmp_path / 'c'} \(0\.0 MiB\)", written)
    expected = f'next: ptp generate --model {random_base} --adapter {tmp_path / "c"} --prompt "…"'
    assert following == expected
    typed = following.removeprefix("next: ptp ").replace('"…"', "hello").split()
    assert ptp(*typed, "--max-new-tokens", 2, "--device", "cpu")[0] == 0


def test_ties_with_its_settings_as_json(ptp: Ptp, pair, tmp_path):
    settings = ("--method", "ties", "--density", "0.5", "--json")
    code, out, _ = ptp("merge", *pair, *settings, "--out", tmp_path / "c")
    found = json.loads(out)
    assert code == 0
    assert (found["method"], found["density"]) == ("ties", 0.5)
    assert found["folder"] == str(tmp_path / "c")
    assert [source["folder"] for source in found["sources"]] == list(map(str, pair))


def test_a_lora_is_folded_and_the_model_answers(ptp: Ptp, random_base, tmp_path):
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    adapter = save(random_base, tmp_path / "lora", config)
    code, out, _ = ptp("merge", adapter, "--into-base", "--out", tmp_path / "m")
    assert code == 0
    assert out.startswith(f"model written to {tmp_path / 'm'} (")
    assert out.splitlines()[1] == f'next: ptp generate --model {tmp_path / "m"} --prompt "…"'
    answering = ("--prompt", "hello", "--max-new-tokens", 2, "--device", "cpu")
    assert ptp("generate", "--model", tmp_path / "m", *answering)[0] == 0


def test_folding_prefix_tuning_plus_names_the_other_way(ptp: Ptp, pair, tmp_path):
    code, out, error = ptp("merge", pair[0], "--into-base", "--out", tmp_path / "m")
    assert (code, out) == (1, "")
    assert "no weight matrix gives φ(q)ᵀM" in error
    assert "`ptp export`" in error
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (("--weights", "0.7,much"), "separated by commas, as in 0.7,0.3, got 'much'"),
        (("--weights", "0.7"), "each of the 2 adapters, got 1"),
        (("--method", "mean"), "--method must be one of linear, task-arithmetic, ties, dare"),
        (("--density", "0.5"), "--density belongs to --method ties and dare"),
        (("--into-base",), "--into-base takes one adapter, got 2"),
    ],
)
def test_what_cannot_be_meant_is_a_usage_error(ptp: Ptp, pair, tmp_path, typed, said):
    code, out, error = ptp("merge", *pair, *typed, "--out", tmp_path / "c")
    assert (code, out) == (2, "")
    assert said in error
    assert not (tmp_path / "c").exists()


def test_flags_of_a_merge_do_not_go_with_into_base(ptp: Ptp, pair, tmp_path):
    code, _, error = ptp(
        "merge", pair[0], "--into-base", "--method", "ties", "--out", tmp_path / "c"
    )
    assert code == 2
    assert "--method belongs to a merge of several adapters" in error


def test_one_adapter_alone_is_told_of_into_base(ptp: Ptp, pair, tmp_path):
    code, _, error = ptp("merge", pair[0], "--out", tmp_path / "c")
    assert code == 2
    assert "needs two adapters or more, got 1" in error


def test_a_base_that_has_moved_is_given_its_new_place(ptp: Ptp, random_base, tmp_path):
    base, moved = tmp_path / "base", tmp_path / "new place"
    shutil.copytree(random_base, base)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    pair = [save(base, tmp_path / name, config) for name in "ab"]
    base.rename(moved)
    for typed in (
        ("merge", *pair, "--out", tmp_path / "c"),
        ("merge", pair[0], "--into-base", "--out", tmp_path / "c"),
        ("generate", "--adapter", pair[0], "--prompt", "hello"),
        ("chat", "--adapter", pair[0]),
        ("eval", "--adapter", pair[0], "--bench", "quickstart"),
    ):
        code, _, said = ptp(*typed)
        assert code == 1
        assert "if it has moved, give its new place with --model" in said
    code, out, _ = ptp("merge", *pair, "--model", moved, "--out", tmp_path / "c")
    assert code == 0
    assert shlex.split(out.splitlines()[1])[1:5] == ["ptp", "generate", "--model", str(moved)]
    named = json.loads((tmp_path / "c" / "adapter_config.json").read_text())
    assert named["base_model_name_or_path"] == str(moved)
    folded = ("merge", pair[0], "--into-base", "--model", moved, "--out", tmp_path / "m")
    assert ptp(*folded)[0] == 0

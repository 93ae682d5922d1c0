"""Flags under the names that people know from TRL, LLaMA-Factory and Axolotl."""

from pathlib import Path

import pytest

from prefixtune_cli.cli import arguments
from tests.cli.conftest import Ptp


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (["--output-dir", "x"], "--output-dir is --out here."),
        (["--output_dir=x"], "--output_dir is --out here."),
        (["--model-name-or-path", "tiny"], "--model-name-or-path is --model here."),
        (["--per-device-train-batch-size", "4"], "--per-device-train-batch-size is --batch-size here."),
        (["--load-in-4bit"], "--load-in-4bit is --bits 4 here, if it is true"),
        (["--report-to", "wandb"], "--report-to is --track here."),
        (["--config", "a.yaml"], "--config is --recipe here."),
        (["--bf16"], "--bf16 is --bits 16 here, which is bfloat16, and the default."),
        (["--logging-steps", "1"], "--logging-steps is --set train.log_steps=VALUE here."),
        (["--save-total-limit", "1"], "--save-total-limit is --keep here."),
        (["--resume-from-checkpoint", "x"], "--resume-from-checkpoint is --resume here."),
        (["--num-train-epochs", "1"], "--num-train-epochs is --epochs here."),
        (["--adapter-name-or-path", "x"], "--adapter-name-or-path is --from here."),
        (["--do-train"], "--do-train has no counterpart: `ptp train` always fine-tunes"),
    ],
)  # fmt: skip
def test_a_name_of_theirs_is_answered_with_ours(ptp: Ptp, theirs: list[str], ours: str) -> None:
    code, out, err = ptp("train", *theirs)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {ours}")


def test_several_are_answered_at_once(ptp: Ptp) -> None:
    _, _, err = ptp("train", "--output-dir", "x", "--max_seq_length", "8", "--data", "--bf16")
    assert "--output-dir is --out here. --max_seq_length is --max-length here. --bf16 is" in err


def test_weight_decay_and_warmup_are_flags_and_underscores_are_hyphens(ptp: Ptp) -> None:
    code, _, err = ptp("train", "--weight_decay", "-1", "--warmup-ratio", "2", "--batch_size", "0")
    assert code == 2
    assert "train.weight_decay must be 0 or more, got -1" in err
    assert "train.warmup_ratio must be less than 1, got 2" in err
    assert "train.batch_size must be 1 or more, got 0" in err


@pytest.mark.parametrize(
    ("command", "argument", "line"),
    [
        ("train", "my file.jsonl", "ptp train --data 'my file.jsonl'"),
        ("train", "mine.yaml", "ptp train --recipe mine.yaml"),
        ("plan", "mine.yaml", "ptp plan --recipe mine.yaml"),
        ("generate", "a.jsonl", "ptp generate --data a.jsonl"),
        ("generate", "What is 2.5?", "ptp generate --prompt 'What is 2.5?'"),
        ("generate", "zebra " * 50, "ptp generate --prompt 'zebra "),
    ],
)
def test_an_argument_without_its_flag_is_answered_with_the_line(
    ptp: Ptp, command: str, argument: str, line: str
) -> None:
    code, _, err = ptp(command, argument)
    assert code == 2
    assert err.startswith(f"error: What is {argument!r}? Type: {line}")


def test_a_run_without_its_flag_is_answered_with_the_line(ptp: Ptp, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("")
    for command in ("chat", "eval"):
        assert f"Type: ptp {command} --run {tmp_path}" in ptp(command, tmp_path)[2]


def test_an_adapter_without_its_flag_is_answered_with_the_line(ptp: Ptp, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    for command in ("chat", "eval"):
        assert f"Type: ptp {command} --run {tmp_path}" in ptp(command, tmp_path)[2]


@pytest.mark.parametrize("value", ["True", "false"])
def test_a_switch_with_a_value_is_told_that_it_takes_none(ptp: Ptp, value: str) -> None:
    code, _, err = ptp("train", "--data", "d.jsonl", "--packing", value)
    assert code == 2
    assert f"What is {value!r}? A switch takes no value" in err


@pytest.mark.parametrize(
    ("typed", "name"),
    [
        (("train", "--model", "tiny", "--data", ""), "--data"),
        (("train", "--model", "tiny", "--data", "d.jsonl", "--out="), "--out"),
        (("generate", "--run", "", "--prompt", "x"), "--run"),
        (("eval", "--adapter", "a", "--adapter", ""), "--adapter"),
        (("merge-info", ""), "adapters"),
    ],
)
def test_a_variable_that_is_not_set_is_no_data_and_no_newest_run(
    ptp: Ptp, typed: tuple[str, ...], name: str
) -> None:
    code, _, err = ptp(*typed)
    assert code == 2
    assert f"{name} is empty. Is its value a shell variable that is not set?" in err


def test_a_prompt_may_be_empty(ptp: Ptp) -> None:
    _, _, err = ptp("generate", "--run", "nowhere", "--prompt", "", "--system", "")
    assert "There is no run or adapter nowhere" in err


def test_an_argument_that_belongs_nowhere_is_refused(ptp: Ptp) -> None:
    code, _, err = ptp("models", "tiny")
    assert code == 2
    assert "`ptp models` takes no 'tiny'." in err


def test_a_name_that_no_tool_has_is_left_to_the_nearest_of_ours(ptp: Ptp) -> None:
    code, _, err = ptp("train", "--bathc-size", "3")
    assert code == 2
    assert "--batch-size" in err


def test_a_command_without_our_flag_does_not_name_it() -> None:
    arguments.check_flags("models", ["--output-dir"], {"--json"})

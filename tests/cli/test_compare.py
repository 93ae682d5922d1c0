"""`ptp compare` on the command line."""

import json
from pathlib import Path

import pytest

from prefixtune_cli.compare.cells import BASES
from prefixtune_cli.compare.comparison import Comparison
from tests.cli.conftest import Ptp
from tests.compare.test_runs import run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    rows = [{"prompt": f"say it {i}", "completion": ("red", "blue")[i % 2]} for i in range(60)]
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def small(base: Path, out: Path) -> list[str]:
    return [
        "compare", "--model", str(base), "--bits", "32", "--steps", "2", "--batch-size", "4",
        "--max-length", "64", "--workers", "1", "--set", "evaluate.max_rows=6", "--out", str(out),
    ]  # fmt: skip


def test_finished_runs_are_one_table_and_a_folder(ptp: Ptp, tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", "lora"), run(tmp_path / "b", "prefix-tuning-plus", right="1110")]
    code, out, err = ptp("compare", *runs, "--out", tmp_path / "out")
    assert code == 0, err
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[1:4]] == ["base", "lora", "prefix-tuning-plus"]
    assert "75.0" in lines[3]
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"results.json", "table.md", "quality.png", "report.html"} <= written
    found = Comparison.read(tmp_path / "out/results.json")
    assert found.kind == "runs"
    assert found.command.startswith(f"ptp compare {runs[0]} {runs[1]} --out")


def test_json_is_all_that_stands_on_stdout(ptp: Ptp, tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", "lora"), run(tmp_path / "b", "prefix-tuning-plus")]
    code, out, _ = ptp("compare", *runs, "--json", "--out", tmp_path / "out")
    assert code == 0
    assert [c["label"] for c in json.loads(out)["contestants"]] == ["lora", "prefix-tuning-plus"]


def test_unequal_runs_are_refused_and_compared_anyway(ptp: Ptp, tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "full", train={"max_steps": 60})]
    code, out, err = ptp("compare", *runs, "--out", tmp_path / "out")
    assert (code, out) == (1, "")
    assert "--anyway" in err
    assert not (tmp_path / "out").exists()
    code, out, _ = ptp("compare", *runs, "--anyway", "--out", tmp_path / "out")
    assert code == 0
    assert "steps" in out


def test_a_refusal_for_its_data_leaves_no_folder(
    ptp: Ptp, random_base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for given in (
        ["--data", tmp_path / "none.jsonl"],
        ["--data", data, "--ood", tmp_path / "none.jsonl"],
        ["--data", data, "--few-shot", "2", "--set", "evaluate.max_rows=0"],
    ):
        code, _, err = ptp(*small(random_base, out), "--methods", "lora", *given)
        assert code == (2 if "--set" in given else 1), err
        assert not out.exists(), given


def test_methods_are_trained_timed_and_reported(
    ptp: Ptp, random_base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, err = ptp(
        *small(random_base, out), "--data", data, "--methods", "prefix-tuning-plus,ia3",
        "--feature-maps", "elu,gelu", "--seeds", "2", "--sweep", "1", "--rounds", "1",
        "--prompt-tokens", "16", "--prompts", "2", "--markdown",
    )  # fmt: skip
    BASES.release()
    assert code == 0, err
    assert "2 sequences at once, each with a prompt of 16 tokens" in said
    assert "| prefix-tuning-plus elu |" in said
    assert "| ia3 |" in said
    found = Comparison.read(out / "results.json")
    assert found.command.startswith("ptp compare --model")
    assert found.protocol["steps"] == 2
    assert all(c.cost is not None and c.cost.prompt_tokens == 16 for c in found.contestants)
    assert {"report.html", "training-loss.png"} <= {file.name for file in out.iterdir()}


def test_a_cell_that_fails_is_marked_and_the_exit_code_is_1(
    ptp: Ptp, random_base: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, _ = ptp(
        *small(random_base, out), "--data", data, "--methods", "lora", "--seeds", "1",
        "--sweep", "1", "--no-speed", "--grid", "train.learning_rate=0.001,1e36",
    )  # fmt: skip
    BASES.release()
    assert code == 1
    assert "lora lr=1e+36 (0 of 1 seeds)" in said
    assert "scores are not numbers" in said
    assert (out / "report.html").exists()


def test_speed_needs_no_data_and_tells_ratios(ptp: Ptp, random_base: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, said, err = ptp(
        *small(random_base, out), "--speed", "--methods", "lora,prefix-tuning-plus",
        "--rounds", "2", "--prompt-tokens", "16",
    )  # fmt: skip
    assert code == 0, err
    head = said.splitlines()[0]
    assert "training × base" in head
    assert "decode × lora" in head
    found = Comparison.read(out / "results.json")
    assert found.kind == "speed"
    assert found.base_cost is not None
    assert found.contestants[0].trainable_parameters


def test_speed_tells_how_costs_grow_with_the_shape(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, said, err = ptp(
        *small(random_base, out), "--speed", "--methods", "lora", "--rounds", "1", "--adapters", "2",
        "--prompt-tokens", "16", "--grid", "data.max_length=8,32",
    )  # fmt: skip
    assert code == 0, err
    rows = ["base max_length=8", "lora max_length=8", "base max_length=32", "lora max_length=32"]
    assert [line.split("  ")[0] for line in said.splitlines()[1:5]] == rows
    assert "2 adapters are active at once" in said
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f'<th scope="row" role="rowheader">{row}</th>' in page for row in rows)
    found = Comparison.read(out / "results.json")
    assert [group.base for group in found.groups] == rows[::2]
    assert found.protocol["adapters"] == 2


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (("--methods", "lorra"), 2, "Did you mean lora?"),
        (("--methods", "lora,nothing-of-peft"), 2, "nothing-of-peft"),
        (("--methods", ""), 2, "--methods is empty"),
        (("--methods", ","), 2, "--methods names none"),
        (("--seeds", "0"), 2, "--seeds must be 1 or more"),
        (("--grid", "adapter.rr=1"), 2, "adapter.rr is a setting of none"),
        (("--methods", "lora", "--grid", "adapter.r=0"), 2, "adapter.r must be 1 or more"),
        (("--bits", "4"), 2, "full"),
        (("--data", "nowhere.jsonl"), 1, "nowhere.jsonl"),
        (("--few-shot", "2", "--data", "sample:records-train"), 1, "they are no classes"),
        (("--speed", "--seeds", "2"), 2, "--seeds has no meaning for --speed"),
        (("--speed", "--grid", "train.epochs=1,2"), 2, "--speed takes no --grid train.epochs"),
        (("--grid", "data.max_length=8,9"), 2, "makes no fair comparison"),
        (("--speed", "--adapters", "0"), 2, "--adapters must be 1 or more"),
        (("runs/a", "--adapters", "2"), 2, "--adapters has no meaning for finished runs"),
        (("runs/a", "--sweep", "3"), 2, "--sweep has no meaning for finished runs"),
        (("runs/a", "--lora-r", "3"), 2, "--lora-r has no meaning for finished runs"),
        (("runs/a", "runs/b"), 1, "runs/a"),
        (
            (
                "--text",
                "nowhere.txt",
            ),
            1,
            "nowhere.txt",
        ),
        (("--ood", "nowhere.jsonl"), 1, "nowhere.jsonl"),
    ],
)
def test_what_cannot_be_meant_is_one_error_before_a_model_loads(
    ptp: Ptp, typed: tuple[str, ...], code: int, said: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    recipe = () if typed[0].startswith("runs/") else ("--model", "tiny")
    with_data = () if "--data" in typed or "--speed" in typed or not recipe else (
        "--data", "sample:intents-train",
    )  # fmt: skip
    found, out, err = ptp("compare", *typed, *recipe, *with_data)
    assert (found, out) == (code, "")
    assert said in err
    assert "Traceback" not in err
    assert "cells (" not in err
    assert not list(tmp_path.glob("compare/*/cells"))

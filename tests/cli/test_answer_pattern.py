"""`--answer-pattern` on the command line: a run remembers it, and evaluating or comparing the run uses it."""

import json
from pathlib import Path
from typing import Any

from prefixtune_cli.compare.finished_run import ADAPTER, open_run
from prefixtune_cli.evaluate.matching import match_rule
from tests.cli.conftest import Ptp
from tests.evaluate.test_answer_pattern import PATTERN, written


def test_a_run_its_evaluation_and_its_comparison_match_by_the_pattern(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    file = written(tmp_path / "worked.jsonl", *[f"So #### {i % 3}" for i in range(16)])
    out = tmp_path / "run"
    typed: list[Any] = ["train", "--model", random_base, "--data", file, "--eval-data", file]
    typed += ["--out", out, "--steps", 1, "--bits", 32, "--answer-pattern", PATTERN]
    code, printed, said = ptp(*typed, "--set", "evaluate.max_new_tokens=4")
    assert code == 0, said
    assert f"An answer is right if {match_rule(PATTERN)}." in printed
    summary = json.loads((out / "summary.json").read_text())
    assert summary["exact_match_rule"] == match_rule(PATTERN)
    rows = [json.loads(text) for text in (out / "eval" / "held-out.jsonl").read_text().splitlines()]
    rows = [{**row, "adapter": f"{row['answer']}\nand so on"} for row in rows]
    (out / "eval" / "held-out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert open_run(str(out)).held_out(ADAPTER).right == [True] * 16
    code, printed, said = ptp("eval", "--run", out, "--data", file, "--no-cache", "--limit", 4)
    assert code == 0, said
    assert match_rule(PATTERN) in said
    code, _, said = ptp("eval", "--run", out, "--bench", "quickstart", "--answer-pattern", "a")
    assert code == 2
    assert "--answer-pattern belongs to --data FILE" in said
    plain = written(tmp_path / "plain.jsonl", "0", "1")
    code, _, said = ptp("eval", "--run", out, "--data", plain)
    assert code == 1
    assert "plain.jsonl, line 1: --answer-pattern" in said
    assert "Loading " not in said

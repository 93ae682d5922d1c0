"""`ptp train --objective dpo` as it is typed, on the sample that comes with `ptp`."""

from __future__ import annotations

import json
from pathlib import Path

from prefixtune_cli.evaluate.preferences import Preferences
from prefixtune_cli.run_dir import RunDir
from tests.cli.conftest import Ptp


def test_the_sample_is_learned_and_both_models_preferences_are_printed(
    ptp: Ptp, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    typed = ["train", "--data", "sample:preferences", "--objective", "dpo", "--out", out]
    code, printed, said = ptp(*typed, "--bits", 32, "--steps", 12, "--eval-split", 0.2)
    assert code == 0, said
    assert "a tenth of sft's" in said
    stored = json.loads(RunDir(out).summary.read_text())
    assert stored["verdict"] == "better"
    found = Preferences.of_json(stored["preferences"])
    assert (found.pairs, found.beta) == (60, 0.1)
    assert found.reward_accuracy > 0.9
    assert found.reward_interval.low > 0.5
    assert found.margin_interval.low > 0
    table = printed.split("held-out pairs of answers")[1].splitlines()
    base = next(line for line in table if line.startswith("base"))
    assert base.split()[1:4] == [
        f"{100 * found.base.accuracy:.1f}",
        "%",
        f"{found.base.chosen:.2f}",
    ]
    assert f"by a margin of {found.margin:+.3f}" in printed


def test_rates_are_not_tried_for_pairs(ptp: Ptp) -> None:
    typed = ["train", "--data", "sample:preferences", "--objective", "dpo"]
    code, _, said = ptp(*typed, "--find-learning-rate")
    assert code == 2
    assert "--find-learning-rate does not try rates for objective dpo yet" in said

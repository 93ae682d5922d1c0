"""`ptp runs`: what it says of each run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixtune_cli.recipe.load import dump, resolve
from prefixtune_cli.run_list import list_runs


@pytest.mark.parametrize(
    ("summary", "loss"),
    [
        ({"adapter": {"loss": 0.5}}, 0.5),
        ({"adapter": {"loss": 0.5}, "preferences": {"loss": 0.25}}, 0.25),  # the objective's own
        ({"adapter": {"loss": None}}, None),  # not a number
    ],
)
def test_a_finished_run_has_the_loss_of_its_objective(
    tmp_path: Path, summary: dict[str, dict[str, float | None]], loss: float | None
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.yaml").write_text(dump(resolve(None, ["model.name=tiny"])))
    (run / "summary.json").write_text(json.dumps(summary))
    (found,) = list_runs(tmp_path)
    assert (found.model, found.state, found.loss) == ("tiny", "finished", loss)

"""--find-learning-rate: short runs on one loaded base, and the best rate for the long run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.cli.train import train as command
from prefixtune_cli.cli.typer_options import for_typer
from prefixtune_cli.compare import rates
from prefixtune_cli.errors import TrainingError, UsageError
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.shared_base import SharedBase
from tests.heard import Heard


@pytest.fixture
def recipe(random_base: Path, colours: Path, tmp_path: Path) -> Recipe:
    flags = {
        "model": {"name": str(random_base), "bits": 32},
        "data": {"train": str(colours), "eval_split": 0.25},
        "train": {"max_steps": 12},
        "out": str(tmp_path / "run"),
    }
    return resolve(None, [], flags)


def test_the_best_of_five_rates_is_found_on_one_loaded_base(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefixtune_cli import shared_base

    loaded = []
    original = shared_base.load_base
    monkeypatch.setattr(shared_base, "load_base", lambda s: loaded.append(s) or original(s))
    low = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"learning_rate": 1e-6})}
    )
    heard = Heard()
    found = rates.find_learning_rate(low, SharedBase(), heard)
    # All of them are far too low, so the highest learns most, and the message says that it is at the edge.
    assert found.train.learning_rate == pytest.approx(1e-5)
    assert len(loaded) == 1
    *tried, chosen = heard.notices
    assert [text.split(":")[0] for text in tried] == [
        f"learning rate {rate}" for rate in ("1e-07", "3.2e-07", "1e-06", "3.2e-06", "1e-05")
    ]
    assert all(text.endswith("after 12 steps") for text in tried)
    assert chosen == (
        "Training with --learning-rate 1e-05. It is the highest of them, so a better one may lie beyond."
    )
    assert found == low.model_copy(update={"train": found.train})
    assert not (tmp_path / "run").exists()


def test_where_no_rate_gives_a_number_there_is_an_error(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(run: Recipe, **_: Any) -> None:
        raise TrainingError("The loss became nan at step 1.")

    monkeypatch.setattr(rates, "train", diverges)
    with pytest.raises(
        TrainingError, match=r"not a number at any of the rates .*--learning-rate 0\.0003"
    ):
        rates.find_learning_rate(recipe, SharedBase(), Heard())


@pytest.mark.parametrize("more", [{"resume": "must"}, {"gpus": "2"}])
def test_it_is_for_a_fresh_run_of_one_process(more: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="new run of one process"):
        for_typer(command)(
            model="tiny", data="sample:intents-train", find_learning_rate=True, **more
        )

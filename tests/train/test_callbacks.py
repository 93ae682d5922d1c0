"""The watch over the weights, the journal's plot, and the output of the reporters."""

import io
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from prefixtune_cli import model as models
from prefixtune_cli.errors import TrainingError
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train import callbacks
from prefixtune_cli.train.callbacks import Clock, Journal, WeightWatch, peak_memory_gib
from prefixtune_cli.train.loss_plot import draw_loss, loss_figure


def test_weights_that_do_not_move_and_a_base_that_does_are_told(random_base: Path) -> None:
    base = models.load_base(ModelSection(name=str(random_base)))
    model = models.attach(base, PrefixTuningPlus())
    watch = WeightWatch()
    watch.start(model)
    with pytest.raises(TrainingError, match="After 3 steps, no trained weight has changed"):
        watch.check(model, 3)
    trained = next(p for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        trained += 1e-3
    watch.check(model, 3)
    frozen = next(p for n, p in model.named_parameters() if n.endswith("up_proj.weight"))
    with torch.no_grad():
        frozen *= 1.5
    with pytest.raises(TrainingError, match=r"frozen base weight .*up_proj\.weight has changed"):
        watch.check(model, 3)


def test_tokens_per_second_counts_from_the_last_call() -> None:
    clock = Clock()
    clock.start()
    first = clock.tokens_per_second(1000)
    assert first > 0
    assert clock.tokens_per_second(1000) == 0


def test_peak_memory_is_that_of_this_process() -> None:
    before = peak_memory_gib()
    held = torch.ones(64 * 2**20)  # a quarter of a GiB
    assert held.sum() > 0
    assert 0.05 < before <= peak_memory_gib() < 64


def test_the_loss_is_plotted_at_a_checkpoint_but_once_a_minute_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    journal = Journal(run_dir, Silent(), writes=True)
    at = TrainingArguments(str(tmp_path)), TrainerState(), TrainerControl()
    journal.on_train_begin(*at)
    run_dir.append_metrics({"step": 1, "loss": 3.0})
    journal.on_save(*at)
    assert not run_dir.loss_plot.exists()
    monkeypatch.setattr(callbacks, "SECONDS_BETWEEN_PLOTS", 0.2)
    time.sleep(0.3)
    journal.on_save(*at)
    assert run_dir.loss_plot.exists()
    run_dir.loss_plot.unlink()
    journal.on_save(*at)
    assert not run_dir.loss_plot.exists()


@pytest.mark.parametrize("points", [1, 5, 100])
def test_a_plot_is_drawn_from_any_number_of_points(points: int, tmp_path: Path) -> None:
    run_dir = RunDir(tmp_path)
    draw_loss(run_dir)
    assert not run_dir.loss_plot.exists()
    for step in range(1, points + 1):
        run_dir.append_metrics({"step": step, "loss": 3 / step})
        run_dir.append_metrics({"step": step, "eval_loss": 4 / step})
    draw_loss(run_dir)
    from matplotlib.image import imread

    picture = imread(io.BytesIO(run_dir.loss_plot.read_bytes()))
    assert picture.shape[:2] == (480, 840)
    assert picture[..., :3].std() > 0.01


def test_the_plot_has_the_training_loss_from_step_1_the_held_out_ones_and_the_bases() -> None:
    rows = [{"step": step, "loss": 3 / step} for step in (1, 10, 20)]
    rows.insert(2, {"step": 10, "eval_loss": 0.5})
    drawn = {
        str(line.get_label()): list(zip(*line.get_data(), strict=True))
        for line in loss_figure(rows, "mine", 3.5, (20, 0.4)).axes[0].get_lines()
    }
    assert drawn["training"] == [(1, 3.0), (10, 0.3), (20, 0.15)]
    assert drawn["held-out"] == [(10, 0.5), (20, 0.4)]
    assert [height for _, height in drawn["held-out, base"]] == [3.5, 3.5]


def test_a_step_is_told_once_with_its_figures_where_it_is_logged(tmp_path: Path) -> None:
    told: list[tuple[int, bool]] = []

    class Ear(Silent):
        def progress(self, task: str, done: int, total: int, figures: Any) -> None:
            told.append((done, bool(figures)))

    journal = Journal(RunDir(tmp_path), Ear(), writes=True)
    arguments, state = TrainingArguments(str(tmp_path)), TrainerState(max_steps=3)
    for step, logged in ((1, True), (2, False), (3, False)):  # the journal always logs the last one
        state.global_step, control = step, TrainerControl(should_log=logged)
        journal.on_step_end(arguments, state, control)
        if control.should_log:
            journal.on_log(arguments, state, control, {"loss": 1.0})
    assert told == [(1, True), (2, False), (3, True)]

"""loss.png: the training loss, smoothed, and the held-out loss where there is one."""

from __future__ import annotations

import os
from collections.abc import Sequence

from prefixtune_cli.run_dir import RunDir, write_atomically


def draw_loss(run_dir: RunDir) -> None:
    """Draw metrics.jsonl into loss.png; nothing is drawn before the first logged step."""
    rows = run_dir.read_metrics()
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    held_out = [(row["step"], row["eval_loss"]) for row in rows if "eval_loss" in row]
    if not trained:
        return
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    steps, losses = zip(*trained, strict=True)
    few = len(trained) < 20
    axes.plot(
        steps,
        losses,
        color="tab:blue",
        alpha=1 if few else 0.3,
        marker="o" if few else None,
        label="training",
    )
    if not few:
        axes.plot(steps, _smoothed(losses), color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="s", label="held-out")
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=run_dir.path.name, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    write_atomically(run_dir.loss_plot, lambda path: figure.savefig(path))


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The mean of the neighbours, a fiftieth of the run to each side."""
    reach = max(1, len(losses) // 50)
    windows = (losses[max(0, i - reach) : i + reach + 1] for i in range(len(losses)))
    return [sum(window) / len(window) for window in windows]

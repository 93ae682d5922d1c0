"""loss.png: the training loss, smoothed; the held-out loss at the steps that measured it; the base's as a line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from prefixtune_cli.run_dir import RunDir, write_atomically
from prefixtune_cli.smoothing import smoothed

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_loss(
    run_dir: RunDir,
    *,
    base: float | None = None,
    adapter: tuple[int, float] | None = None,
    than: str = "base",
) -> None:
    """Draw metrics.jsonl into loss.png; before the first logged step, do nothing.

    Args:
        run_dir: the run.
        base: the base's held-out loss, if known.
        adapter: the last step, and the adapter's held-out loss after it.
        than: what the adapter is compared with; see `Summary.compared_with`.
    """
    rows = run_dir.read_metrics()
    if any("loss" in row for row in rows):
        figure = loss_figure(rows, run_dir.path.name, base, adapter, than)
        write_atomically(run_dir.loss_plot, lambda path: figure.savefig(path))


def loss_figure(
    rows: Sequence[Mapping[str, Any]],
    title: str,
    base: float | None,
    adapter: tuple[int, float] | None,
    than: str = "base",
) -> Figure:
    """The picture; `rows` are those of metrics.jsonl, and at least one has a training loss."""
    trained = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    measured = {row["step"]: row["eval_loss"] for row in rows if "eval_loss" in row}
    held_out = sorted((measured | dict([adapter] if adapter else [])).items())
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

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
        smooth = smoothed(losses, max(1, len(losses) // 50))
        axes.plot(steps, smooth, color="tab:blue", label="training, smoothed")
    if held_out:
        axes.plot(*zip(*held_out, strict=True), color="tab:orange", marker="s", label="held-out")
    if base is not None:
        axes.axhline(base, color="tab:gray", linestyle="--", label=f"held-out, {than}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    unit = "nats a pair" if any("margin" in row for row in rows) else "nats a token"
    axes.set(xlabel="step", ylabel=f"loss ({unit})", title=title, ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure

"""The sweep behind the defaults and the README's tables, on the sample tasks with the built-in model.

    python recipes/sweep.py rates --tasks intents      # learning rates of each method
    python recipes/sweep.py variants --tasks intents   # settings of Prefix-Tuning+, changed one at a time
    python recipes/sweep.py methods --tasks records    # each method at its default

Every cell is the recipe `quickstart` with a few settings changed: the same rows in the same order for the same
number of steps, three seeds. Half of the test rows choose (by the best mean over tasks and seeds), and the other
half give the figures. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

TASKS = ("intents", "records")
RATES: dict[str, tuple[float, ...]] = {
    "prefix-tuning-plus": (3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (1e-3, 3e-3, 1e-2),
    "prefix-tuning": (1e-2, 3e-2, 1e-1, 3e-1),
}
# The paper's feature map, from which the settings are changed one at a time.
ELU: dict[str, Any] = {"adapter": {"method": "prefix-tuning-plus", "feature_map": "elu"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "none": ELU,
    "train.schedule=linear": {**ELU, "train": {"schedule": "linear"}},
    "train.warmup_ratio=0": {**ELU, "train": {"warmup_ratio": 0.0}},
    "train.weight_decay=0.1": {**ELU, "train": {"weight_decay": 0.1}},
    "adapter.feature_map=gelu": {"adapter": {"feature_map": "gelu"}},
}
Cell = tuple[str, str, int]


def adapter_of(method: str) -> dict[str, Any]:
    """The rates of Prefix-Tuning+ were swept with the paper's feature map."""
    return ELU if method == "prefix-tuning-plus" else {"adapter": {"method": method}}


def run(job: tuple[Path, str, int, dict[str, Any]]) -> dict[str, Any]:
    """Train one cell; gives both halves' exact match in per cent, the base's, and the trained parameters."""
    out, task, seed, changes = job
    from prefixtune_cli.evaluate.matching import exactly_matches
    from prefixtune_cli.recipe.load import resolve
    from prefixtune_cli.run_dir import RunDir
    from prefixtune_cli.train import train

    run_dir = RunDir(out)
    flags = {
        "data": {"train": f"sample:{task}-train", "eval": f"sample:{task}-test"},
        "train": {"seed": seed, **changes.get("train", {})},
        "adapter": changes.get("adapter", {}),
        "out": str(out),
    }
    if not run_dir.finished:
        train(resolve("quickstart", [], flags), overwrite=True)
        print("finished", out, flush=True)
    answers = [json.loads(line) for line in run_dir.answers.read_text().splitlines()]

    def per_cent(who: str, half: int) -> float:
        chosen = answers[half::2]
        return 100 * sum(exactly_matches(row[who], row["answer"]) for row in chosen) / len(chosen)

    return {
        "chosen by": per_cent("adapter", 0),
        "measured": per_cent("adapter", 1),
        "base": per_cent("base", 1),
        "parameters": json.loads(run_dir.summary.read_text())["trainable_parameters"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["rates", "variants", "methods"])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = VARIANTS
    if given.stage == "rates":
        rows = {
            f"{method} {rate:g}": {**adapter_of(method), "train": {"learning_rate": rate}}
            for method, rates in RATES.items()
            for rate in rates
        }
    elif given.stage == "methods":
        rows = {method: {"adapter": {"method": method}} for method in RATES}
        rows["prefix-tuning-plus (elu)"] = ELU
    seeds = range(given.seeds)
    cells: list[Cell] = [(label, t, s) for label in rows for t in given.tasks for s in seeds]
    jobs = [
        (
            given.out / given.stage / label.replace(" ", "-") / f"{task}-{seed}",
            task,
            seed,
            rows[label],
        )
        for label, task, seed in cells
    ]
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        found = dict(zip(cells, pool.map(run, jobs, chunksize=1), strict=True))

    def table(title: str, labels: list[str], what: str) -> None:
        print(f"\n| {title} | trained parameters | {' | '.join(given.tasks)} |")
        print(f"| --- | --- |{' --- |' * len(given.tasks)}")
        for label in labels:
            print(f"| {label} | {found[label, given.tasks[0], 0]['parameters']:,} |", end="")
            for task in given.tasks:
                values = [found[label, task, seed][what] for seed in seeds]
                print(
                    f" {statistics.mean(values):.1f} ± {(statistics.stdev(values) if len(values) > 1 else 0):.1f} |",
                    end="",
                )
            print()

    def mean(label: str) -> float:
        return statistics.mean(found[label, t, s]["chosen by"] for t in given.tasks for s in seeds)

    table("exact match in % on the rows that choose", list(rows), "chosen by")
    best = list(rows)
    if given.stage == "rates":
        best = [max((r for r in rows if r.split()[0] == m), key=mean) for m in RATES]
    table("exact match in % on the other rows", best, "measured")
    for task in given.tasks:
        print(f"\nThe base scores {found[best[0], task, 0]['base']:.1f} % on {task}.")


if __name__ == "__main__":
    main()

"""The sweep behind the defaults and the README's table, on the sample tasks with the built-in model.

    python recipes/sweep.py rates       # learning rates of each method
    python recipes/sweep.py variants    # schedule, warm-up, decay and feature map of Prefix-Tuning+, one at a time
    python recipes/sweep.py test        # each method at its default, trained on all rows, scored on the test rows

`rates` and `variants` train 120 steps on nine tenths of the training rows and score the rest; the test rows are
seen by `test` alone. All methods take the same rows in the same order for the same number of steps. A finished
run is not repeated.
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
    "prefix-tuning-plus": (3e-3, 1e-2, 3e-2),
    "lora": (1e-3, 3e-3, 1e-2),
    "prefix-tuning": (1e-2, 3e-2, 1e-1),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "the defaults": {},
    "train.schedule=linear": {"train": {"schedule": "linear"}},
    "train.schedule=constant_with_warmup": {"train": {"schedule": "constant_with_warmup"}},
    "train.warmup_ratio=0": {"train": {"warmup_ratio": 0.0}},
    "train.weight_decay=0.1": {"train": {"weight_decay": 0.1}},
    "adapter.feature_map=gelu": {"adapter": {"feature_map": "gelu"}},
    "adapter.feature_map=mlp": {"adapter": {"feature_map": "mlp"}},
    "adapter.normalize_query=true": {"adapter": {"normalize_query": True}},
}


def recipe(out: Path, task: str, seed: int, changes: dict[str, Any], test: bool) -> dict[str, Any]:
    length = {"epochs": 3.0} if test else {"max_steps": 120}
    judged = {"eval": f"sample:{task}-test"} if test else {"eval_split": 0.1}
    return {
        "model": {"name": "tiny", "bits": 32},
        "data": {"train": f"sample:{task}-train", "max_length": 128, **judged},
        "adapter": changes.get("adapter", {}),
        "train": {"seed": seed, "batch_size": 16, **length, **changes.get("train", {})},
        "evaluate": {"batch_size": 128},
        "out": str(out / f"{task}-{seed}"),
    }


def run(values: dict[str, Any]) -> dict[str, Any]:
    summary = Path(values["out"]) / "summary.json"
    if not summary.exists():
        from prefixtune_cli.recipe.schema import Recipe
        from prefixtune_cli.train import train

        train(Recipe.model_validate(values), overwrite=True)
        print("finished", values["out"], flush=True)
    return dict(json.loads(summary.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("stage", choices=["rates", "variants", "test"])
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    rows: dict[str, dict[str, Any]] = VARIANTS
    if given.stage == "rates":
        rows = {
            f"{method}, {rate:g}": {"adapter": {"method": method}, "train": {"learning_rate": rate}}
            for method, rates in RATES.items()
            for rate in rates
        }
    elif given.stage == "test":
        rows = {method: {"adapter": {"method": method}} for method in RATES}

    seeds, test = range(given.seeds), given.stage == "test"
    cells = [(label, task, seed) for label in rows for task in TASKS for seed in seeds]
    jobs = [
        recipe(given.out / given.stage / label.replace(", ", "-"), task, seed, rows[label], test)
        for label, task, seed in cells
    ]
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        found = dict(zip(cells, pool.map(run, jobs, chunksize=1), strict=True))

    def spread(label: str, task: str, who: str) -> str:
        values = [100 * found[label, task, seed][who]["exact_match"] for seed in seeds]
        return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"

    print(f"\n| | trained parameters | {' | '.join(TASKS)} |\n| --- | --- |{' --- |' * len(TASKS)}")
    for label in rows:
        parameters = found[label, TASKS[0], 0]["trainable_parameters"]
        scores = " | ".join(spread(label, task, "adapter") for task in TASKS)
        print(f"| {label} | {parameters:,} | {scores} |")
    print(
        f"| the base | 0 | {' | '.join(spread(next(iter(rows)), task, 'base') for task in TASKS)} |"
    )


if __name__ == "__main__":
    main()

"""The sweep behind the defaults and the README's table: methods × learning rates × seeds × sample tasks.

    python recipes/sweep.py --out runs/sweep --workers 2

The learning rate of a method is chosen on a validation split of the training rows, as the best mean over the
tasks and seeds; then each seed is trained on all rows at that rate and scored on the task's test file. All
methods take the same rows in the same order for the same number of steps. Finished runs are not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
from pathlib import Path
from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "prefix-tuning-plus (elu)": {"method": "prefix-tuning-plus"},
    "prefix-tuning-plus (gelu)": {"method": "prefix-tuning-plus", "feature_map": "gelu"},
    "lora": {"method": "lora"},
    "prefix-tuning": {"method": "prefix-tuning"},
}
LEARNING_RATES: dict[str, tuple[float, ...]] = {
    "prefix-tuning-plus": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "prefix-tuning": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
}
TASKS = {
    "intents": ("sample:intents-train", "sample:intents-test"),
    "records": ("sample:records-train", "sample:records-test"),
}


def settings(
    name: str, rate: float, seed: int, task: str, final: bool, out: Path
) -> dict[str, Any]:
    train, test = TASKS[task]
    data: dict[str, Any] = {"train": train, "max_length": 128}
    data |= {"eval": test} if final else {"eval_split": 0.1}
    stage = "test" if final else "validation"
    return {
        "model": {"name": "tiny", "bits": 32},
        "data": data,
        "adapter": METHODS[name],
        "train": {
            "learning_rate": rate,
            "seed": seed,
            "epochs": 3,
            "batch_size": 16,
            "log_steps": 50,
        },
        "evaluate": {"max_new_tokens": 64, "batch_size": 128},
        "out": str(out / stage / f"{name}-{task}-{rate:g}-{seed}".replace(" ", "-")),
    }


def run(values: dict[str, Any]) -> dict[str, Any]:
    summary = Path(values["out"]) / "summary.json"
    if not summary.exists():
        from prefixtune_cli.recipe.schema import Recipe
        from prefixtune_cli.train import train

        train(Recipe.model_validate(values), overwrite=True)
        print("done", values["out"], flush=True)
    return dict(json.loads(summary.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--workers", type=int, default=max(1, (os.cpu_count() or 2) // 2))
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    seeds = range(arguments.seeds)

    def rates(name: str) -> tuple[float, ...]:
        return LEARNING_RATES[METHODS[name]["method"]]

    with multiprocessing.get_context("spawn").Pool(arguments.workers) as pool:
        cells = [(n, r, s, t) for n in METHODS for r in rates(n) for s in seeds for t in TASKS]
        jobs = [settings(n, r, s, t, False, arguments.out) for n, r, s, t in cells]
        found = dict(zip(cells, pool.imap(run, jobs), strict=True))

        def validated(name: str, rate: float) -> float:
            return statistics.mean(
                found[name, rate, s, t]["adapter"]["exact_match"] for s in seeds for t in TASKS
            )

        print("\n| method | learning rate | validation exact match, % |\n| --- | --- | --- |")
        for name in METHODS:
            for rate in rates(name):
                print(f"| {name} | {rate:g} | {100 * validated(name, rate):.1f} |")
        best = {name: max(rates(name), key=lambda rate: validated(name, rate)) for name in METHODS}

        cells = [(n, best[n], s, t) for n in METHODS for s in seeds for t in TASKS]
        jobs = [settings(n, r, s, t, True, arguments.out) for n, r, s, t in cells]
        tested = dict(zip(cells, pool.imap(run, jobs), strict=True))

    print(f"\n| method | parameters | learning rate | {' | '.join(TASKS)} |")
    print("| --- " * (3 + len(TASKS)) + "|")
    for name in METHODS:
        scores = []
        for task in TASKS:
            values = [
                100 * tested[name, best[name], s, task]["adapter"]["exact_match"] for s in seeds
            ]
            scores.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        parameters = tested[name, best[name], 0, next(iter(TASKS))]["trainable_parameters"]
        print(f"| {name} | {parameters:,} | {best[name]:g} | {' | '.join(scores)} |")
    bases = [
        f"{100 * tested[next(iter(METHODS)), best[next(iter(METHODS))], 0, t]['base']['exact_match']:.1f}"
        for t in TASKS
    ]
    print(f"| base, untrained | 0 | | {' | '.join(bases)} |")


if __name__ == "__main__":
    main()

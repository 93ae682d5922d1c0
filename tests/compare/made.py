"""A comparison made by hand: four contestants, three seeds, with sweep, costs, OOD and forgetting."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefixtune_cli.compare.comparison import (
    FORGETTING,
    OOD,
    TEST,
    Cell,
    Comparison,
    Contestant,
    Group,
    Point,
    Result,
)
from prefixtune_cli.compare.metrics import Cost, Measured

SEEDS = (0, 1, 2)
# method: share of right answers, loss on the text of FORGETTING, learning rate, parameters, tokens/s
METHODS: Mapping[str, tuple[float, float, float, int, int]] = {
    "prefix-tuning-plus": (0.60, 3.30, 1e-2, 49_152, 5_200),
    "lora": (0.85, 3.60, 3e-3, 224_256, 4_100),
    "prefix-tuning": (0.30, 3.25, 1e-1, 24_576, 4_700),
    "full": (0.90, 4.10, 3e-4, 6_012_672, 3_900),
}
LORA_SPEED = METHODS["lora"][-1]
FAILURE = "The loss is nan at step 12. Lower the learning rate with --lr."


def comparison(*, failed: bool = False, rows: int = 40, **changes: Any) -> Comparison:
    """Four contestants × three seeds.

    Args:
        failed: the second cell of prefix-tuning has failed.
        rows: rows of the test data; the OOD data has half as many, the forgetting data 20.
        changes: fields of Comparison.
    """
    contestants = [contestant(method, rows=rows) for method in METHODS]
    if failed:
        loser = contestants[2]
        cells = [Cell(c.seed, c.run, failure=FAILURE) if c.seed == 1 else c for c in loser.cells]
        contestants[2] = replace(loser, cells=cells)
    made = Comparison(
        name="made",
        kind="trained",
        command="ptp compare --model tiny --recipe quickstart --seeds 3",
        created="2026-11-21T12:00:00+00:00",
        model={"name": "tiny", "revision": None, "bits": 16, "parameters": 6_012_672},
        data={
            "train": {"source": "sample:intents-train", "rows": 1500, "sha256": "a1" * 32},
            "validation": {"source": "sample:intents-train", "rows": 100, "sha256": "a2" * 32},
            TEST: {"source": "sample:intents-test", "rows": rows, "sha256": "a3" * 32},
            OOD: {"source": "ood.jsonl", "rows": rows // 2, "sha256": "a4" * 32},
            FORGETTING: {"source": "sample:chat", "rows": 20, "sha256": "a5" * 32},
        },
        protocol={
            "steps": 120,
            "batch": 16,
            "seeds": list(SEEDS),
            "sweep": 3,
            "few_shot": None,
            "schedule": "cosine",
        },
        environment={"python": "3.12.3", "packages": {"torch": "2.12.0"}, "gpus": []},
        base={
            TEST: result(0.05, rows, 1),
            OOD: result(0.05, rows // 2, 2),
            FORGETTING: text_loss(3.2, 3),
        },
        contestants=contestants,
        base_cost=cost(5_000, 0, ratio=None),
    )
    return replace(made, **changes)


def in_groups() -> Comparison:
    """Prefix-Tuning+ and LoRA, each at one length, and two methods at a length that could not be measured."""
    made = comparison(kind="speed", base={}, base_cost=None)
    plus, lora, prefix, full = made.contestants
    groups = [
        Group("base max_length=8", cost(5_000, 0, ratio=None), [plus.label, lora.label]),
        Group("base max_length=9", None, [prefix.label, full.label]),
    ]
    lost = [replace(c, cost=None) for c in (prefix, full)]
    why = {"base max_length=9": "The memory does not suffice."}
    return replace(made, contestants=[plus, lora, *lost], groups=groups, unmeasured=why)


def contestant(method: str, *, rows: int = 40, seeds: Sequence[int] = SEEDS) -> Contestant:
    """One of METHODS."""
    share, forgotten, rate, parameters, speed = METHODS[method]
    cells = [
        Cell(
            seed=seed,
            run=f"compare/made/{method}-seed-{seed}",
            steps=120,
            results={
                TEST: result(share + 0.02 * (seed - 1), rows, 1),
                OOD: result(share / 2 + 0.02 * (seed - 1), rows // 2, 2),
                FORGETTING: text_loss(forgotten + 0.03 * (seed - 1), 3),
            },
            losses=[(step, 0.3 + 3 / (1 + step * share / 10)) for step in range(10, 130, 10)],
        )
        for seed in seeds
    ]
    sweep = [
        Point(rate * x, 0.5 + abs(x - 1) / 10, share - abs(x - 1) / 10, f"compare/made/lr-{x:g}")
        for x in (0.3, 1.0, 3.0)
    ]
    return Contestant(
        label=method,
        method=method,
        settings={},
        learning_rate=rate,
        trainable_parameters=parameters,
        adapter_bytes=4 * parameters,
        cells=cells,
        sweep=sweep,
        cost=cost(speed, 32 if method == "prefix-tuning" else 0, ratio=speed / 5_000),
    )


def result(share: float, rows: int, seed: int) -> Result:
    """Right answers with this share; the hardest rows are wrong, and `seed` decides which rows are hard."""
    drawn = random.Random(seed)
    hardness = [drawn.random() for _ in range(rows)]
    tokens = [drawn.randint(2, 6) for _ in range(rows)]
    nats = [t * (0.2 + h) * (1.5 - share) for t, h in zip(tokens, hardness, strict=True)]
    return Result(nats=nats, tokens=tokens, right=[hard < share for hard in hardness])


def text_loss(loss: float, seed: int, rows: int = 20) -> Result:
    """Text without answers, with about `loss` nats a token."""
    drawn = random.Random(seed)
    tokens = [drawn.randint(90, 110) for _ in range(rows)]
    return Result([t * (loss + drawn.uniform(-0.2, 0.2)) for t in tokens], tokens)


def cost(speed: float, more_tokens: int, *, ratio: float | None) -> Cost:
    """Costs measured in turns, ± 5 %; `more_tokens` is the part of the key/value cache beside the prompt's 1024."""

    def around(value: float) -> Measured:
        return Measured.of([0.95 * value, value, 1.05 * value])

    of_base = None if ratio is None else around(ratio)
    return Cost(
        training_tokens_per_second=around(speed),
        decode_tokens_per_second=around(speed / 50),
        time_to_first_token_seconds=around(50 / speed),
        peak_memory_gib=1.23,
        kv_cache_bytes=(1024 + more_tokens) * 6 * 2 * 256 * 2,
        prompt_tokens=1024,
        training_ratio=of_base,
        decode_ratio=of_base,
        first_token_ratio=of_base,
        training_over_lora=around(speed / LORA_SPEED),
        decode_over_lora=around(speed / LORA_SPEED),
        first_token_over_lora=around(speed / LORA_SPEED),
        interleaved=True,
    )

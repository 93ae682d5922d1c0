"""The memory plan: how much memory a recipe needs on each GPU, and what to change if it does not fit."""

from prefixtune_cli.plan.kernels import CPU_TILE_WORDS
from prefixtune_cli.plan.planner import (
    FRAMEWORK_RESERVE_BYTES,
    METHODS,
    MOST_ROWS,
    MethodPlan,
    Parts,
    Planner,
    largest_batch,
    methods_beside,
    plan,
    with_method,
)
from prefixtune_cli.plan.remedy import Remedy, gpu_bytes, remedies

__all__ = [
    "CPU_TILE_WORDS",
    "FRAMEWORK_RESERVE_BYTES",
    "METHODS",
    "MOST_ROWS",
    "MethodPlan",
    "Parts",
    "Planner",
    "Remedy",
    "gpu_bytes",
    "largest_batch",
    "methods_beside",
    "plan",
    "remedies",
    "with_method",
]

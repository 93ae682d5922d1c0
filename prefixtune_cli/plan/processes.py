"""What several GPUs shard among them, and what each GPU needs in addition.

These are estimates by rule from the step on one GPU. No collective operation is simulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from prefixtune_cli.plan.accounting import ADAPTER, GRADIENTS, OPTIMIZER, WEIGHTS, Parts
from prefixtune_cli.plan.skeleton import Skeleton
from prefixtune_cli.plan.step import Peaks
from prefixtune_cli.recipe.schema import TrainSection

# The parts that each kind of parallelism shards. ddp shards nothing, and fsdp shards only the frozen base.
SHARDED = {
    "fsdp": (WEIGHTS,),
    "deepspeed-zero3": (WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER),
    "deepspeed-zero2": (GRADIENTS, OPTIMIZER),
}
LAYERS_GATHERED = 2  # the layer that computes, and the next one, which is already being gathered


@dataclass(frozen=True)
class Weights:
    """Bytes of a model: its trained parameters, its largest decoder layer, and all parameters outside its layers."""

    trained_bytes: int
    layer_bytes: int
    outside_bytes: int

    @classmethod
    def of(cls, skeleton: Skeleton) -> Weights:
        with skeleton.only(None) as layers:
            sizes = [_bytes(layer) for layer in layers]
            trained = sum(p.nbytes for p in skeleton.model.parameters() if p.requires_grad)
            outside = _bytes(skeleton.model) - sum(sizes)
        return cls(trained, max(sizes, default=0), outside)


def processes(section: TrainSection) -> int:
    """The number of GPUs that a recipe asks for; `auto` means all GPUs of this machine."""
    gpus = section.gpus
    if gpus == "auto":
        return max(1, torch.cuda.device_count())
    if isinstance(gpus, list):
        return len(gpus)
    return gpus if isinstance(gpus, int) else 1


def on_each(peaks: Peaks, section: TrainSection, weights: Weights) -> Peaks:
    """The parts on each of the recipe's GPUs, from the parts of a step on one GPU."""
    count = processes(section)
    if count == 1:
        return peaks
    return {phase: _spread(phase, parts, section, weights, count) for phase, parts in peaks.items()}


def _spread(
    phase: object, parts: Parts, section: TrainSection, weights: Weights, count: int
) -> Parts:
    spread = dict(parts)
    for part in SHARDED.get(section.parallel, ()):
        spread[part] = -(-spread.get(part, 0) // count)
    if section.parallel == "ddp":  # its reducer has buckets for all gradients
        spread[GRADIENTS] = spread.get(GRADIENTS, 0) + weights.trained_bytes
    elif WEIGHTS in SHARDED[section.parallel] and phase != ("optimizer",):
        gathered = LAYERS_GATHERED * weights.layer_bytes + weights.outside_bytes
        spread[WEIGHTS] += gathered * (count - 1) // count
    return spread


def _bytes(module: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())

"""Spreads the weights of a base over the processes (FSDP2).

The frozen weights are sharded by decoder layer. In the forward and the backward pass, torch gathers one layer after
the other; there is no gradient to reduce. The adapter is small and is not sharded: each process has a copy, and
transformers' Trainer averages the gradients. So checkpoints look like those of an unsharded run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers.distributed.configuration_utils import DistributedConfig

from prefixtune_cli.errors import ModelError


def shard(model: PeftModel, processes: int, device: torch.device) -> None:
    """Spread the weights of the base over the processes, in place; the adapter stays whole.

    Args:
        model: on the CPU, the same on all processes.
        processes: the number of processes; their group must exist.
        device: this process's own.

    Raises:
        ModelError: the model does not say which of its modules are the decoder layers.
    """
    base: Any = model.get_base_model()
    kinds = set(base._no_split_modules or ())
    layers = [module for module in base.modules() if type(module).__name__ in kinds]
    if not layers:
        raise ModelError(
            f"{type(base).__name__} cannot be sharded: it does not name its decoder layers. Use --parallel ddp."
        )
    adapter = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for parameter in adapter:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, ignored_params=adapter)
    fully_shard(base, mesh=mesh, ignored_params=adapter)
    # transformers' own sharded loading sets these, and its Trainer and `generate` read them.
    base.config.distributed_config = DistributedConfig(fsdp_size=processes)
    base._is_fsdp_managed_module = base._is_distributed_loading_by_transformers = True


def is_sharded(model: nn.Module) -> bool:
    """Whether each process holds only a part of the weights, so that every forward pass needs all processes."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return isinstance(base, FSDPModule) or any(hasattr(p, "ds_id") for p in base.parameters())


def reshard(model: nn.Module) -> None:
    """Have each process hold only its part again, since some weights stay whole after a forward pass.

    Call it on all processes. `state_dict` reshards too, but only on the process that saves; that one would later wait
    alone for the others to gather.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def adapter_at_hand(model: nn.Module) -> Iterator[None]:
    """Within the block, the adapter is whole on each process. Only DeepSpeed's ZeRO-3 ever shards it."""
    trained = [p for p in model.parameters() if p.requires_grad and hasattr(p, "ds_id")]
    if not trained:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(trained):
        yield


def deepspeed_settings(parallel: str) -> dict[str, Any] | None:
    """DeepSpeed's settings for `deepspeed-zero2` and `deepspeed-zero3`; transformers fills in `auto`."""
    if not parallel.startswith("deepspeed-zero"):
        return None
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": int(parallel[-1]),
            "stage3_gather_16bit_weights_on_model_save": True,
        },
    }

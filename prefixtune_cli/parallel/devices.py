"""Where this process computes, and how many processes a run has."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from prefixtune_cli.errors import ResourceError, UsageError

Gpus = int | str | Sequence[int] | None


def device(wanted: str = "auto") -> torch.device:
    """This process's own: the GPU of its local rank, or the CPU.

    Args:
        wanted: `auto` takes a GPU where there is one; `cpu`; `cuda`.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Where a scheduler shows each process a GPU of its own, that one is number 0.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_device(wanted: str) -> None:
    """Raise ResourceError where a GPU is wanted and there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "model.device is cuda, but torch finds no CUDA GPU here (`nvidia-smi` lists them; a CPU build of torch "
            "sees none). Type --device cpu, or leave --device out."
        )


def multiplies_bfloat16(
    place: torch.device, capabilities: Mapping[str, object] | None = None
) -> bool:
    """Whether the device has instructions for products in bfloat16; an x86 CPU without them is faster in float32.

    Args:
        place: a CPU or GPU.
        capabilities: of the CPU, as `torch.cpu.get_capabilities` gives them; None asks it for this one's.
    """
    if place.type != "cpu":
        return True
    if capabilities is None:
        ask = getattr(torch.cpu, "get_capabilities", dict)  # which older versions of torch lack
        capabilities = ask()
    if capabilities.get("architecture") != "x86_64":
        return True
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_1"))


def slow_precision(bits: int, wanted: str) -> str | None:
    """A sentence for the user where this device computes slowly at so many bits; else None.

    Args:
        bits: of the base; all but 32 are computed in bfloat16.
        wanted: as for `device`.
    """
    if bits == 32 or multiplies_bfloat16(device(wanted)):
        return None
    return (
        f"This CPU has no instructions for bfloat16, in which a base of {bits} bits computes. --bits 32 is several "
        "times as fast here."
    )


def processes_here(gpus: Gpus, wanted: str) -> int:
    """How many processes a recipe's `train.gpus` asks for on this machine.

    Args:
        gpus: a number, `auto` for all GPUs, a list of their numbers, or None for one process.
        wanted: as for `device`.

    Raises:
        ResourceError: this machine has fewer GPUs.
        UsageError: a list of GPUs for the CPU.
    """
    check_device(wanted)
    on_cpu = wanted == "cpu"
    there = 0 if on_cpu else torch.cuda.device_count()
    if gpus is None or isinstance(gpus, str):
        return 1 if gpus is None else max(1, there)
    count, most = (gpus, gpus) if isinstance(gpus, int) else (len(gpus), max(gpus) + 1)
    if on_cpu and not isinstance(gpus, int):
        raise UsageError(
            f"train.gpus names GPUs ({gpus}), but model.device is cpu. Type --gpus {count}"
        )
    if on_cpu or most <= there:
        return count
    instead = (
        f"Type --gpus {there}, --gpus auto, or leave it out."
        if there
        else "Leave --gpus out to train on the CPU; with --device cpu, it is the number of processes there."
    )
    raise ResourceError(f"train.gpus is {gpus}, but this machine has {there} CUDA GPUs. {instead}")


def count_of(gpus: Gpus) -> int | None:
    """How many processes a machine is to have by `train.gpus`, whatever it has; None where that is left open."""
    if gpus is None or isinstance(gpus, str):
        return None
    return gpus if isinstance(gpus, int) else len(gpus)


def show_only(gpus: Gpus) -> None:
    """Let this process, and those that it starts, see the GPUs of a list alone, in its order.

    To be called before CUDA is used. The numbers count the GPUs that CUDA_VISIBLE_DEVICES leaves, where it is set.
    """
    if isinstance(gpus, int | str) or gpus is None:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) for gpu in gpus]
    if visible:
        all_names = visible.split(",")
        names = [all_names[gpu] for gpu in gpus if gpu < len(all_names)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)

"""The device of this process, and the number of processes of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import torch

from prefixtune_cli.errors import ResourceError, UsageError

Gpus = int | str | Sequence[int] | None


def device(wanted: str = "auto") -> torch.device:
    """This process's own device: the GPU of its local rank, or the CPU.

    Args:
        wanted: `auto`, which takes a GPU if there is one; `cpu`; or `cuda`.
    """
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # If a scheduler shows each process only its own GPU, that GPU is number 0.
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def check_device(wanted: str) -> None:
    """Raise ResourceError if a GPU is wanted but there is none."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ResourceError(
            "model.device is cuda, but torch finds no CUDA GPU here (`nvidia-smi` lists them; a CPU build of torch "
            "sees none). Type --device cpu, or leave out --device."
        )


def multiplies_bfloat16(
    place: torch.device, capabilities: Mapping[str, object] | None = None
) -> bool:
    """Whether the device has instructions for products in bfloat16; an x86 CPU without them is faster in float32.

    Args:
        place: a CPU or GPU.
        capabilities: the CPU's, as `torch.cpu.get_capabilities` returns them; None asks for this CPU's.
    """
    if place.type != "cpu":
        return True
    if capabilities is None:
        ask = getattr(torch.cpu, "get_capabilities", dict)  # older versions of torch lack it
        capabilities = ask()
    if capabilities.get("architecture") != "x86_64":
        return True
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "avx10_1"))


def slow_precision(bits: int, wanted: str) -> str | None:
    """A sentence for the user if this device computes slowly at so many bits; otherwise None.

    Args:
        bits: of the base; every number but 32 computes in bfloat16.
        wanted: as for `device`.
    """
    if bits == 32 or multiplies_bfloat16(device(wanted)):
        return None
    return (
        f"A base of {bits} bits computes in bfloat16, for which this CPU has no instructions. --bits 32 is several "
        "times as fast here."
    )


def processes_here(gpus: Gpus, wanted: str) -> int:
    """How many processes a recipe's `train.gpus` asks for on this machine.

    Args:
        gpus: a number, `auto` for all GPUs, a list of their numbers, or None for one process.
        wanted: as for `device`.

    Raises:
        ResourceError: this machine has fewer GPUs.
        UsageError: the recipe lists GPUs, but its device is the CPU.
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
        else "Leave out --gpus to train on the CPU; with --device cpu, it is the number of processes."
    )
    raise ResourceError(f"train.gpus is {gpus}, but this machine has {there} CUDA GPUs. {instead}")


def count_of(gpus: Gpus) -> int | None:
    """The number of processes that `train.gpus` asks for, without looking at the machine; None if it does not say."""
    if gpus is None or isinstance(gpus, str):
        return None
    return gpus if isinstance(gpus, int) else len(gpus)


def show_only(gpus: Gpus) -> None:
    """Let this process and its children see only the GPUs of a list, in its order.

    Call it before CUDA is used. If CUDA_VISIBLE_DEVICES is set, the numbers count the GPUs that it leaves.
    """
    if isinstance(gpus, int | str) or gpus is None:
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(gpu) for gpu in gpus]
    if visible:
        all_names = visible.split(",")
        names = [all_names[gpu] for gpu in gpus if gpu < len(all_names)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names)

"""The most memory that a piece of work has in use, on a GPU or on a CPU.

On a GPU it is the allocator's own record. On a CPU PyTorch keeps none, so the kernel is asked: Linux records the most
resident memory of a process (VmHWM in /proc/self/status) and starts that record over when 5 is written to
/proc/self/clear_refs. That is the whole process, interpreter and libraries included; and what an earlier piece of work
has freed counts as long as the C library keeps it, which is why it is told to give back what it can. Other systems have
no such record that can be started over, and nothing is measured there.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_PROCESS = Path("/proc/self")


@dataclass
class Peak:
    """The most bytes in use, once the work is done; None where that cannot be measured."""

    nbytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Within the block the record of the most memory is the block's own; what is held already counts.

    Args:
        device: where the work computes.

    Returns:
        what is filled in when the block ends without an error.
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.nbytes = torch.cuda.max_memory_allocated(device)
        return
    started_over = _start_over()
    yield peak
    if started_over:
        peak.nbytes = _kibibytes(_PROCESS / "status", "VmHWM")


def available_bytes() -> int | None:
    """What this machine's main memory has left for new processes; None where the system does not say."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _start_over() -> bool:
    with contextlib.suppress(OSError, AttributeError):  # musl and others have no malloc_trim
        ctypes.CDLL(None).malloc_trim(0)
    try:
        (_PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _kibibytes(file: Path, name: str) -> int | None:
    """The bytes of a line such as `VmHWM:  1234 kB`."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith(f"{name}:")), None)
    return None if found is None else 1024 * int(found.split()[1])

"""The peak memory of a piece of work, on a GPU or on a CPU.

On a GPU PyTorch's allocator records it. On a CPU PyTorch keeps no record, so the kernel is asked: Linux records the
peak resident memory of a process (VmHWM in /proc/self/status), and resets it when 5 is written to
/proc/self/clear_refs. This counts the whole process, with the interpreter and the libraries. It also counts memory that
earlier work has freed and the C library has kept, so the library is told to return what it can. Other systems have no
record that can be reset, and nothing is measured there.
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
    """The peak in bytes, once the work is done; None where it cannot be measured."""

    nbytes: int | None = None


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the peak memory within the block; memory that is in use before the block counts as well.

    Args:
        device: where the work computes.

    Yields:
        the peak, which is filled in when the block ends without an error.
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
    was_reset = _reset()
    yield peak
    if was_reset:
        peak.nbytes = _kibibytes(_PROCESS / "status", "VmHWM")


def available_bytes() -> int | None:
    """The bytes of main memory that are free for new processes; None where the system does not say."""
    return _kibibytes(Path("/proc/meminfo"), "MemAvailable")


def _reset() -> bool:
    """Start the kernel's record over; whether that was possible."""
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

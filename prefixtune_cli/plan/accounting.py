"""Live tensor memory, by part, while PyTorch runs on real tensors or on fake ones, which hold no data.

The accountant looks at the results of every operator. It counts a storage from the operator that allocates it until it
is freed. The storage belongs to the part that is current when it is allocated, unless `add` moves it to another part.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER, ACTIVATIONS, LOGITS = (
    "weights",
    "adapter",
    "gradients",
    "optimizer",
    "activations",
    "logits",
)
Parts = dict[str, int]
Phase = tuple[Hashable, ...]


class Accountant(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are allocated within its context, or passed to `add`.

    `peaks` holds the parts at the memory peak of each phase. A caller names the current phase by setting `phase`.

    Args:
        truth: the value of every boolean fake tensor that code asks for.
    """

    def __init__(self, *, truth: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.truth = truth
        self.phase: Phase = ()
        self.peaks: dict[Phase, Parts] = {}
        self._highest: dict[Phase, int] = {}
        self._part = ACTIVATIONS
        self._live: Parts = {}
        self._total = 0
        self._storages: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}

    def start_over(self) -> None:
        """Forget the peaks so far, and keep what is live."""
        self.peaks.clear()
        self._highest.clear()

    @contextlib.contextmanager
    def counting_as(self, part: str) -> Iterator[None]:
        """Within the block new storages belong to `part`."""
        before, self._part = self._part, part
        try:
            yield
        finally:
            self._part = before

    def add(self, tensors: Iterable[torch.Tensor | None], part: str) -> None:
        """Count these tensors under `part`, whether the accountant knows them already or not."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            known = self._storages.get(id(storage))
            if known is None or known[0]() is not storage:
                self._enter(storage, part)
            elif known[1] != part:
                reference, old, nbytes = known
                self._live[old] -= nbytes
                self._live[part] = self._live.get(part, 0) + nbytes
                self._storages[id(storage)] = reference, part, nbytes
        self._look()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default and _is_fake(args[0]):
            return args[0].fake_device  # a shortcut: PyTorch asks for it very often
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            # There is no data to read. Code asks for a step count, a norm, or whether all elements are true.
            return self.truth if args[0].dtype == torch.bool else 1
        if func is torch.ops.aten._grouped_mm.default and _is_fake(args[0]):
            result = _grouped_product(*args, **(kwargs or {}))
        else:
            result = func(*args, **(kwargs or {}))
        made = False
        for value in tree_iter(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                known = self._storages.get(id(storage))
                if known is None or known[0]() is not storage:
                    self._enter(storage, self._part)
                    made = True
        if made:
            self._look()
        return result

    def _enter(self, storage: torch.UntypedStorage, part: str) -> None:
        key, nbytes = id(storage), storage.nbytes()
        reference = weakref.ref(storage, lambda gone: self._leave(key, gone))
        self._storages[key] = reference, part, nbytes
        self._live[part] = self._live.get(part, 0) + nbytes
        self._total += nbytes

    def _leave(self, key: int, gone: weakref.ref[torch.UntypedStorage]) -> None:
        if key in self._storages and self._storages[key][0] is gone:
            _, part, nbytes = self._storages.pop(key)
            self._live[part] -= nbytes
            self._total -= nbytes

    def _look(self) -> None:
        if self._total > self._highest.get(self.phase, -1):
            self._highest[self.phase] = self._total
            self.peaks[self.phase] = dict(self._live)


def _is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def _grouped_product(
    a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    """The output of a grouped matrix product, without values; PyTorch's own rule accepts bfloat16 only.

    [rows, k] by [groups, k, n] gives [rows, n], and [m, rows] by [rows, n] gives [groups, m, n].
    """
    if b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    return a.new_empty(offsets.shape[0], a.shape[0], b.shape[1])

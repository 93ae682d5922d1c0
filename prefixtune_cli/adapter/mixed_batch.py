"""A batch in which each row has its own adapter. One product per layer reads the memories of all rows.

Rows are treated as if they were heads: the M of each row's adapter is gathered to [n·H, f, v], and then the operation
of read.py is the same as for one adapter. A row without an adapter reads M = 0.

Legend: b batch, n rows with a name, k = b/n rows of the batch for each (the beams of a search), H heads of M, h query
heads, s positions, d d_query, f d_φ, v d_value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from prefixtune_cli.adapter.memory import Memory
from prefixtune_cli.adapter.read import Weights, add_read

BASE = "__base__"  # PEFT's name for a row without an adapter


class ReadByRow:
    """Memories with one φ and weights of one shape, and the one that each row of a batch reads.

    It takes the place of a `Memory` when it is read: the call is the same, and so are the widths.

    Args:
        rows: the memory of each row, in the order of the batch. A row whose memory is not in `alike` reads nothing.
        alike: the memories.
    """

    def __init__(self, rows: Sequence[Memory | None], alike: Sequence[Memory]) -> None:
        self.alike = alike
        place = {memory: i for i, memory in enumerate(alike)}
        chosen = [len(alike) if m is None else place.get(m, len(alike)) for m in rows]
        self.rows = torch.tensor(chosen, device=alike[0].weights().M.device)
        self.heads, self.d_query, self.d_value = (
            alike[0].heads,
            alike[0].d_query,
            alike[0].d_value,
        )

    def __call__(self, query: Tensor, output: Tensor, others: Sequence[Memory] = ()) -> Tensor:
        """o + φ(q)ᵀM with the M of each row.

        Args:
            query: [b, h, s, d]; [1, h, n·s, d] counts as n rows, because some models flatten their batch.
            output: [b, s, h, v].
            others: none; a row has one adapter.

        Returns:
            The output's shape and dtype.

        Raises:
            ValueError: b is no multiple of n.
        """
        assert not others
        n, (batch, heads, positions, d), v = len(self.rows), query.shape, output.shape[-1]
        if batch == 1 and positions % n == 0:
            batch, positions = n, positions // n
            query = query.view(heads, n, positions, d).transpose(0, 1)
        if batch % n:
            raise ValueError(
                f"adapter_names must name an adapter for each row, got {n} names for {batch} rows."
            )
        k = batch // n
        x = query.reshape(n, k, heads, positions, d).transpose(0, 1)
        o = output.reshape(n, k, positions, heads, v).permute(1, 2, 0, 3, 4)
        sums = add_read(
            o.reshape(k, positions, n * heads, v),
            x.reshape(k, n * heads, positions, d),
            self.weights(),
            self.alike[0].phi,
        )
        by_row = sums.view(k, positions, n, heads, v).permute(2, 0, 1, 3, 4)
        return by_row.reshape(output.shape)

    def weights(self) -> Weights:
        """The weights of each row's memory, [n·H, …], in the order of the rows."""
        M, W, b = zip(*(memory.weights() for memory in self.alike), strict=True)
        if W[0] is None:
            return Weights(self._of_rows(M))
        return Weights(self._of_rows(M), self._of_rows(W), self._of_rows(b))

    def _of_rows(self, parts: Sequence[Tensor]) -> Tensor:
        nothing = torch.zeros_like(parts[0])
        return torch.stack([*parts, nothing]).index_select(0, self.rows).flatten(0, 1)


def reads_by_row(rows: Sequence[Memory | None]) -> list[ReadByRow]:
    """The reads that serve a batch in which each row has its own memory; None is a row without one."""
    groups: dict[object, list[Memory]] = {}
    for memory in dict.fromkeys(rows):
        if memory is not None:
            shapes = [None if part is None else part.shape for part in memory.weights()]
            groups.setdefault((memory.phi, memory.d_query, *shapes), []).append(memory)
    return [ReadByRow(rows, alike) for alike in groups.values()]

"""The order of the rows in an epoch: the same one for any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler
from transformers.trainer_pt_utils import get_length_grouped_indices

from prefixtune_cli.data.row_encoder import MASKED

ROWS_AT_ONCE = 10_000
ROW = "row"  # the column of a row's number, by which errors name it


class Order(Sampler[int]):
    """All rows in a random order that depends only on seed and epoch, and then the blank rows.

    Args:
        rows: the number of training rows.
        seed: of the run.
        lengths: of the rows, in tokens, if the rows of a batch should be about equally long; None allows any order.
        batch: rows of an optimizer step, over all processes.

    Attributes:
        epoch: the epoch of the next iteration.
        blanks: the number of blank rows at the end. They have no loss, and fill the last batch for all processes.
    """

    def __init__(
        self, rows: int, seed: int, lengths: Sequence[int] | None = None, batch: int = 1
    ) -> None:
        self.rows = rows
        self.seed = seed
        self.lengths = lengths
        self.batch = batch
        self.epoch = 0
        self.blanks = 0

    def __len__(self) -> int:
        return self.rows + self.blanks

    def __iter__(self) -> Iterator[int]:
        yield from self._of_epoch(self.epoch)
        yield from range(self.rows, self.rows + self.blanks)

    def taken(self, *, steps: int, epochs: float) -> list[int]:
        """The rows that training takes, in ascending order, without blank ones.

        Args:
            steps: of the optimizer; if not positive, the epochs count.
            epochs: may be a fraction.
        """
        if steps <= 0:
            steps = math.ceil(epochs * math.ceil(len(self) / self.batch))
        return sorted(islice(self._of_epoch(0), steps * self.batch))

    def _of_epoch(self, epoch: int) -> Iterator[int]:
        """All rows but the blank ones."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        if self.lengths is None:
            yield from torch.randperm(self.rows, generator=generator).tolist()
        else:
            yield from self._grouped(self.lengths, generator)

    def _grouped(self, lengths: Sequence[int], generator: torch.Generator) -> Iterator[int]:
        """Batches of rows of about the same length, in random order; the last may be smaller, and stays last."""
        rows = get_length_grouped_indices(lengths, self.batch, generator=generator)
        whole = self.rows // self.batch
        for i in torch.randperm(whole, generator=generator).tolist():
            yield from rows[i * self.batch : (i + 1) * self.batch]
        yield from rows[whole * self.batch :]


def row_lengths(dataset: Dataset) -> list[int]:
    """The tokens of each row; of a pair of answers, those of the longer one with the prompt."""
    of_pairs = "other_ids" in dataset.column_names and "desirable" not in dataset.column_names
    columns = ["input_ids", *(["other_ids"] if of_pairs else [])]
    return [
        max(lengths)
        for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
        for lengths in zip(
            *(pc.list_value_length(table[name]).to_pylist() for name in columns), strict=True
        )
    ]


def blank_rows(dataset: Dataset, count: int, pad_id: int) -> Dataset:
    """`dataset` with `count` more rows; each has one padding token, no loss, and the row number -1."""
    if not count:
        return dataset
    blank: dict[str, Any] = {
        "input_ids": [pad_id],
        "labels": [MASKED],
        "other_ids": [pad_id],
        "other_labels": [MASKED],
        "desirable": True,
        "seq_lengths": [1],
        ROW: -1,
    }
    columns = {name: [blank[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])

"""In which order an epoch sees the rows: the same one for any number of processes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import Sampler

from prefixtune_cli.data.encode import MASKED


class Order(Sampler[int]):
    """All rows at random, by seed and epoch alone, and then the blank ones.

    Args:
        rows: of the training data.
        seed: of the run.

    Attributes:
        epoch: which epoch the next iteration is.
        blanks: rows without a loss after the others, which fill the last batch so that each process gets its part.
    """

    def __init__(self, rows: int, seed: int) -> None:
        self.rows = rows
        self.seed = seed
        self.epoch = 0
        self.blanks = 0

    def __len__(self) -> int:
        return self.rows + self.blanks

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        yield from torch.randperm(self.rows, generator=generator).tolist()
        yield from range(self.rows, self.rows + self.blanks)


def blank_rows(dataset: Dataset, count: int, pad_id: int) -> Dataset:
    """`dataset` with `count` rows more, of one padding token without a loss each, and of the number -1."""
    if not count:
        return dataset
    blank: dict[str, Any] = {
        "input_ids": [pad_id],
        "labels": [MASKED],
        "seq_lengths": [1],
        "row": -1,
    }
    columns = {name: [blank[name]] * count for name in dataset.column_names}
    return concatenate_datasets([dataset, Dataset.from_dict(columns, features=dataset.features)])

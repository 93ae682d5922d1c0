"""The order of rows: each occurs once an epoch, in an order by seed and epoch; grouped by length if asked."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from prefixtune_cli.train.order import Order

LENGTHS = random.Random(0).choices(range(5, 400), k=403)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "grouped"])
def test_an_epoch_has_each_row_once_and_then_the_blank_ones(lengths: list[int] | None) -> None:
    order = Order(403, seed=3, lengths=lengths, batch=8)
    order.blanks = 5
    found = list(order)
    assert sorted(found[:403]) == list(range(403))
    assert found[403:] == list(range(403, 408))
    assert len(order) == len(found)


@pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["any", "grouped"])
def test_seed_and_epoch_make_the_order(lengths: list[int] | None) -> None:
    def epoch(seed: int, number: int) -> list[int]:
        order = Order(403, seed, lengths, batch=8)
        order.epoch = number
        return list(order)

    assert epoch(0, 1) == epoch(0, 1)
    assert len({tuple(epoch(seed, number)) for seed, number in [(0, 0), (0, 1), (7, 0)]}) == 3


def test_grouped_batches_need_little_padding_and_come_in_any_order() -> None:
    def batches(lengths: list[int] | None) -> list[list[int]]:
        rows = [LENGTHS[i] for i in Order(403, 0, lengths, 8)]
        return [rows[i : i + 8] for i in range(0, 403, 8)]

    def filled(found: list[list[int]]) -> float:
        return sum(map(sum, found)) / sum(max(batch) * len(batch) for batch in found)

    grouped = batches(LENGTHS)
    assert filled(batches(None)) < 0.65
    assert filled(grouped) > 0.9
    longest = [max(batch) for batch in grouped]
    falling = sum(a > b for a, b in pairwise(longest))
    assert 0.3 < falling / len(longest) < 0.7
    assert len(grouped[-1]) == 403 % 8  # the partial batch stays last

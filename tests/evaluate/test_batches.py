"""Batches: the longest first, within rows and tokens, and halved for good when memory runs out."""

import gc
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from prefixtune_cli.errors import PtpError, ResourceError
from prefixtune_cli.evaluate.batches import BatchLimit, out_of_memory
from prefixtune_cli.progress import Silent

CUDA_FULL = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB"


class Listener(Silent):
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def warning(self, text: str) -> None:
        self.warnings.append(text)


class Worker:
    """Does batches of numbers, which are their own lengths; more than `rows` or `tokens` exceeds its memory."""

    def __init__(self, rows: float = math.inf, tokens: float = math.inf) -> None:
        self.rows, self.tokens = rows, tokens
        self.tried: list[list[int]] = []
        self.done: list[list[int]] = []

    def __call__(self, batch: Sequence[int]) -> None:
        self.tried.append([*batch])
        if len(batch) > self.rows or len(batch) * max(batch) > self.tokens:
            raise torch.OutOfMemoryError(CUDA_FULL)
        self.done.append([*batch])


def size(item: int) -> int:
    return item


def run(
    limited: BatchLimit,
    items: Sequence[Any],
    length: Callable[[Any], int],
    work: Callable[[Any], object],
) -> list[Any]:
    """All that is yielded: each finished batch."""

    def yielding(batch: Sequence[Any]) -> Iterator[Any]:
        work(batch)
        yield batch

    return list(limited.run(items, length, yielding))


def limit(rows: int = 10**6, tokens: int = 10**6) -> BatchLimit:
    return BatchLimit(rows, tokens, Listener())


def warnings(limited: BatchLimit) -> list[str]:
    assert isinstance(limited.reporter, Listener)
    return limited.reporter.warnings


# Without trouble


def test_the_longest_come_first_whatever_the_order() -> None:
    worker = Worker()
    found = run(limit(rows=2), [3, 9, 1, 7, 5], size, worker)
    assert found == worker.done == [[9, 7], [5, 3], [1]]


def test_items_of_one_length_keep_their_order() -> None:
    done: list[str] = []
    run(limit(rows=2), ["bb", "a1", "ccc", "a2", "dd"], len, done.extend)
    assert done == ["ccc", "bb", "a1", "a2", "dd"]


def test_a_batch_is_bounded_by_its_tokens_padding_included() -> None:
    worker = Worker()
    run(limit(tokens=20), [10, 9, 6, 6, 6, 1, 1], size, worker)
    assert worker.done == [[10, 9], [6, 6, 6], [1, 1]]
    assert all(len(batch) * max(batch) <= 20 for batch in worker.done)


def test_a_sequence_that_is_too_long_goes_alone() -> None:
    worker = Worker()
    run(limit(tokens=20), [50, 21, 20, 10, 10], size, worker)
    assert worker.done == [[50], [21], [20], [10, 10]]


def test_items_of_no_length_are_bounded_by_rows_alone() -> None:
    worker = Worker()
    run(limit(rows=3, tokens=2), [0, 0, 0], size, worker)
    assert worker.done == [[0, 0], [0]]


def test_nothing_to_do_is_nothing_done() -> None:
    worker = Worker()
    run(limit(), [], size, worker)
    assert worker.tried == []


def test_a_number_of_rows_that_was_typed_is_kept_however_long_they_are() -> None:
    worker = Worker()
    run(BatchLimit.of_rows(3, Silent()), [10**12] * 7, size, worker)
    assert [*map(len, worker.done)] == [3, 3, 1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_automatic_limit_takes_more_short_sequences_than_long_ones(device: str) -> None:
    worker = Worker()
    found = BatchLimit.automatic(torch.device(device), Silent())
    run(found, [4096] * 5 + [8] * 5000, size, worker)
    assert len(worker.done[0]) < len(worker.done[-2]) <= found.rows
    assert max(len(batch) * max(batch) for batch in worker.done) <= found.tokens


# The memory runs out


@pytest.mark.parametrize("rows", range(1, 18))
def test_out_of_memory_halves_for_good_and_every_item_is_done_once(rows: int) -> None:
    items = [*range(1, 38)]
    limited, worker = limit(rows=16), Worker(rows=rows)
    found = run(limited, items, size, worker)
    assert found == worker.done
    assert [i for batch in found for i in batch] == items[::-1]
    failed = [len(batch) for batch in worker.tried if batch not in worker.done]
    assert failed == [n for n in (16, 8, 4, 2) if n > rows]
    assert len(warnings(limited)) == len(failed)
    assert limited.rows == max(n for n in (1, 2, 4, 8, 16) if n <= rows)
    again = Worker()  # later work does not retry the size that did not fit
    run(limited, [1, 1, 1, 1, 1], size, again)
    assert len(again.done[0]) == min(limited.rows, 5)


def test_a_halving_is_said_aloud() -> None:
    limited = limit(rows=8)
    run(limited, [7, *[5] * 9], size, Worker(rows=2))
    assert warnings(limited) == [
        "Out of memory with 8 sequences of up to 7 tokens; continuing with 4 at a time.",
        "Out of memory with 4 sequences of up to 7 tokens; continuing with 2 at a time.",
    ]


def test_where_tokens_are_bounded_short_sequences_still_go_many_at_a_time_after_a_halving() -> None:
    limited, worker = limit(tokens=1000), Worker(tokens=600)
    run(limited, [100] * 12 + [10] * 12, size, worker)
    assert [*map(len, worker.done)] == [5, 5, 5, 9]
    assert (limited.rows, limited.tokens) == (10**6, 500)


def test_a_limit_never_grows() -> None:
    limited = limit(rows=64, tokens=4096)
    for rows, tokens in [
        (40, math.inf),
        (math.inf, 900),
        (3, 200),
        (math.inf, math.inf),
        (1, math.inf),
    ]:
        before = (limited.rows, limited.tokens)
        run(limited, [*range(1, 90)], size, Worker(rows, tokens))
        assert limited.rows <= before[0]
        assert limited.tokens <= before[1]
    assert limited.tokens < 200


def test_a_single_item_that_does_not_fit_is_told_with_what_to_type() -> None:
    limited, worker = limit(rows=4), Worker(tokens=50)
    with pytest.raises(ResourceError, match="single sequence of 77 tokens") as caught:
        run(limited, [77, 12, 12, 12, 12], size, worker)
    for told in ("--bits 4", "--num-fewshot", "a smaller model"):
        assert told in str(caught.value)
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)
    assert [*map(len, worker.tried)] == [4, 2, 1]


def test_the_tensors_of_a_failed_batch_are_free_before_the_next_one() -> None:
    class Tensor:
        pass

    alive: list[weakref.ref[Tensor]] = []

    def work(batch: Sequence[int]) -> None:
        assert [held() for held in alive] == [None] * len(alive)
        tensor = Tensor()
        tensor.itself = tensor  # type: ignore[attr-defined]  # a cycle: counting is not enough
        alive.append(weakref.ref(tensor))
        if len(batch) > 1:
            raise torch.OutOfMemoryError(CUDA_FULL)
        del tensor.itself  # type: ignore[attr-defined]

    gc.disable()
    try:
        run(limit(rows=8), [5] * 8, size, work)
    finally:
        gc.enable()
    assert len(alive) == 3 + 8


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError(),
        RuntimeError("two", "parts"),
        RuntimeError(ValueError("no text")),
        ValueError("out of memory."),
        MemoryError(),
        ResourceError("The disk is full."),
        KeyboardInterrupt(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("rows", [1, 4])
def test_other_errors_pass_through_at_once(error: BaseException, rows: int) -> None:
    tried: list[int] = []

    def work(batch: Sequence[int]) -> None:
        tried.append(len(batch))
        raise error

    limited = limit(rows=rows)
    with pytest.raises(type(error)) as caught:
        run(limited, [1, 2, 3, 4], size, work)
    assert caught.value is error
    assert tried == [rows]
    assert (limited.rows, warnings(limited)) == (rows, [])


# Batches within batches, as the rows after several prefixes


def nested(
    limited: BatchLimit, outer: Callable[[Sequence[int]], None], inner: Callable[[Any, int], None]
) -> Callable[[Sequence[int]], None]:
    """Work on prefixes; each has four rows, which `inner` does in batches of the same limit."""

    def work(prefixes: Sequence[int]) -> None:
        outer(prefixes)
        rows = [(prefix, i) for prefix in prefixes for i in range(4)]
        run(limited, rows, lambda row: 3, lambda batch: inner(batch, len(prefixes)))

    return work


def test_work_may_run_batches_of_its_own() -> None:
    limited, prefixes = limit(rows=8), Worker()
    done: list[tuple[int, int]] = []

    def inner(batch: Sequence[tuple[int, int]], _: int) -> None:
        if len(batch) > 3:
            raise torch.OutOfMemoryError(CUDA_FULL)
        done.extend(batch)

    run(limited, [*range(10, 20)], lambda _: 3, nested(limited, prefixes, inner))
    assert sorted(done) == [(prefix, i) for prefix in range(10, 20) for i in range(4)]
    assert [*map(len, prefixes.done)] == [8, 2]  # the rows shrank, and so did the next batches
    assert limited.rows == 2
    assert len(warnings(limited)) == 2


def test_a_single_row_that_does_not_fit_beside_many_prefixes_is_tried_beside_fewer() -> None:
    limited, prefixes = limit(rows=8), Worker()
    done: set[tuple[int, int]] = set()

    def inner(batch: Sequence[tuple[int, int]], beside: int) -> None:
        if beside > 2:
            raise torch.OutOfMemoryError(CUDA_FULL)
        done.update(batch)

    run(limited, [*range(10, 18)], size, nested(limited, prefixes, inner))
    assert sorted(done) == [(prefix, i) for prefix in range(10, 18) for i in range(4)]
    assert len(prefixes.done[0]) == 8
    assert limited.rows == 2  # halving the rows in vain is undone


def test_a_row_that_does_not_fit_beside_a_single_prefix_is_told() -> None:
    limited = limit(rows=2)

    def inner(batch: Sequence[tuple[int, int]], beside: int) -> None:
        raise torch.OutOfMemoryError(CUDA_FULL)

    with pytest.raises(ResourceError, match="single sequence of 3 tokens") as caught:
        run(limited, [10, 11], size, nested(limited, Worker(), inner))
    assert isinstance(caught.value.__cause__, torch.OutOfMemoryError)


# What is taken for a lack of memory


def test_the_cpu_allocators_own_error_is_a_lack_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(CUDA_FULL),
        torch.OutOfMemoryError(),
        RuntimeError(CUDA_FULL),
        RuntimeError("[enforce fail] err == 0. DefaultCPUAllocator: can't allocate memory: you …"),
    ],
    ids=repr,
)
def test_a_lack_of_memory_is_recognised(error: Exception) -> None:
    assert out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError(),
        RuntimeError(3),
        RuntimeError(KeyError("model")),
        ValueError(CUDA_FULL),
        PtpError(CUDA_FULL),
    ],
    ids=repr,
)
def test_other_errors_are_no_lack_of_memory(error: Exception) -> None:
    assert not out_of_memory(error)

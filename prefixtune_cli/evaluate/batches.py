"""Does work in batches of sequences of similar length; halves a batch that runs out of memory and tries again."""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from prefixtune_cli.errors import ResourceError
from prefixtune_cli.progress import Reporter

Item = TypeVar("Item")
Result = TypeVar("Result")

TOKENS_ON_CPU = 8192  # larger batches are no faster on a few cores
TOKENS_ON_GPU = 32768
ROWS = 1024


@dataclass
class BatchLimit:
    """The size of one forward pass. When memory runs out, it shrinks for good.

    Attributes:
        rows: the most sequences.
        tokens: the most tokens, including padding; a longer sequence is a batch of its own.
        reporter: hears of every halving.
    """

    rows: int
    tokens: int
    reporter: Reporter

    @classmethod
    def automatic(cls, device: torch.device, reporter: Reporter) -> BatchLimit:
        """A generous limit, by tokens only: a batch that does not fit is halved."""
        return cls(ROWS, TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_GPU, reporter)

    @classmethod
    def of_rows(cls, rows: int, reporter: Reporter) -> BatchLimit:
        """At most `rows` sequences of any length."""
        return cls(rows, 2**62, reporter)

    def run(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        work: Callable[[Sequence[Item]], Iterable[Result]],
    ) -> Iterator[Result]:
        """What `work` yields for batches of `items`. The longest come first, so that a lack of memory shows at once.

        Args:
            items: in any order.
            length: gives the tokens of one item.
            work: does one batch. If memory runs out, it is called again with half of the batch, and may yield the same
                results once more. It may run inner batches; if one inner item does not fit, a smaller outer batch may
                leave room for it.

        Raises:
            ResourceError: a single item does not fit in memory.
        """
        waiting = sorted(items, key=length, reverse=True)
        done = 0
        while done < len(waiting):
            longest = max(1, length(waiting[done]))
            count = max(1, min(self.rows, self.tokens // longest, len(waiting) - done))
            before = self.rows, self.tokens
            if (yield from self._fits(work, waiting[done : done + count], longest)):
                done += count
            else:
                self.rows, self.tokens = before  # halving the inner batches did not help
                self._halve(count, longest)

    def _fits(
        self, work: Callable[[Sequence[Item]], Iterable[Result]], batch: list[Item], longest: int
    ) -> Generator[Result, None, bool]:
        try:
            yield from work(batch)
        except Exception as error:
            inner = error.__cause__ if isinstance(error, ResourceError) else None
            if not out_of_memory(inner or error) or (inner and len(batch) == 1):
                raise
            if len(batch) == 1:
                raise ResourceError(
                    f"Not even a single sequence of {longest} tokens fits in memory. Try --bits 4, a smaller "
                    "--num-fewshot, or a smaller model."
                ) from error
        else:
            return True
        # Not in the handler: while it runs, the traceback still holds the batch's tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _halve(self, count: int, longest: int) -> None:
        """Halve the limit that the batch reached: the rows, or else the tokens, so that many short rows still fit."""
        half = max(1, count // 2)
        if count == self.rows:
            self.rows = half
        else:
            self.tokens = half * longest
        self.reporter.warning(
            f"Out of memory with {count} sequences of up to {longest} tokens; continuing with {half} at a time."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether `error` is a lack of memory, so that a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # accelerate expects an argument of type str, and fails on RuntimeError(3).
    return isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error)))

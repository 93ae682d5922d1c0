"""Work in batches of sequences of similar length; a batch that runs out of memory is halved and done again."""

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
    """How much goes into one forward pass; shrinks for good where the memory runs out.

    Attributes:
        rows: most sequences.
        tokens: most tokens, padding included; a sequence that is longer goes alone.
        reporter: hears of every halving.
    """

    rows: int
    tokens: int
    reporter: Reporter

    @classmethod
    def automatic(cls, device: torch.device, reporter: Reporter) -> BatchLimit:
        """Bounded by tokens alone, generously: what does not fit is halved."""
        return cls(ROWS, TOKENS_ON_CPU if device.type == "cpu" else TOKENS_ON_GPU, reporter)

    @classmethod
    def of_rows(cls, rows: int, reporter: Reporter) -> BatchLimit:
        """At most `rows` sequences, however long."""
        return cls(rows, 2**62, reporter)

    def run(
        self,
        items: Sequence[Item],
        length: Callable[[Item], int],
        work: Callable[[Sequence[Item]], Iterable[Result]],
    ) -> Iterator[Result]:
        """What `work` yields of batches of `items`, the longest first, so that what does not fit shows at once.

        Args:
            items: in any order.
            length: the tokens of one item.
            work: does one batch; it is called again with half of it where the memory ran out, and may then yield the
                same once more. It may run batches of its own; where one item of these does not fit, fewer of ours at a
                time may leave it room.

        Raises:
            ResourceError: the memory does not suffice for a single item.
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
                self.rows, self.tokens = before  # batches of work's own were halved in vain
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
                    f"The memory does not suffice for a single sequence of {longest} tokens. Try --bits 4, a smaller "
                    "--num-fewshot, or a smaller model."
                ) from error
        else:
            return True
        # Outside of the handler: there the traceback still holds the batch's tensors.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return False

    def _halve(self, count: int, longest: int) -> None:
        """Of rows that are bounded, the number; else the tokens, so that shorter rows still go many at a time."""
        half = max(1, count // 2)
        if count == self.rows:
            self.rows = half
        else:
            self.tokens = half * longest
        self.reporter.warning(
            f"Out of memory with {count} sequences of up to {longest} tokens; going on with {half} at a time."
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether a smaller batch may help."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    # accelerate expects one text, and fails on RuntimeError(3).
    return isinstance(error, RuntimeError) and should_reduce_batch_size(RuntimeError(str(error)))

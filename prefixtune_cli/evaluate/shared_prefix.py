"""Computes log-likelihoods of continuations, with one forward pass for each prefix that several sequences share.

Examples that come before many questions, and a question that comes before its choices, are computed once. The rows
that follow a prefix read its keys and values from the cache. `plan` chooses the prefixes so that as few tokens as
possible are computed. Some caches do not allow this: a window that slid past the prefix, a recurrent state, or
virtual tokens that already fill the cache. Then every sequence is computed whole.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.model import cache_name

Scored = tuple[float, bool]
TOKENS_A_JOB = 32  # the overhead of one more forward pass, in tokens


@dataclass(frozen=True)
class Request:
    """A continuation to score after its context: token ids; neither is empty."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One sequence for the model, and all requests that it scores.

    Attributes:
        tokens: context and continuation without the last token, which is predicted but never read.
        first: the earliest position whose logits predict a token of a continuation.
        requests: the indices of the requests.
    """

    tokens: tuple[int, ...]
    first: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class Job:
    """Rows that share their first `prefix` tokens, which are computed once; 0 computes each row whole."""

    prefix: int
    rows: tuple[Row, ...]


def rows_of(requests: Sequence[Request], max_length: int) -> list[Row]:
    """The distinct sequences of the requests, cut from the left to `max_length` tokens."""
    found: dict[tuple[int, ...], tuple[int, list[int]]] = {}
    for i, request in enumerate(requests):
        tokens = (request.context + request.continuation)[-(max_length + 1) : -1]
        first, members = found.setdefault(tokens, (len(tokens), []))
        members.append(i)
        found[tokens] = (max(0, min(first, len(tokens) - len(request.continuation))), members)
    return [Row(tokens, first, tuple(members)) for tokens, (first, members) in found.items()]


@dataclass
class _Node:
    """Neighbours in sorted order that share their first `depth` tokens, and the cheapest jobs for them."""

    depth: int
    rows: list[Row]
    cost: int
    jobs: list[Job]

    def absorb(self, child: _Node) -> None:
        self.rows += child.rows
        self.cost += child.cost
        self.jobs += child.jobs

    def settle(self) -> _Node:
        """Replace the jobs by one that computes the shared prefix once, if that is cheaper."""
        prefix = min(self.depth, min(row.first for row in self.rows))
        cost = TOKENS_A_JOB + prefix + sum(len(row.tokens) - prefix for row in self.rows)
        if prefix and cost < self.cost:
            return _Node(self.depth, self.rows, cost, [Job(prefix, tuple(self.rows))])
        return self


def plan(rows: Sequence[Row]) -> list[Job]:
    """The jobs that compute the fewest tokens, if each row shares one prefix at most.

    Walks the tree of common prefixes (the intervals of the array of longest common prefixes) from its leaves up. At
    every node, it keeps the cheaper of two plans: the jobs of the node's children, or one job for the node.
    """
    rows = sorted(rows, key=lambda row: row.tokens)
    stack: list[_Node] = []
    for i, row in enumerate(rows):
        last = _Node(len(row.tokens), [row], len(row.tokens), [Job(0, (row,))])
        shared = _common(row.tokens, rows[i + 1].tokens) if i + 1 < len(rows) else 0
        while stack and stack[-1].depth > shared:
            stack[-1].absorb(last)
            last = stack.pop().settle()
        if stack and stack[-1].depth == shared:
            stack[-1].absorb(last)
        else:
            stack.append(_Node(shared, list(last.rows), last.cost, list(last.jobs)))
    return stack[0].jobs if stack else []


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The number of first tokens that two sequences share. It bisects, because comparing slices is fast."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def log_likelihoods(
    model: Any,
    requests: Sequence[Request],
    *,
    max_length: int,
    pad_id: int,
    limit: BatchLimit,
) -> Iterator[dict[int, Scored]]:
    """Score every request: the summed log-probability of its continuation in nats, and whether greedy decoding
    would produce it.

    Args:
        model: a causal language model, adapted or not, in evaluation mode.
        requests: what to score; a context that exceeds `max_length` is cut from the left.
        max_length: the most tokens of a sequence.
        pad_id: any token.
        limit: the size of a batch.

    Yields:
        {index of a request: its score} after each batch; a halved batch may yield some scores twice.

    The softmax is in float32 for every precision of the model.
    """
    rows = rows_of(requests, max_length)
    jobs = plan(rows) if _shares(model, max(len(row.tokens) for row in rows)) else []
    reader = _Reader(model, requests, pad_id, limit)
    whole = [row for job in jobs if not job.prefix for row in job.rows] if jobs else rows
    yield from limit.run([job for job in jobs if job.prefix], lambda job: job.prefix, reader.read)
    yield from limit.run(whole, lambda row: len(row.tokens), reader.read_whole)


def _shares(model: Any, longest: int) -> bool:
    """Whether several rows can read the keys and values of a prefix.

    There may be padding between a prefix and its rows, and only attention with a mask skips it. Models that count the
    positions in the cache themselves, as those with ALiBi do, do not use transformers' attention interface.
    """
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    if is_prompt_learning(model) or not getattr(inner, "_supports_attention_backend", False):
        return False
    layers = DynamicCache(config=model.config).layers
    return all(
        type(layer) is DynamicLayer
        or (type(layer) is DynamicSlidingWindowLayer and longest < layer.sliding_window)
        for layer in layers
    )


def is_prompt_learning(model: Any) -> bool:
    """Whether the model has an adapter of virtual tokens, such as Prefix-Tuning's."""
    return isinstance(model, PeftModel) and bool(model.active_peft_config.is_prompt_learning)


class _PrefixLayer(DynamicLayer):
    """One layer's keys and values of the prefixes. Rows read them, and they never grow, so that only one layer's are
    copied at a time.

    Args:
        keys, values: [prefixes, heads, tokens, width].
        prefix_of_row: [rows].
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, prefix_of_row: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.prefix_of_row = keys, values, prefix_of_row
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        rows = self.prefix_of_row
        return (
            torch.cat([self.keys[rows], key_states], dim=-2),
            torch.cat([self.values[rows], value_states], dim=-2),
        )


class _Reader:
    """Runs jobs and hands out scores."""

    def __init__(
        self, model: Any, requests: Sequence[Request], pad_id: int, limit: BatchLimit
    ) -> None:
        self.model, self.requests, self.pad_id, self.limit = model, requests, pad_id, limit
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        self.accepted = set(inspect.signature(inner.forward).parameters)
        self.cache_name = cache_name(inner)

    def read_whole(self, rows: Sequence[Row]) -> Iterator[dict[int, Scored]]:
        """Score rows that share nothing. They are padded on the right, where no causal model looks."""
        ids, mask = self._padded([row.tokens for row in rows], "right")
        longest = ids.shape[1]
        keep = longest - min(row.first for row in rows)
        logits = self._forward(ids, mask, None, None, keep=keep)
        own = [
            its[: keep - longest + len(row.tokens)] for its, row in zip(logits, rows, strict=True)
        ]
        yield self._scores(rows, own)

    def read(self, jobs: Sequence[Job]) -> Iterator[dict[int, Scored]]:
        """Compute several prefixes at a time, then the rows that follow them, in batches."""
        ids, mask = self._padded([job.rows[0].tokens[: job.prefix] for job in jobs])
        cache = DynamicCache(config=self.model.config)
        self._forward(ids, mask, _positions(mask), cache, keep=1)
        rows = [(i, row) for i, job in enumerate(jobs) for row in job.rows]

        def score(batch: Sequence[tuple[int, Row]]) -> Iterator[dict[int, Scored]]:
            index = torch.tensor([i for i, _ in batch], device=ids.device)
            layers = [_PrefixLayer(layer.keys, layer.values, index) for layer in cache.layers]
            prefixes = [jobs[i].prefix for i, _ in batch]
            yield self._score(
                [row for _, row in batch], prefixes, Cache(layers=layers), mask[index]
            )

        # A prefix token is read, not computed; we guess that it costs an eighth of a token.
        yield from self.limit.run(
            rows, lambda r: len(r[1].tokens) - (7 * jobs[r[0]].prefix) // 8, score
        )

    def _score(
        self, rows: Sequence[Row], prefixes: Sequence[int], cache: Cache, prefix_mask: torch.Tensor
    ) -> dict[int, Scored]:
        """Score the requests of `rows`; the first `prefixes` tokens of each row are in the cache."""
        ids, mask = self._padded(
            [row.tokens[start:] for row, start in zip(rows, prefixes, strict=True)]
        )
        positions = _positions(mask) + torch.tensor(prefixes, device=ids.device)[:, None]
        width = max(len(row.tokens) - row.first for row in rows)
        mask = torch.cat([prefix_mask, mask], dim=1)
        return self._scores(rows, self._forward(ids, mask, positions, cache, keep=width))

    def _scores(self, rows: Sequence[Row], logits: Iterable[torch.Tensor]) -> dict[int, Scored]:
        """The scores of all requests of `rows`; `logits` has [some, vocabulary] of each row, up to its last token."""
        scores: dict[int, Scored] = {}
        for row, its in zip(rows, logits, strict=True):
            log_probabilities = its.float().log_softmax(-1)
            likeliest = log_probabilities.argmax(-1)
            for i in row.requests:
                target = torch.tensor(self.requests[i].continuation, device=its.device)
                target = target[-len(its) :]
                chosen = log_probabilities[-len(target) :].gather(-1, target[:, None])
                greedy = bool((likeliest[-len(target) :] == target).all())
                scores[i] = (float(chosen.sum()), greedy)
        return scores

    @torch.no_grad()
    def _forward(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        positions: torch.Tensor | None,
        cache: Cache | None,
        *,
        keep: int,
    ) -> torch.Tensor:
        """Logits of the last `keep` positions: [rows, keep, vocabulary]."""
        arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        arguments["use_cache"] = cache is not None
        if cache is not None:
            arguments[self.cache_name] = cache
        if positions is not None and "position_ids" in self.accepted:
            arguments["position_ids"] = positions
        if "logits_to_keep" in self.accepted:
            arguments["logits_to_keep"] = keep
        logits: torch.Tensor = self.model(**arguments).logits
        return logits[:, -keep:]

    def _padded(
        self, rows: Sequence[Sequence[int]], side: str = "left"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask, padded on one side: [rows, longest]."""
        ids = [torch.tensor(row) for row in rows]
        ones = [torch.ones_like(row) for row in ids]
        device = self.model.device
        return (
            pad_sequence(ids, True, self.pad_id, side).to(device),
            pad_sequence(ones, True, 0, side).to(device),
        )


def _positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)

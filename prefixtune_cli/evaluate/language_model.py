"""The model as lm-eval sees it: lm-eval's own Hugging Face model, with our scoring, batching and cache.

It inherits every rule that figures depend on: how text becomes tokens, where a context is cut, what ends an answer.
It changes only how the work is done. It tokenizes all texts together, once. It computes shared prefixes once
(`shared_prefix`). It bounds batches by tokens, and halves them when memory runs out. It keeps every finished request
on disk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import has_bos_prefix, normalize_gen_kwargs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli.errors import ModelError
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.losses import check_numbers
from prefixtune_cli.evaluate.shared_prefix import Request, Scored, log_likelihoods
from prefixtune_cli.progress import Reporter

# lm-eval's default, for a request that sets no number.
GENERATED_TOKENS = 256


class BenchmarkLM(HFLM):
    """One loaded base with its tokenizer; `turn` sets which of the models on it answers.

    Args:
        base: the base model.
        tokenizer: its tokenizer.
        limit: the size of a batch.
        reporter: hears how many requests are done.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        limit: BatchLimit,
        reporter: Reporter,
    ) -> None:
        super().__init__(pretrained=base, tokenizer=tokenizer, batch_size=1)
        self.limit, self.reporter = limit, reporter
        self.bench = ""
        self.versions: dict[str, Any] = {}
        self.cache = AnswerCache(None, {})
        self._who = ""
        self._ids: dict[str, list[int]] = {}
        self._tokenized: tuple[list[tuple[Any, ...]], list[Any]] | None = None
        self.cut: dict[str, int] = {}  # type of request → number of prompts cut from the left

    def turn(
        self, bench: str, who: str, model: Any, cache: AnswerCache, versions: dict[str, Any]
    ) -> None:
        """From now on `model` answers, under the name `who`; `versions` are those of the tasks."""
        if bench != self.bench:  # forget the texts of the last benchmark
            self._ids.clear()
            self._tokenized, self.cut = None, {}
        self.bench, self.versions, self.cache, self._who = bench, versions, cache, who
        self._model = model

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """Like lm-eval's, but looks up texts that `_tokenize` has tokenized."""
        if add_special_tokens is None and left_truncate_len is None and string in self._ids:
            return self._ids[string]
        ids: list[int] = super().tok_encode(string, add_special_tokens, left_truncate_len, **kwargs)
        return ids

    def _tokenize(self, texts: Sequence[str]) -> None:
        """Tokenize all of `texts` at once, each as `tok_encode` does."""
        start = self.tokenizer.decode(self.prefix_token_id)
        for has_start in (False, True):
            chosen = [
                text
                for text in dict.fromkeys(texts)
                if text not in self._ids and has_bos_prefix(text, start) is has_start
            ]
            if chosen:
                special = {"add_special_tokens": False} if has_start else {}
                encoded = self.tokenizer(chosen, verbose=False, **special)["input_ids"]
                self._ids.update(zip(chosen, encoded, strict=True))

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """See lm-eval; finished requests come from the disk."""
        pairs = self._pairs(requests)

        def answer(missing: list[int]) -> Iterator[dict[int, Any]]:
            done = set(range(len(requests))) - set(missing)
            self._progress(len(done), len(requests))
            for scores in self._score([pairs[i] for i in missing]):
                named = {missing[i]: score for i, score in scores.items()}
                yield named
                done.update(named)  # a halved batch may give some scores twice
                self._progress(len(done), len(requests))

        found = self.cache.complete(self._keys(requests), answer)
        check_numbers([score for score, _ in found], f"{self.bench}, {self._who}")
        return [(float(score), bool(greedy)) for score, greedy in found]

    def _pairs(self, requests: list[Instance]) -> list[tuple[Any, list[int], list[int]]]:
        """(None, context, continuation) of each request as token ids; all models share them."""
        arguments = [request.args for request in requests]
        if self._tokenized is None or self._tokenized[0] != arguments:
            self._tokenize([text for context, rest in arguments for text in _texts(context, rest)])
            pairs = [self._pair(*pair) for pair in arguments]
            self._tokenized = (arguments, pairs)
            self._ids.clear()
            longest = self.max_length + 1
            self.cut["score"] = sum(
                len(context) + len(rest) > longest for _, context, rest in pairs
            )
        return self._tokenized[1]

    def _pair(self, context: str, continuation: str) -> tuple[None, list[int], list[int]]:
        if context:
            return (None, *self._encode_pair(context, continuation))
        # The context is empty: the token that begins a text replaces it, unless the text has that token.
        ids = self.tok_encode(continuation, add_special_tokens=False)
        if ids[0] == self.prefix_token_id:
            return None, ids[:1], ids[1:]
        return None, [self.prefix_token_id], ids

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Scores of (text, context ids, continuation ids), for the windows of a long text."""
        scores = {i: score for found in self._score(requests) for i, score in found.items()}
        return [scores[i] for i in range(len(requests))]

    def _score(self, pairs: Sequence[Any]) -> Iterator[dict[int, Scored]]:
        """The scores of `pairs` by index, batch by batch."""
        return log_likelihoods(
            self._model,
            [Request(tuple(context), tuple(rest)) for _, context, rest in pairs],
            max_length=self.max_length,
            pad_id=self.tokenizer.pad_token_id or 0,
            limit=self.limit,
        )

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """See lm-eval; each finished text is kept on disk."""

        def answer(missing: list[int]) -> Iterator[dict[int, float]]:
            before = len(requests) - len(missing)
            self._progress(before, len(requests))
            self.batch_size_per_gpu = 2**30  # all windows of a text: `limit` makes the batches
            for done, i in enumerate(missing, start=before + 1):
                [value] = HFLM.loglikelihood_rolling(self, [requests[i]], disable_tqdm=True)
                yield {i: value}
                self._progress(done, len(requests))

        return [float(value) for value in self.cache.complete(self._keys(requests), answer)]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See lm-eval; sampled answers are not kept on disk, because each must be a new draw.

        Raises:
            ModelError: the task allows answers as long as the model's whole window.
        """
        longest = max(_most_tokens(request) for request in requests)
        if longest >= self.max_length:
            raise ModelError(
                f"{self.bench} lets a model write {longest:,} tokens, but this one sees only {self.max_length:,} "
                "tokens in all. Use a base with a longer window."
            )
        self._tokenize([request.args[0] for request in requests])
        self.cut["generate"] = sum(self._generation_length(r) > self.max_length for r in requests)

        def work(batch: Sequence[int]) -> Iterator[dict[int, str]]:
            self.batch_size_per_gpu = len(batch)
            said = HFLM.generate_until(self, [requests[i] for i in batch], disable_tqdm=True)
            yield dict(zip(batch, said, strict=True))

        def answer(missing: list[int]) -> Iterator[dict[int, str]]:
            done = len(requests) - len(missing)
            self._progress(done, len(requests))
            for settings in {str(requests[i].args[1]) for i in missing}:
                chosen = [i for i in missing if str(requests[i].args[1]) == settings]
                lengths = {i: self._generation_length(requests[i]) for i in chosen}
                for said in self.limit.run(chosen, lengths.__getitem__, work):
                    yield said
                    done += len(said)
                    self._progress(done, len(requests))

        drawn = any(_settings(request)["do_sample"] for request in requests)
        cache = AnswerCache(None, {}) if drawn else self.cache
        return [str(text) for text in cache.complete(self._keys(requests), answer)]

    def _generation_length(self, request: Instance) -> int:
        return len(self.tok_encode(request.args[0])) + _most_tokens(request)

    def _keys(self, requests: list[Instance]) -> list[list[Any]]:
        """All that an answer depends on, besides the model."""
        return [
            [r.request_type, r.task_name, self.versions.get(str(r.task_name)), *r.args]
            for r in requests
        ]

    def _progress(self, done: int, total: int) -> None:
        self.reporter.progress(f"{self.bench}, {self._who}", done, total, {})


def _most_tokens(request: Instance) -> int:
    """How long an answer may be."""
    return int(_settings(request)["max_gen_toks"])


def _settings(request: Instance) -> dict[str, Any]:
    """The settings of a generation, under lm-eval's names for them."""
    return dict(normalize_gen_kwargs(dict(request.args[1]), GENERATED_TOKENS))


def _texts(context: str, continuation: str) -> tuple[str, ...]:
    """The texts that `_encode_pair` tokenizes for a pair."""
    return (context.rstrip(), context + continuation) if context else ()

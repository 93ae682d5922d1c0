"""Gets the losses of rows, and answers to questions, from one model.

Training's held-out rows, the user's own data and plain text are all scored here, with the base and with the adapter,
so that only the adapter makes two figures differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.questions import Question
from prefixtune_cli.generate import answer_batched
from prefixtune_cli.progress import Reporter
from prefixtune_cli.sampling import Sampling

Example = Mapping[str, Sequence[int]]  # input_ids and labels, MASKED for a token without a loss
Compute = Callable[[Sequence[int], Callable[[int], object]], Sequence[Any]]


@dataclass(frozen=True)
class Scorer:
    """One model, and how to ask it.

    Attributes:
        model: a causal language model, adapted or not.
        tokenizer: its tokenizer.
        limit: the size of a batch.
        reporter: hears the progress.
        cache: has the model's earlier losses and answers, and keeps new ones batch by batch.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    limit: BatchLimit
    reporter: Reporter
    cache: AnswerCache = field(default_factory=lambda: AnswerCache(None, {}))

    def losses(self, examples: Sequence[Example], task: str) -> list[tuple[float, int]]:
        """Each row's cross-entropy in nats, summed over its predicted tokens, and the number of these tokens.

        Args:
            examples: token ids and labels; the model does not predict the first token of a row.
            task: the name of the work in progress messages.

        Raises:
            ResourceError: a single row does not fit in memory, or the cache does not fit on the disk.
        """
        found = self._complete(
            [{"type": "loss", **example} for example in examples],
            [len(example["input_ids"]) for example in examples],
            lambda batch, _: self._losses([examples[i] for i in batch]),
            task,
        )
        return [(nats, int(tokens)) for nats, tokens in found]

    def divergences(self, examples: Sequence[Example], task: str) -> list[tuple[float, int]]:
        """Each row's KL divergence of the adapted model from its base, in nats, summed over the predicted tokens.

        It is Σ p·log(p/q) over the whole vocabulary, with p the adapted model's probabilities and q the base's, at each
        token that has a label. The arguments and the errors are those of `losses`; nothing is kept in the cache.
        """
        lengths, found = [len(row["input_ids"]) for row in examples], dict[int, list[float]]()
        with models.evaluating(self.model):
            for some in self._batches(
                range(len(examples)),
                lengths,
                lambda batch, _: self._divergences([examples[i] for i in batch]),
                task,
            ):
                found |= some
        return [
            (nats, int(tokens)) for nats, tokens in map(found.__getitem__, range(len(examples)))
        ]

    def answers(
        self,
        questions: Sequence[Question],
        task: str,
        *,
        max_new_tokens: int,
        end_id: int | None,
    ) -> list[str]:
        """Each question's answer by greedy decoding, of at most `max_new_tokens` tokens; `end_id` ends an answer.

        For `task` and the errors, see `losses`.
        """

        def answer(batch: Sequence[int], told: Callable[[int], object]) -> list[str]:
            return answer_batched(
                self.model,
                self.tokenizer,
                [questions[i].prompt for i in batch],
                end_id=end_id,
                sampling=Sampling(max_new_tokens=max_new_tokens),
                batch_size=len(batch),
                told=told,
            )

        how = {"max_new_tokens": max_new_tokens, "end_id": end_id}
        return self._complete(
            [{"type": "answer", "input_ids": q.prompt, **how} for q in questions],
            [len(q.prompt) + max_new_tokens for q in questions],
            answer,
            task,
        )

    def _complete(
        self, requests: Sequence[Any], lengths: Sequence[int], compute: Compute, task: str
    ) -> list[Any]:
        """The kept results for `requests`, and the results of `compute` for batches of the others.

        `compute` takes the indices of a batch and a function that it may call with the number of items done so far.
        """
        with models.evaluating(self.model):
            return self.cache.complete(
                requests, lambda missing: self._batches(missing, lengths, compute, task)
            )

    def _batches(
        self, rows: Sequence[int], lengths: Sequence[int], compute: Compute, task: str
    ) -> Iterator[dict[int, Any]]:
        """Yield {row: value} for each batch."""
        done = 0

        def told(more: int) -> None:
            self.reporter.progress(task, done + more, len(rows), {})

        def work(batch: Sequence[int]) -> Iterator[dict[int, Any]]:
            def some(made: int) -> None:
                if made < len(batch):  # a whole batch is reported after it is kept
                    told(made)

            yield dict(zip(batch, compute(batch, some), strict=True))

        if rows:
            told(0)  # says that the work has begun: the first batch may take minutes
        for found in self.limit.run(rows, lengths.__getitem__, work):
            yield found
            done += len(found)
            told(0)

    def _losses(self, batch: Sequence[Example]) -> list[list[float]]:
        """[nats, predicted tokens] of each row."""
        nats = [
            F.cross_entropy(logits, wanted, reduction="sum")
            for logits, wanted in self._predictions(batch)
        ]
        return _with_counts(nats, batch)

    def _divergences(self, batch: Sequence[Example]) -> list[list[float]]:
        """As `_losses`, of the adapted model from its base."""
        with models.without_adapter(self.model):
            of_base = [logits.log_softmax(-1) for logits, _ in self._predictions(batch)]
        nats = [
            F.kl_div(q, logits.log_softmax(-1), reduction="sum", log_target=True)
            for q, (logits, _) in zip(of_base, self._predictions(batch), strict=True)
        ]
        return _with_counts(nats, batch)

    @torch.no_grad()
    def _predictions(self, batch: Sequence[Example]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """For each row, the logits of its predicted tokens [tokens, vocabulary] and their ids [tokens].

        The logits are in float32 for every precision of the model. They are computed only at positions at which some
        row of the batch has a label.
        """

        def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
            found = [torch.tensor(row) for row in rows]
            return pad_sequence(found, True, value).to(self.model.device)

        ids = padded([row["input_ids"] for row in batch], self.tokenizer.pad_token_id or 0)
        mask = padded([[1] * len(row["input_ids"]) for row in batch], 0)
        targets = padded([row["labels"] for row in batch], MASKED)[:, 1:]
        chosen = targets != MASKED
        columns = chosen.any(dim=0).nonzero()[:, 0]
        from_end = columns - ids.shape[1]  # virtual tokens may come before the row's own
        given = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
        if _chooses_logits(self.model):
            logits = self.model(**given, logits_to_keep=from_end).logits
        else:
            logits = self.model(**given).logits[:, from_end]
        # Row by row, so that only one row at a time is in float32.
        for row, wanted, picked in zip(
            logits, targets[:, columns], chosen[:, columns], strict=True
        ):
            yield row[picked].float(), wanted[picked]


def _with_counts(nats: list[torch.Tensor], batch: Sequence[Example]) -> list[list[float]]:
    """Each row's figure with the number of its predicted tokens."""
    counts = [sum(label != MASKED for label in row["labels"][1:]) for row in batch]
    return [[n, float(c)] for n, c in zip(torch.stack(nats).tolist(), counts, strict=True)]


def _chooses_logits(model: PreTrainedModel) -> bool:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters

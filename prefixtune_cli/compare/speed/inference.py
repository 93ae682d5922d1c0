"""The first token of an answer to a long prompt, and the tokens after it, by direct calls of the model.

`generate` makes the same passes. But between them it does work in Python that, with a small model, takes as long as
the model itself, and this hides the differences between methods.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from prefixtune_cli.model import cache_name


class Answer:
    """The answers to some prompts, by greedy decoding; no token ends them early.

    peft puts virtual tokens before a prompt only in its own `forward` and `generate`, and again in every call. So this
    class puts them there: Prefix-Tuning's into the cache, and those of prompt tuning and similar methods before the
    embedded prompt. All other adapters are modules within the base, which is called without peft's pass around it.

    Args:
        model: the base, or the base with an adapter, in evaluation mode.
        prompts: token ids, [prompts, tokens].
    """

    def __init__(self, model: PeftModel | PreTrainedModel, prompts: Tensor) -> None:
        self.model, self.prompts = model, prompts
        self.base = cast(
            PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model
        )
        accepted = inspect.signature(self.base.forward).parameters
        self.last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}
        self.cache_name = cache_name(self.base)
        self.cache: Any = None
        # Of the last tokens: [prompts, vocabulary] and [prompts, 1].
        self.logits = self.token = torch.empty(0)

    @torch.no_grad()
    def begin(self) -> None:
        """Compute the whole prompts, and choose the first tokens."""
        self.cache = None
        self._next(**self._inputs())

    @torch.no_grad()
    def go_on(self, count: int) -> None:
        """Compute and choose `count` more tokens of each answer, one in each pass."""
        for _ in range(count):
            self._next(input_ids=self.token)

    def _inputs(self) -> dict[str, Any]:
        model = self.model
        if not (isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning):
            return {"input_ids": self.prompts}
        virtual = model.get_prompt(batch_size=len(self.prompts))
        if not isinstance(virtual, Tensor):
            self.cache = virtual
            return {"input_ids": self.prompts}
        embedded = model.word_embeddings(self.prompts)
        return {"inputs_embeds": torch.cat([virtual.to(embedded.dtype), embedded], dim=1)}

    def _next(self, **inputs: Any) -> None:
        inputs[self.cache_name] = self.cache
        output = self.base(**inputs, use_cache=True, **self.last_logits_only)
        self.cache = output[self.cache_name]
        self.logits = output.logits[:, -1]
        self.token = self.logits.argmax(-1, keepdim=True)


def cache_bytes(cache: Any) -> int:
    """The bytes of all tensors of a cache of any class: keys and values, and the states of recurrent layers.

    Tensors of one dimension are left out: some classes keep counters in them, such as that of a sliding window.
    """
    tensors = {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(vars(cache))}
    return sum(tensors.values())


def _tensors(thing: Any) -> Iterator[Tensor]:
    if isinstance(thing, Tensor):
        yield from [thing] if thing.numel() and thing.dim() > 1 else []
        return
    if isinstance(thing, Cache | CacheLayerMixin):
        thing = vars(thing)
    parts = thing.values() if isinstance(thing, Mapping) else thing
    if isinstance(parts, Iterable) and not isinstance(parts, str):
        for part in parts:
            yield from _tensors(part)

"""How an answer's tokens are chosen. This needs no torch, so the flags are checked before torch loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; a temperature of 0 takes the likeliest."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UsageError(f"--max-new-tokens must be at least 1, got {self.max_new_tokens}.")
        if not 0 <= self.temperature < math.inf:
            raise UsageError(f"--temperature must be 0 or above, got {self.temperature}.")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"--top-p must lie above 0 and up to 1, got {self.top_p}.")

    def arguments(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, end_id: int | None
    ) -> dict[str, Any]:
        """The keyword arguments of `generate`.

        Generation stops at the token that training taught. The model's own generation_config changes no probability.
        """
        own = model.generation_config.eos_token_id
        ends = {end_id, *(own if isinstance(own, list) else [own])}
        chosen: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": sorted(end for end in ends if end is not None) or None,
            "repetition_penalty": 1.0,
            "no_repeat_ngram_size": 0,
            "num_beams": 1,
        }
        if self.temperature == 0:
            return {**chosen, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {
            **chosen,
            "do_sample": True,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": None,
        }

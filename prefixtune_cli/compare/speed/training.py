"""One training step, in PyTorch alone.

It computes what TRL's trainer computes in a step: the forward pass under autocast, a loss without the logits of all
tokens at once, the backward pass, clipping and the optimizer. Around that, the trainer makes batches, logs and calls
callbacks; this is the same for every method and would only hide their differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from prefixtune_cli.optimizer import optimizer_factory

HEAD_TOKENS = 1024  # tokens whose logits are computed at a time
MAX_GRAD_NORM = 1.0  # the recipe's default


class TrainingStep:
    """A training step that can be taken any number of times, on the same random rows.

    The learning rate is 0: the optimizer does all of its work, and no weight changes. The base alone has no trained
    weights; its step is the forward pass, and the backward pass down to the output of the embeddings. That is the whole
    gradient that can flow through a frozen base. A method can need less: PT+ in the first layer needs no gradient of
    that layer's queries, for example.

    Args:
        model: the base, or the base with an adapter.
        base: the base in it.
        ids: [rows, tokens].
        optimizer: a name of transformers' optimizers.
        autocast: compute in bfloat16, as the trainer does unless the recipe has 32 bits.
    """

    def __init__(
        self,
        model: PeftModel | PreTrainedModel,
        base: PreTrainedModel,
        ids: Tensor,
        *,
        optimizer: str,
        autocast: bool,
    ) -> None:
        self.model, self.base, self.ids, self.autocast = model, base, ids, autocast
        self.mask = torch.ones_like(ids)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        on_gpu = ids.device.type == "cuda"
        make = optimizer_factory(optimizer, on_gpu=on_gpu, use_cpu=not on_gpu)
        self.optimizer = make(self.trained) if self.trained else None

    def __call__(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self.ids.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.model(
                input_ids=self.ids, attention_mask=self.mask, labels=self.ids, use_cache=False
            )
        output.loss.backward()
        if self.optimizer is not None:
            nn.utils.clip_grad_norm_(self.trained, MAX_GRAD_NORM)
            self.optimizer.step()

    @contextlib.contextmanager
    def ready(self, *, checkpointing: bool) -> Iterator[None]:
        """Within the block the model is in training mode and steps can be taken; after it there are no gradients."""
        self.model.train()
        if checkpointing:
            self.base.activation_checkpointing_enable(
                activation_checkpointing_kwargs={"use_reentrant": False}
            )
        if checkpointing or not self.trained:
            self.base.enable_input_require_grads()
        original = self.base.forward
        if self.base.base_model is not self.base and self.base.get_output_embeddings() is not None:
            self.base.forward = MethodType(_loss_by_chunks, self.base)
        try:
            yield
        finally:
            self.base.forward = original
            self.model.zero_grad(set_to_none=True)
            if checkpointing:
                self.base.activation_checkpointing_disable()
            if checkpointing or not self.trained:
                self.base.disable_input_require_grads()
            self.model.eval()


def _loss_by_chunks(
    self: PreTrainedModel, *args: Any, labels: Tensor, **kwargs: Any
) -> CausalLMOutput:
    """The loss of a causal language model, with the logits of HEAD_TOKENS tokens at a time.

    The logits are computed again in the backward pass, as the trainer's fused head does. With a large vocabulary they
    would otherwise take most of the memory, whatever the method.
    """
    hidden = self.base_model(*args, **kwargs).last_hidden_state[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    head = self.get_output_embeddings()

    def summed(chunk: Tensor, its_targets: Tensor) -> Tensor:
        return F.cross_entropy(head(chunk).float(), its_targets, reduction="sum")

    sums = [
        checkpoint(
            summed, hidden[i : i + HEAD_TOKENS], targets[i : i + HEAD_TOKENS], use_reentrant=False
        )
        for i in range(0, len(targets), HEAD_TOKENS)
    ]
    return CausalLMOutput(loss=torch.stack(sums).sum() / len(targets))

"""The basis in which M is trained. In it, the features of its queries have the same size in all directions.

In a real language model, φ(q) is nearly the same vector for every token: two or three of 64 directions hold nearly all
of E[φφᵀ]. A step of Adam changes each entry of M by about the same amount. It therefore adds nearly the same vector to
every read, and hardly changes how reads differ between queries. So M is trained as

    M_h = B_h A_h,    B_h = s · (E[φφᵀ] + ε·λ̄·I)^(−1/2)

and the optimizer trains A, which starts at zero, in place of M. E[φφᵀ] is taken over the head's own queries in some
rows, and λ̄ is its mean eigenvalue. s = w·1.4826·median|o| / √d_φ, where the read is added to o: a step of Adam with the
learning rate η then changes o by about w·η times its size. The median is over the layer's tokens and channels. A mean
square would be far too large, because some of them have massive activations.

w = L / 5, from 0.01 to 1, where L is the base's loss on the trained tokens of these rows, in nats per token: how far it
has to go. A base that is near loses more by a large step than it learns. (The step size of Polyak 1987 for a loss that
can reach zero, L / ‖∇L‖², is proportional to L, too.) Without labels, w is 1.

A query still reads φ(q)ᵀM (eq. 7 of arXiv 2506.13674). B is a constant that only training uses; state dicts and saved
files hold M. The call follows PEFT's `initialize_lora_eva_weights`.

Legend: h heads of M, g query heads that share one, n tokens, d d_query, f d_φ, v d_value.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from prefixtune_cli.adapter.layer import MemoryLayer
from prefixtune_cli.adapter.memory import Memory

ROBUST = 1.4826  # times the median of |x| is the standard deviation of a normal x
# Nats per token from which steps are whole. On SmolLM2-135M (40 to 80 steps, one seed) the best rates tried were 0.003
# for a task of 0.4 nats, 0.01 for two of 1.4 and 3.1, and 0.03 for one above 5.
FAR = 5.0
NEAREST = 0.01  # the least w
IGNORED = -100  # the label of a token without a loss, as in transformers


def initialize_basis(
    model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Module, Mapping[str, Any]], Any] | None = None,
) -> float | None:
    """Let an adapter be trained in the basis of its queries, which one pass over some batches finds.

    Call it before training. The model's outputs stay the same. About 1,000 tokens suffice. The adapter's
    `basis_epsilon` is ε.

    Args:
        model: the model with the adapter, which must be active.
        dataloader: batches, each a mapping of the model's arguments, with `attention_mask`, [batch, positions], if
            there is padding, and `labels`, [batch, positions], for w.
        adapter_name: the adapter's name.
        forward_fn: calls the model with a batch, and returns its output; None calls `model(**batch)`. If there are
            labels, the output's `loss` must be their mean loss.

    Returns:
        L, the model's loss on the labels, in nats per token; None without labels.

    Raises:
        ValueError: the adapter is not Prefix-Tuning+ or not active, there are no batches, or an adapted layer sees no
            token, or only zeros.
    """
    memories = _active_memories(model, adapter_name)
    epsilon = model.peft_config[adapter_name].basis_epsilon
    forward_fn = forward_fn or _plain_forward
    moments = {name: _Moments(memory) for name, (memory, _) in memories.items()}
    nats, labelled = 0.0, 0
    with _in_evaluation(model), ExitStack() as watched, torch.no_grad():
        mask: list[Tensor | None] = [None]
        for name, (_, leader) in memories.items():
            handle = leader.register_forward_pre_hook(partial(_see, moments[name], mask))
            watched.callback(handle.remove)
        for batch in dataloader:
            mask[0] = batch.get("attention_mask")
            output = forward_fn(model, batch)
            if (labels := batch.get("labels")) is not None:
                count = int((labels[..., 1:] != IGNORED).sum())
                nats += count * float(output.loss) if count else 0.0
                labelled += count
    loss = nats / labelled if labelled else None
    weight = step_weight(loss)
    for name, (memory, _) in memories.items():
        try:
            basis, directions = moments[name].basis(epsilon, weight)
        except ValueError as error:
            raise ValueError(f"There is no basis for {name}: {error}") from None
        memory.set_basis(basis)
        fresh = memory.rank is not None and memory.M_up.numel() and not memory.M_up.any()
        if fresh:
            memory.M_down.data.copy_(directions[..., : memory.rank])
    return loss


def step_weight(loss: float | None) -> float:
    """w, the size of a step in parts of the learning rate, for a model with this loss in nats per token; None is 1."""
    return 1.0 if loss is None else max(NEAREST, min(1.0, loss / FAR))


def identity_basis(model: nn.Module) -> None:
    """Give every M the identity as its basis. A step then computes and keeps as much as in any basis, for plans."""
    for memory in _memories(model).values():
        factor = getattr(memory, memory.factor_name)
        identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
        memory.basis = identity.repeat(memory.heads, 1, 1)


def fold_basis(model: nn.Module) -> None:
    """Let every adapter hold M itself again. The model's outputs stay the same."""
    for memory in _memories(model).values():
        memory.fold()


def basis_state(model: nn.Module) -> dict[str, Tensor]:
    """What an exact resumption needs beside the state dict: each M's basis and coordinates.

    Returns:
        the tensors by the memory's name and `.basis` or `.coordinates`; empty if there is no basis.
    """
    return {
        f"{name}.{word}": value.detach().contiguous()
        for name, memory in _memories(model).items()
        if memory.basis is not None
        for word, value in (
            ("basis", memory.basis),
            ("coordinates", getattr(memory, memory.factor_name)),
        )
    }


def load_basis_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Restore what `basis_state` returned, bit for bit.

    Raises:
        KeyError: the state belongs to another adapter.
    """
    memories = _memories(model)
    for name in {key.rpartition(".")[0] for key in state}:
        memory = memories[name]
        parameter = getattr(memory, memory.factor_name)
        memory.basis = state[f"{name}.basis"].to(parameter)
        parameter.data.copy_(state[f"{name}.coordinates"])


def _memories(model: nn.Module) -> dict[str, Memory]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Memory)}


def _active_memories(model: PeftModel, adapter_name: str) -> dict[str, tuple[Memory, Memory]]:
    """The adapter's memories by name, each with the memory whose forward pass reads it."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or not hasattr(config, "basis_epsilon"):
        raise ValueError(
            f"A basis needs a PEFT model with a Prefix-Tuning+ adapter, got {type(model).__name__}, in which "
            f"{adapter_name!r} is {type(config).__name__ if config else 'no adapter'}."
        )
    found = {}
    for path, layer in model.named_modules():
        if isinstance(layer, MemoryLayer):
            for leader, *others in layer.reads():
                for memory in (leader, *others):
                    memories: Any = layer.prefix_tuning_plus_memory
                    if adapter_name in memories and memories[adapter_name] is memory:
                        found[f"{path}.prefix_tuning_plus_memory.{adapter_name}"] = memory, leader
    if not found:
        raise ValueError(
            f"The adapter {adapter_name!r} is not active. Type model.set_adapter({adapter_name!r})."
        )
    return found


def _plain_forward(model: nn.Module, batch: Mapping[str, Any]) -> Any:
    return model(**batch)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch dropout off within the block."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _see(moments: _Moments, mask: list[Tensor | None], leader: Memory, read: Any) -> None:
    query, output, *_ = read
    moments.add(query, output, mask[0])


class _Moments:
    """The second moment of one memory's features, and the size of the output that its read is added to."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.tokens = self._queries = 0
        self._second: Any = 0.0  # Σ φφᵀ over the queries of a head of M, [h, f, f]
        self._medians: Any = 0.0  # Σ over batches of median|o|, times their tokens

    def add(self, query: Tensor, output: Tensor, mask: Tensor | None) -> None:
        """Add a batch.

        Args:
            query: [batch, h·g, positions, d].
            output: [batch, positions, h·g, v].
            mask: [batch, positions], 0 at padding; None if there is no padding.
        """
        by_token, output = query.transpose(1, 2).flatten(0, 1), output.flatten(0, 1)  # [n, h·g, …]
        if mask is not None and mask.numel() == len(by_token):
            kept = mask.flatten().to(by_token.device, torch.bool)
            by_token, output = by_token[kept], output[kept]
        if not len(by_token):
            return
        shape = (self.memory.heads, -1, by_token.shape[-1])
        grouped = by_token.reshape(len(by_token), *shape).transpose(0, 1).flatten(1, 2)
        parameter = getattr(self.memory, self.memory.factor_name)
        with torch.autocast(query.device.type, enabled=False):
            value = self.memory.features(grouped.to(parameter.dtype))  # [h, n·g, f]
            self._second = self._second + torch.bmm(value.mT, value).double()
        self._medians = self._medians + len(by_token) * output.abs().median().double()
        self.tokens += len(by_token)
        self._queries += grouped.shape[1]

    def basis(self, epsilon: float, weight: float) -> tuple[Tensor, Tensor]:
        """s·(E[φφᵀ] + ε·λ̄·I)^(−1/2) and the eigenvectors of E[φφᵀ], the leading one first; [h, f, f] in float64.

        Args:
            epsilon: ε.
            weight: w.

        Raises:
            ValueError: there are no tokens; or the features, or the outputs that the read is added to, are zero.
        """
        if not self.tokens:
            raise ValueError("it saw no token of the batches. Give batches with tokens.")
        second = self._second.cpu() / self._queries
        values, vectors = torch.linalg.eigh(second)
        mean = values.mean(-1, keepdim=True)
        size = ROBUST * float(self._medians) / self.tokens
        if not size or not bool((mean > 0).all()):
            raise ValueError("its features, or the outputs it adds to, are zero on these rows.")
        scale = weight * size / math.sqrt(second.shape[-1])
        inverse_root = (values.clamp(min=0) + epsilon * mean).rsqrt()
        return scale * (vectors * inverse_root[:, None]) @ vectors.mT, vectors.flip(-1)

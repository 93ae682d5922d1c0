"""The basis in which M is trained: the one in which the features of its queries are of one size in all directions.

On a real language model φ(q) is nearly the same vector for every token: of 64 directions two or three hold nearly all
of E[φφᵀ]. A step of Adam, which gives each entry of M the same size of change, then moves what is read by a constant
vector, and hardly moves it where queries differ. So M is trained as

    M_h = B_h A_h,    B_h = s · (E[φφᵀ] + ε·λ̄·I)^(−1/2)

with A, which starts at zero, in M's place in the optimizer. E[φφᵀ] is that of the head's own queries over some rows, λ̄
its mean eigenvalue, and s = 1.4826·median|o| / √d_φ with o that to which the read is added: a step of Adam with the
learning rate η then changes o by about η of its size. The median is over the layer's tokens and channels, as some of
them have massive activations, for which a mean square is far too large.

What is read is still φ(q)ᵀM (eq. 7 of arXiv 2506.13674). B is a constant of the training alone; state dicts and saved
files have M. PEFT's `initialize_lora_eva_weights` is the example for the call.

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

ROBUST = 1.4826  # times the median of |x| is the standard deviation, where x is normal


def initialize_basis(
    model: PeftModel,
    dataloader: Iterable[Mapping[str, Any]],
    adapter_name: str = "default",
    forward_fn: Callable[[nn.Module, Mapping[str, Any]], object] | None = None,
) -> None:
    """Have an adapter be trained in the basis of its queries, from one pass over some batches.

    Call it before the training; what the model computes stays the same. Some 1,000 tokens suffice. The adapter's
    `basis_epsilon` is ε.

    Args:
        model: with the adapter, which is active.
        dataloader: batches: mappings with what the model takes, and `attention_mask`, [batch, positions], where there
            is padding. `labels` are left out.
        adapter_name: of the adapter.
        forward_fn: calls the model with a batch; None calls `model(**batch)`.

    Raises:
        ValueError: the adapter is no Prefix-Tuning+ one or not active, there are no batches, or a layer that is
            adapted sees no token, or only zeros.
    """
    memories = _active_memories(model, adapter_name)
    epsilon = model.peft_config[adapter_name].basis_epsilon
    forward_fn = forward_fn or _plain_forward
    moments = {name: _Moments(memory) for name, (memory, _) in memories.items()}
    with _in_evaluation(model), ExitStack() as watched, torch.no_grad():
        mask: list[Tensor | None] = [None]
        for name, (_, leader) in memories.items():
            handle = leader.register_forward_pre_hook(partial(_see, moments[name], mask))
            watched.callback(handle.remove)
        for batch in dataloader:
            given = {key: value for key, value in batch.items() if key != "labels"}
            mask[0] = given.get("attention_mask")
            forward_fn(model, given)
    for name, (memory, _) in memories.items():
        try:
            basis, directions = moments[name].basis(epsilon)
        except ValueError as error:
            raise ValueError(f"There is no basis for {name}: {error}") from None
        memory.set_basis(basis)
        fresh = memory.rank is not None and memory.M_up.numel() and not memory.M_up.any()
        if fresh:
            memory.M_down.data.copy_(directions[..., : memory.rank])


def identity_basis(model: nn.Module) -> None:
    """Give every M the identity for a basis: what a step computes and keeps is that of any other, to plan and time."""
    for memory in _memories(model).values():
        factor = getattr(memory, memory.factor_name)
        identity = torch.eye(factor.shape[1], dtype=factor.dtype, device=factor.device)
        memory.basis = identity.repeat(memory.heads, 1, 1)


def fold_basis(model: nn.Module) -> None:
    """Have every adapter hold M itself again; what the model computes stays the same."""
    for memory in _memories(model).values():
        memory.fold()


def basis_state(model: nn.Module) -> dict[str, Tensor]:
    """What a state dict lacks for an exact resumption: the basis of each M that is trained in one, and its coordinates.

    Returns:
        by the memory's name and `.basis` or `.coordinates`; empty where there is no basis.
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
    """Take up what `basis_state` gave, bit for bit.

    Raises:
        KeyError: it is that of another adapter.
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
    """The adapter's memories by name, each with the one whose forward pass reads it."""
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if config is None or not hasattr(config, "basis_epsilon"):
        raise ValueError(
            f"A basis is for a PEFT model with a Prefix-Tuning+ adapter, got {type(model).__name__} with "
            f"{adapter_name!r} being {type(config).__name__ if config else 'no adapter'}."
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


def _plain_forward(model: nn.Module, batch: Mapping[str, Any]) -> object:
    return model(**batch)


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Within the block there is no dropout."""
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
    """The second moment of one memory's features, and the size of what its read is added to."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory
        self.tokens = self._queries = 0
        self._second: Any = 0.0  # Σ φφᵀ over the queries of a head of M, [h, f, f]
        self._medians: Any = 0.0  # Σ over batches of median|o|, times their tokens

    def add(self, query: Tensor, output: Tensor, mask: Tensor | None) -> None:
        """Take in a batch.

        Args:
            query: [batch, h·g, positions, d].
            output: [batch, positions, h·g, v].
            mask: [batch, positions], 0 at padding; None where there is none.
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

    def basis(self, epsilon: float) -> tuple[Tensor, Tensor]:
        """s·(E[φφᵀ] + ε·λ̄·I)^(−1/2) and the eigenvectors of E[φφᵀ], the leading one first; [h, f, f] in float64.

        Raises:
            ValueError: the features, or what the read is added to, are zero.
        """
        if not self.tokens:
            raise ValueError("no token of the batches came there. Give batches with tokens.")
        second = self._second.cpu() / self._queries
        values, vectors = torch.linalg.eigh(second)
        mean = values.mean(-1, keepdim=True)
        size = ROBUST * float(self._medians) / self.tokens
        if not size or not bool((mean > 0).all()):
            raise ValueError("its features, or what its read is added to, are zero on these rows.")
        scale = size / math.sqrt(second.shape[-1])
        inverse_root = (values.clamp(min=0) + epsilon * mean).rsqrt()
        return scale * (vectors * inverse_root[:, None]) @ vectors.mT, vectors.flip(-1)

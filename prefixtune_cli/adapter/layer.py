"""The tuner layers: one wraps an attention module, one wraps an FFN. Each keeps one memory per adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from prefixtune_cli.adapter.attention import LAYER_ATTRIBUTE, AttentionShape
from prefixtune_cli.adapter.config import PrefixTuningPlusConfig
from prefixtune_cli.adapter.feed_forward import FeedForwardShape, add_read_of_blocks
from prefixtune_cli.adapter.memory import Memory
from prefixtune_cli.adapter.mixed_batch import ReadByRow, reads_by_row

WHY_NOT_MERGED = (
    "A Prefix-Tuning+ adapter cannot be merged into the base weights: φ is not linear, and at attention the query also "
    "depends on the token's position, so no weight matrix gives φ(q)ᵀM. Keep the adapter beside the base (it costs "
    "about 3 % of one projection and no KV cache), or call unload() for the base without it."
)


class MemoryLayer(nn.Module, BaseTunerLayer):
    """An attention module with its memories.

    The attention module itself runs unchanged. The hook finds this layer by an attribute of the module. The attribute
    is not a submodule, so the layer does not appear twice in names or in the state dict.

    Args:
        base_layer: the attention module.
        shape: its heads.
    """

    adapter_layer_names = ("prefix_tuning_plus_memory",)

    def __init__(self, base_layer: nn.Module, shape: AttentionShape | FeedForwardShape) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.shape = shape
        self.prefix_tuning_plus_memory = nn.ModuleDict({})
        self.merged_adapters: list[str] = []
        self._reads: list[list[Memory]] = []
        self._by_row: list[ReadByRow] | None = None
        if isinstance(shape, AttentionShape):
            object.__setattr__(base_layer, LAYER_ATTRIBUTE, self)

    def update_layer(self, adapter_name: str, config: PrefixTuningPlusConfig) -> None:
        """Add a memory for the adapter, on the base's device and in its dtype (PEFT casts it to float32 by default)."""
        heads, d_query, d_value = self._memory_shape(config)
        memory = Memory(
            heads,
            d_query,
            d_value,
            feature_map=config.feature_map,
            feature_dim=config.feature_dim,
            normalize_query=config.normalize_query,
            rank=config.rank,
            init_weights=config.init_weights,
        )
        # A quantized module may have no floating-point weight at all.
        floating = (p.dtype for p in self.base_layer.parameters() if p.is_floating_point())
        self.prefix_tuning_plus_memory[adapter_name] = memory.to(next(floating, torch.float32))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _memory_shape(self, config: PrefixTuningPlusConfig) -> tuple[int, int, int]:
        """The number of matrices M that an adapter has here, d_query and d_value."""
        shape = self.shape
        assert isinstance(shape, AttentionShape)
        heads = shape.kv_heads if config.share_heads == "kv" else shape.heads
        return heads, shape.d_query, shape.d_value

    def active_memories(self) -> list[Memory]:
        """The memories that are read now; none while adapters are disabled."""
        return [memory for group in self._reads for memory in group]

    def reads(self) -> Sequence[Sequence[Any]]:
        """The active memories, in groups that one read serves; or the rows' own, see `read_by_row`."""
        return self._reads if self._by_row is None else [[read] for read in self._by_row]

    def read_by_row(self, adapter_names: Sequence[str] | None) -> None:
        """Let each row of a batch read the memory of its own adapter. None: all rows read the active memories."""
        memories: dict[str, Any] = dict(self.prefix_tuning_plus_memory.items())
        self._by_row = (
            None
            if adapter_names is None
            else reads_by_row([memories.get(n) for n in adapter_names])
        )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self._look_up()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self._look_up()

    def _look_up(self) -> None:
        """Find the memories to read, only when they change, so that a compiled model does not depend on their names."""
        memories: Any = self.prefix_tuning_plus_memory
        names = [] if self.disable_adapters else self.active_adapters
        self._reads = []
        for memory in (memories[name] for name in names if name in memories):
            alike = (group for group in self._reads if memory.reads_like(group[0]))
            if group := next(alike, None):
                group.append(memory)
            else:
                self._reads.append([memory])

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_layer(*args, **kwargs)

    def release(self) -> None:
        """Leave the module as it was."""
        if getattr(self.base_layer, LAYER_ATTRIBUTE, None) is self:
            object.__delattr__(self.base_layer, LAYER_ATTRIBUTE)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        raise NotImplementedError(WHY_NOT_MERGED)

    def unmerge(self) -> NoReturn:
        raise NotImplementedError(WHY_NOT_MERGED)

    def _get_base_layer_device_and_dtype(
        self, base_layer: nn.Module
    ) -> tuple[torch.device | None, None]:
        # No dtype: with `low_cpu_mem_usage` PEFT would round the weights to it that it has just loaded in float32.
        return next((p.device for p in base_layer.parameters()), None), None

    def __getattr__(self, name: str) -> Any:
        """Return the wrapped module's attribute if the layer lacks it, because some models ask for one.

        Private attributes are not passed on: accelerate would take the wrapped module's hook for the layer's own.
        """
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("_"):
                raise
            return getattr(self.base_layer, name)

    def __repr__(self) -> str:
        return "prefix_tuning_plus." + super().__repr__()


class FeedForwardMemoryLayer(MemoryLayer):
    """An FFN, or a whole mixture of experts, with its memories. The blocks of its input are the queries.

    Args:
        base_layer: the FFN.
        shape: its width.
    """

    def _memory_shape(self, config: PrefixTuningPlusConfig) -> tuple[int, int, int]:
        shape = self.shape
        assert isinstance(shape, FeedForwardShape)
        block_size = shape.block_size(config.block_size)
        return shape.width // block_size, block_size, block_size

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the FFN, whose first argument is its input, and add what is read from the memories."""
        output = self.base_layer(*args, **kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        for memory, *others in self.reads():
            output = add_read_of_blocks(output, hidden, memory, others)
        return output

"""The model of a recipe without its weights, built from the configuration on tensors that hold no data.

This module knows no architecture. transformers builds the model, and `model.attach` adds the adapter. Both run under
PyTorch's FakeTensorMode, which knows only shapes and dtypes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from prefixtune_cli import model as models
from prefixtune_cli.adapter import identity_basis
from prefixtune_cli.errors import ModelError
from prefixtune_cli.plan.kernels import GpuAttention, QuantizedLinear
from prefixtune_cli.quantization import stored_settings
from prefixtune_cli.recipe.schema import AdapterSection, ModelSection, PrefixTuningPlus
from prefixtune_cli.tokenizer import cannot_load


@dataclass(frozen=True)
class Run:
    """Neighbouring decoder layers with weights of the same shapes, of which the same ones are trained."""

    start: int
    count: int


class Skeleton:
    """A base with its adapter, in training mode. Its decoder can be shortened.

    Args:
        section: the recipe's model.
        adapter: the recipe's adapter.
        config: the base's configuration.
        on_gpu: whether to plan for a GPU's kernels.

    Raises:
        ModelError: transformers does not know the model, or the adapter does not fit it.
    """

    def __init__(
        self,
        section: ModelSection,
        adapter: AdapterSection,
        config: PreTrainedConfig,
        *,
        on_gpu: bool,
    ) -> None:
        self.on_gpu = on_gpu
        self.in_float32 = section.bits == 32  # otherwise the trainer computes in bfloat16
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        with torch.device("meta"):
            self.base = _build(
                section, config, whole=adapter.method == "full" or section.bits == 32
            )
            bits = _quantized_bits(section, config)
            if bits is not None and adapter.method == "full":
                raise ModelError(
                    f"{section.name} is quantized, and quantized weights have no gradient: method full cannot train "
                    "it. Use another method, or the model that it was made from."
                )
            if bits is not None:
                _quantize(self.base, *bits)
            self.model = models.attach(self.base, adapter)
            if isinstance(adapter, PrefixTuningPlus) and adapter.basis:
                identity_basis(self.model)
        with self.mode:
            _materialize(self.model)
        self.model.train()
        self._layers = _decoder_layers(self.base)
        self.runs = _runs(self._layers)

    @property
    def has_adapter(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def depth(self) -> int:
        """The number of decoder layers; 0 if they could not be found."""
        return 0 if self._layers is None else len(self._layers)

    def attention(self) -> contextlib.AbstractContextManager[Any]:
        """Within this context attention allocates what it allocates on the planned device."""
        return GpuAttention() if self.on_gpu else contextlib.nullcontext()

    @contextlib.contextmanager
    def only(self, kept: list[int] | None) -> Iterator[list[nn.Module]]:
        """Within the block the decoder has only these layers; None keeps all. Gives the layers."""
        if self._layers is None:
            yield []
            return
        whole = list(self._layers)
        if kept is not None:
            _replace(self._layers, [whole[n] for n in kept])
        try:
            yield list(self._layers)
        finally:
            _replace(self._layers, whole)

    @contextlib.contextmanager
    def checkpointed(self, wanted: bool) -> Iterator[None]:
        """Within the block the model recomputes activations, if `wanted`, as transformers' trainer sets it up."""
        if not wanted:
            yield
            return
        self.base.activation_checkpointing_enable(
            activation_checkpointing_kwargs={
                "use_reentrant": False,
                "context_fn": lambda: (contextlib.nullcontext(), self.attention()),
            }
        )
        if not getattr(self.base, "_require_grads_hooks", None):
            self.base.enable_input_require_grads()
        try:
            yield
        finally:
            self.base.activation_checkpointing_disable()
            self.base.disable_input_require_grads()  # the line above does not undo this


def _build(section: ModelSection, config: PreTrainedConfig, *, whole: bool) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32 if whole else torch.bfloat16}
    if section.attention == "eager":
        options["attn_implementation"] = "eager"
    elif section.attention != "auto":  # flash and flex attention save what sdpa's kernels save
        options["attn_implementation"] = "sdpa"
    try:
        base: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, trust_remote_code=section.trust_remote_code, **options
        )
    except (ValueError, ImportError) as error:
        raise ModelError(cannot_load("model", section, error)) from error
    base.config.use_cache = False
    return base


def _quantized_bits(
    section: ModelSection, config: PreTrainedConfig
) -> tuple[int, float | None] | None:
    """Bits per weight and bytes of scales per weight, which are None for bitsandbytes; None if nothing is quantized.

    The precision of a saved checkpoint takes precedence over the recipe's, as in transformers.
    """
    found = stored_settings(config)
    if found is None:
        return (section.bits, None) if section.bits in (4, 8) else None
    if found.get("load_in_4bit") or found.get("load_in_8bit"):
        return (4 if found.get("load_in_4bit") else 8), None
    named = {"fp8": 8, "fbgemm_fp8": 8, "mxfp4": 4}.get(str(found.get("quant_method")))
    bits = named or found.get("bits") or found.get("w_bit")
    if not isinstance(bits, int):
        return None
    group = found.get("group_size")  # each group has one scale of two bytes
    return bits, 2 / (group if isinstance(group, int) and group > 0 else 128)


def _quantize(base: PreTrainedModel, bits: int, scale_bytes: float | None) -> None:
    """Put quantized layers where transformers puts those of bitsandbytes: for every nn.Linear but the head."""
    kept = HfQuantizer.get_modules_to_not_convert(base, None, base._keep_in_fp32_modules)
    for name, module in list(base.named_modules()):
        if not should_convert_module(name, kept):
            continue
        if isinstance(module, Conv1D) or type(module) is nn.Linear:
            scales = None if scale_bytes is None else int(scale_bytes * module.weight.numel())
            base.set_submodule(name, QuantizedLinear(module, bits, scales))


def _replace(layers: nn.ModuleList, others: list[nn.Module]) -> None:
    del layers[:]
    layers.extend(others)


def _materialize(model: nn.Module) -> None:
    """Replace tensors on the meta device by fake ones on a CPU. Trained ones become float32; tied ones stay tied."""
    # The old tensor is kept, too: otherwise a new object could get its id.
    made: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, old in [*parameters, *buffers]:
            if id(old) not in made:
                dtype = torch.float32 if old.requires_grad else old.dtype
                new = torch.empty(old.shape, dtype=dtype, device="cpu")
                if isinstance(old, nn.Parameter):
                    new = nn.Parameter(new, requires_grad=old.requires_grad)
                made[id(old)] = old, new
            setattr(module, name, made[id(old)][1])


def _decoder_layers(base: PreTrainedModel) -> nn.ModuleList | None:
    depth = getattr(base.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        module
        for module in base.modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth
    ]
    return lists[0] if lists else None


def _runs(layers: nn.ModuleList | None) -> list[Run]:
    if layers is None:
        return []
    kinds = [_kind(layer) for layer in layers]
    runs, start = [], 0
    for _, group in groupby(kinds):
        count = len(list(group))
        runs.append(Run(start, count))
        start += count
    return runs


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
        for name, parameter in layer.named_parameters()
    )

"""One contestant's turn in a round: its adapter is attached, each cost is measured once, and the adapter is removed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli.adapter import fold_basis, identity_basis
from prefixtune_cli.compare import metrics
from prefixtune_cli.compare.speed.inference import Answer, cache_bytes
from prefixtune_cli.compare.speed.peak_memory import available_bytes, peak_memory
from prefixtune_cli.compare.speed.training import TrainingStep
from prefixtune_cli.errors import ModelError, ResourceError
from prefixtune_cli.recipe.schema import AdapterSection, PrefixTuningPlus, TrainSection

# Bytes of method full for each weight: the weight, its gradient and AdamW's two moments, in float32.
BYTES_OF_FULL = 16


@dataclass(frozen=True)
class Shape:
    """How much is computed.

    Attributes:
        rounds: rounds that count; one more goes before them.
        batch_size, length: rows of a training step, and tokens of each row.
        prompt_tokens: tokens of a prompt.
        prompts: prompts that are answered at once.
        adapters: adapters of a contestant's kind that are active and trained at once.
        new_tokens: tokens of an answer that are decoded.
        gradient_checkpointing: recompute activations in the backward pass.
        optimizer: a name that transformers' TrainingArguments takes.
        seconds: a step, a prompt or an answer is repeated until it has taken this long; the mean is one measurement.
    """

    rounds: int = 5
    batch_size: int = TrainSection().batch_size
    length: int = 256
    prompt_tokens: int = 512
    prompts: int = 1
    adapters: int = 1
    new_tokens: int = 32
    gradient_checkpointing: bool = False
    optimizer: str = TrainSection().optimizer
    seconds: float = 0.3


Figures = Mapping[metrics.Metric, float | None]  # of one turn; None where it cannot be measured


def take_turn(
    base: PreTrainedModel, adapter: AdapterSection | None, shape: Shape, *, autocast: bool
) -> Figures:
    """Measure one contestant once. Afterwards the base is as it was, even if this fails.

    Small random numbers are added to an adapter, so that it has an effect. It is in float32, as in training and in `ptp
    generate`. `full` is trained in float32 and answers in the base's own precision, in which its weights would be
    loaded.

    Args:
        base: frozen, in evaluation mode.
        adapter: None for the base alone.
        shape: how much is computed.
        autocast: train in bfloat16.

    Returns:
        the values of COSTS, PARAMETERS and ON_DISK, which is the size in float32; `full` saves all weights.

    Raises:
        ModelError: the adapter does not fit the base.
        ResourceError: the memory does not suffice to train in float32.
    """
    full = adapter is not None and adapter.method == "full"
    if adapter is not None and adapter.method == "prefix-tuning" and shape.gradient_checkpointing:
        raise ModelError(
            "Gradient checkpointing does not go with method prefix-tuning, whose prefix lies in the key/value cache."
        )
    with attached(base, adapter, shape.adapters) as model:
        trained = [p for p in model.parameters() if p.requires_grad]
        with in_float32(trained) if full else contextlib.nullcontext():
            if isinstance(adapter, PrefixTuningPlus) and adapter.basis:
                identity_basis(model)
            step_seconds, peak_bytes = _train(model, base, shape, autocast=autocast)
            fold_basis(model)
        size = 4 * sum(p.numel() for p in trained) if full else _adapter_bytes(model)
        model.requires_grad_(False)
        first_token_seconds, decode_seconds, cached = _answer(model, base, shape)
        return {
            metrics.TRAINING: shape.batch_size * shape.length / step_seconds,
            metrics.PEAK_MEMORY: None if peak_bytes is None else peak_bytes / 2**30,
            metrics.DECODE: shape.prompts / decode_seconds,
            metrics.FIRST_TOKEN: first_token_seconds,
            metrics.KV_CACHE: cached,
            metrics.PARAMETERS: sum(p.numel() for p in trained),
            metrics.ON_DISK: size,
        }


@contextlib.contextmanager
def attached(
    base: PreTrainedModel, adapter: AdapterSection | None, count: int = 1
) -> Iterator[PeftModel | PreTrainedModel]:
    """Within the block the base has random adapters; afterwards it has none, and none of its weights is trainable.

    Args:
        base: without adapters.
        adapter: None for the base alone.
        count: adapters of this kind, all of them active and trainable.

    Raises:
        ModelError: the adapter does not fit the base, or cannot be active beside another.
    """
    base.requires_grad_(False)
    model: PeftModel | PreTrainedModel = base
    try:
        if adapter is not None:
            if adapter.method == "full" and getattr(base, "quantization_method", None) is not None:
                raise ModelError(
                    "Quantized weights have no gradient: method full cannot train them."
                )
            model = models.attach(base, adapter)
            if count > 1:
                models.attach_more(model, adapter.method, count - 1)
        if isinstance(model, PeftModel):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
                    parameter.data += 0.02 * torch.randn_like(parameter)
        model.eval()
        yield model
    finally:
        if isinstance(model, PeftModel):
            models.detach(model)
        _strip(base)
        base.requires_grad_(False).eval()


def _strip(base: PreTrainedModel) -> None:
    """Remove the layers of an adapter that was attached in part before an error."""
    for name, module in list(base.named_modules()):
        if isinstance(module, BaseTunerLayer) and not name.endswith("base_layer"):
            base.set_submodule(name, module.get_base_layer())
            getattr(module, "release", lambda: None)()


@contextlib.contextmanager
def in_float32(trained: list[nn.Parameter]) -> Iterator[None]:
    """Within the block these weights are in float32; afterwards they have their own precision and value again.

    Raises:
        ResourceError: main memory does not suffice to train them, and the system would kill the process.
    """
    needed = sum(p.numel() * (BYTES_OF_FULL - p.itemsize) for p in trained)
    available = available_bytes() if trained[0].device.type == "cpu" else None
    if available is not None and needed > available:
        raise ResourceError(
            f"Training all weights in float32 takes {needed / 2**30:.1f} GiB more of main memory, and "
            f"{available / 2**30:.1f} GiB are available."
        )
    before = [p.dtype for p in trained]
    try:
        for parameter in trained:
            parameter.data = parameter.data.float()
        yield
    finally:
        for parameter, dtype in zip(trained, before, strict=True):
            parameter.grad = None
            parameter.data = parameter.data.to(dtype)


def _train(
    model: PeftModel | PreTrainedModel, base: PreTrainedModel, shape: Shape, *, autocast: bool
) -> tuple[float, int | None]:
    ids = _random_ids(base, shape.batch_size, shape.length)
    step = TrainingStep(model, base, ids, optimizer=shape.optimizer, autocast=autocast)
    with step.ready(checkpointing=shape.gradient_checkpointing):
        step()  # the optimizer makes its state
        with peak_memory(ids.device) as peak:
            seconds = seconds_each(step, shape.seconds, ids.device)
    return seconds, peak.nbytes


def _answer(
    model: PeftModel | PreTrainedModel, base: PreTrainedModel, shape: Shape
) -> tuple[float, float, int]:
    answer = Answer(model, _random_ids(base, shape.prompts, shape.prompt_tokens))
    place = answer.prompts.device
    answer.begin()
    answer.go_on(1)  # kernels are chosen
    first_token = seconds_each(answer.begin, shape.seconds, place)
    cached = cache_bytes(answer.cache) // shape.prompts
    decoding = seconds_each(
        lambda: answer.go_on(shape.new_tokens), shape.seconds, place, before=answer.begin
    )
    return first_token, decoding / shape.new_tokens, cached


def seconds_each(
    work: Callable[[], object],
    at_least: float,
    place: torch.device,
    before: Callable[[], object] | None = None,
) -> float:
    """The mean wall-clock seconds of `work`, which is repeated until all of it has taken `at_least` seconds.

    Args:
        work: it is done at least once.
        at_least: seconds.
        place: the device on which it computes; a GPU is waited for.
        before: it is done before each repetition, and its time is not counted.
    """
    elapsed, count = 0.0, 0
    while not count or elapsed < at_least:
        if before is not None:
            before()
        _wait_for(place)
        start = time.perf_counter()
        work()
        _wait_for(place)
        elapsed += time.perf_counter() - start
        count += 1
    return elapsed / count


def _wait_for(place: torch.device) -> None:
    """Wait until the GPU has done all of its work."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)


def _random_ids(base: PreTrainedModel, rows: int, tokens: int) -> Tensor:
    words = base.config.get_text_config(decoder=True).vocab_size
    return torch.randint(words, (rows, tokens), device=base.device)


def _adapter_bytes(model: PeftModel | PreTrainedModel) -> int:
    if not isinstance(model, PeftModel):
        return 0
    return sum(
        tensor.nbytes
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=False
        ).values()
    )

"""A base with random weights, from its configuration alone."""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from prefixtune_cli import model as models
from prefixtune_cli import quantization
from prefixtune_cli.errors import ModelError, ResourceError
from prefixtune_cli.parallel.devices import check_device, device
from prefixtune_cli.plan.base import base_config
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.tokenizer import cannot_load


def random_base(section: ModelSection) -> PreTrainedModel:
    """The base in the recipe's precision, with the weights of its own initialisation, on this process's device.

    Nothing is downloaded for a folder, nor for the models of `ptp models`. Weights of 4 and 8 bits are drawn in
    bfloat16 in main memory, saved to a temporary folder, and loaded from it like any checkpoint. Meanwhile that takes
    two bytes of memory and of disk for each parameter.

    Args:
        section: the recipe's model.

    Raises:
        ModelError: the model is not known, or its checkpoint is quantized, so that a configuration is not enough.
        ResourceError: it does not fit into the memory.
    """
    config = config_of(section)
    try:
        if section.bits not in (4, 8):
            return _drawn(section, config, device(section.device))
        with TemporaryDirectory(prefix="ptp-random-base-") as folder:
            _drawn(section, config, torch.device("cpu")).save_pretrained(folder)
            there = section.model_copy(update={"name": folder, "revision": None})
            return models.load_base(there)
    except RuntimeError as error:
        if not should_reduce_batch_size(error):  # true of every allocator's error
            raise
        raise ResourceError(
            f"{section.name} does not fit into the memory at {section.bits} bits. Try --bits 4, or a smaller model."
        ) from error


def config_of(section: ModelSection) -> PreTrainedConfig:
    """The configuration that `random_base` builds from; whatever can be refused is refused here.

    Raises:
        ModelError: the model is not known, or its checkpoint is quantized.
    """
    check_device(section.device)
    config = base_config(section)
    if quantization.stored_settings(config) is not None:
        raise ModelError(
            f"{section.name} is quantized by its checkpoint, so it cannot be built from its configuration alone. Give "
            "the model that it was made from, with --bits 4 or --bits 8."
        )
    quantization.check(section, config)
    return config


def _drawn(section: ModelSection, config: PreTrainedConfig, place: torch.device) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": torch.float32 if section.bits == 32 else torch.bfloat16}
    if section.attention != "auto":
        options["attn_implementation"] = section.attention
    try:
        with place:
            base = AutoModelForCausalLM.from_config(
                config, trust_remote_code=section.trust_remote_code, **options
            )
    except (ValueError, ImportError) as error:
        raise ModelError(cannot_load("model", section, error)) from error
    return cast(PreTrainedModel, base.to(place))

"""A base in a GGUF file: its configuration, its tokenizer, and its weights as the plain numbers that training needs.

transformers reads such files (`gguf_file=`) with the package `gguf`. This module corrects two things: transformers
ignores how rotary frequencies are scaled, and it would use another model's tokenizer that lies beside the file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune_cli.errors import ModelError, first_line
from prefixtune_cli.recipe.gguf_header import GgufHeader, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_PART = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
_IN_ITS_FOLDER = "model.gguf"
# Meta's numbers for Llama 3.1 and later. A file has only the factors of the frequencies that follow from them.
_LLAMA_3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def check(path: str | Path) -> None:
    """Refuse a GGUF file that cannot be a base here, before its weights are read.

    Raises:
        ModelError: the file is one part of a model, an adapter, or cut off; transformers cannot read its architecture;
            or the package `gguf` is missing.
    """
    from transformers.utils import is_gguf_available

    part = _PART.search(str(path))
    header = read_header(path)
    count = max(header.parts, int(part[1]) if part else 1)
    if count > 1:
        raise ModelError(
            f"{path} is one of {count} files of a model, and transformers reads GGUF only from one file. Merge them "
            "with llama.cpp, and give the merged file: llama-gguf-split --merge FIRST-OF-THEM.gguf WHOLE.gguf"
        )
    kind = header.metadata.get("general.type", "model")
    if kind != "model":
        raise ModelError(
            f"{path} is a GGUF file of type {kind!r}, not a model. Give the file of the model that it belongs to."
        )
    if not is_gguf_available():
        raise ModelError(
            f"{path} is a GGUF file, and the package that reads such files is not installed. Type: "
            "pip install 'prefixtune-cli[gguf]'"
        )
    load_config(path)


def load_config(path: str | Path) -> PreTrainedConfig:
    """The base's configuration, from the file's metadata.

    Raises:
        ModelError: transformers cannot read it.
    """
    about = os.stat(path)
    return copy.deepcopy(_config(str(path), about.st_size, about.st_mtime_ns))


@functools.lru_cache(maxsize=4)  # transformers needs seconds to read a vocabulary
def _config(path: str, size: int, time: int) -> PreTrainedConfig:
    from transformers import AutoConfig, __version__

    header = read_header(path)
    try:
        with _alone(path) as folder:
            config = AutoConfig.from_pretrained(folder, gguf_file=_IN_ITS_FOLDER)
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        reason = first_line(error)
        if "architecture" in reason:
            raise ModelError(
                f"{path} is a GGUF file of the architecture {header.architecture!r}, which transformers {__version__} "
                "cannot read from GGUF. Use the model's safetensors: give its hub id, or their folder."
            ) from error
        raise ModelError(
            f"{path}, a GGUF file of the architecture {header.architecture!r}, cannot be read: {reason.rstrip('.')}. "
            "Compare its size with the original's, or use the model's safetensors."
        ) from error
    _scale_frequencies(header, config)
    config.name_or_path = os.path.abspath(path)
    return config


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in the file, with its chat template."""
    from transformers import AutoTokenizer

    with _alone(path) as folder:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, gguf_file=_IN_ITS_FOLDER
        )
    tokenizer.name_or_path = os.path.abspath(path)
    return tokenizer


def load_model(
    path: str | Path, config: PreTrainedConfig, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """The base, with weights as plain numbers, and transformers' loading info.

    Args:
        path: the file.
        config: see `load_config`.
        options: arguments of `from_pretrained`. If they ask bitsandbytes to quantize, the weights first become plain
            numbers in main memory, because transformers cannot do both at once.
    """
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    settings = options.pop("quantization_config", None)
    place = {"device_map": {"": torch.device("cpu")}} if settings is not None else {}
    with (
        _alone(path) as folder,
        contextlib.redirect_stderr(io.StringIO()),  # hides transformers' progress bar
    ):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            folder,
            gguf_file=_IN_ITS_FOLDER,
            config=config,
            quantization_config=GgufConfig(dequantize=True),
            output_loading_info=True,
            **{**options, **place},
        )
    if settings is not None and not loaded["missing_keys"]:
        model = type(model).from_pretrained(
            None,
            config=model.config,
            state_dict=model.state_dict(),
            quantization_config=settings,
            **options,
        )
    # The full path: peft saves the name with the adapter, and asks the hub about any name that looks like a hub id.
    model.name_or_path = model.config.name_or_path = os.path.abspath(path)
    return model, loaded


@contextlib.contextmanager
def _alone(path: str | Path) -> Iterator[str]:
    """A folder, within the block, with this file and nothing else.

    The file's own folder may hold the tokenizer of another model, and transformers would use it.
    """
    with tempfile.TemporaryDirectory(prefix="ptp-gguf-") as folder:
        (Path(folder) / _IN_ITS_FOLDER).symlink_to(Path(path).resolve())
        yield folder


def _scale_frequencies(header: GgufHeader, config: PreTrainedConfig) -> None:
    """Configure rotary frequencies to be scaled as the file says. transformers does that only for gpt-oss.

    Raises:
        ModelError: transformers has no setting for the way in which the file scales them.
    """
    if header.architecture == "gpt-oss":
        return
    about = f"{header.architecture}.rope.scaling"
    kind = header.metadata.get(f"{about}.type", "none")
    factor = header.metadata.get(f"{about}.factor")
    factors = header.floats("rope_freqs.weight")
    original = header.metadata.get(f"{about}.original_context_length")
    if factors is not None and any(each != 1 for each in factors):
        if _set(config, "llama3", factor=max(factors), **_LLAMA_3) and _gives(config, factors):
            return
        kind = "rope_freqs.weight"
    elif any(name.startswith("rope_factors_") for name in header.tensors):
        kind = "rope_factors_long.weight"
    elif kind == "none" or (
        factor
        and (
            (kind == "linear" and _set(config, "linear", factor=factor))
            or (
                kind == "yarn"
                and original
                and _set(config, "yarn", factor=factor, original_max_position_embeddings=original)
            )
        )
    ):
        return
    raise ModelError(
        f"{header.path} scales its rotary frequencies ({kind}) in a way that cannot be read from GGUF, so the model "
        "would give wrong answers. Use the model's safetensors: give its hub id, or their folder."
    )


def _set(config: PreTrainedConfig, kind: str, **numbers: Any) -> bool:
    """Write a scaling into the configuration. If layers differ, only full attention gets it, as in Gemma 3.

    Returns False if the configuration has no place for it.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return False
    parameters.get("full_attention", parameters).update(rope_type=kind, **numbers)
    return True


def _gives(config: PreTrainedConfig, factors: list[float]) -> bool:
    """Whether transformers computes the file's frequencies from the configuration."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    theta, width = config.rope_parameters["rope_theta"], 2 * len(factors)
    plain = 1 / theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    return found.shape == plain.shape and torch.allclose(
        plain / torch.tensor(factors), found, rtol=1e-3
    )

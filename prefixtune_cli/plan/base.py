"""The configuration of a base: from its folder or file, the local cache, the known shapes, or the hub."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from prefixtune_cli.errors import ModelError
from prefixtune_cli.recipe.aliases import resolve
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.recipe.shapes import shape
from prefixtune_cli.tokenizer import check_base, load_config


def base_config(section: ModelSection) -> PreTrainedConfig:
    """The base's configuration. It needs no weights, and for well-known models no network either.

    Raises:
        ModelError: the configuration cannot be found; the message says what to type.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = resolve(section.name)
    if Path(name).exists():
        if not (Path(name) / "config.json").is_file():
            check_base(
                section
            )  # raises an error that says what the folder is, unless it is a GGUF file
        return load_config(section)
    cached = try_to_load_from_cache(name, "config.json", revision=section.revision)
    if isinstance(cached, str):
        return load_config(section)
    numbers = shape(name) if section.revision is None else None
    if numbers is not None:
        config: PreTrainedConfig = AutoConfig.for_model(**numbers)
        return config
    if HF_HUB_OFFLINE:
        raise ModelError(
            f"The shape of {name} is not known here: it is not in the local cache, and HF_HUB_OFFLINE is set. Unset "
            "it, or give a folder that has the model's config.json: "
            f"--model /path/to/{name.split('/')[-1]}. `ptp models` lists those that are known."
        )
    return load_config(section)

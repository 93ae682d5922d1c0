"""Which base is meant, and its tokenizer: all that is needed to look at data, without the weight of torch and peft."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

from prefixtune_cli import gguf_base
from prefixtune_cli.errors import ModelError
from prefixtune_cli.recipe.aliases import check_local_model, resolve
from prefixtune_cli.recipe.gguf_header import is_gguf
from prefixtune_cli.recipe.schema import ModelSection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_base(section: ModelSection) -> None:
    """Refuse a base that cannot be loaded, before anything is.

    Raises:
        ModelError: a folder without a model, a GGUF file that transformers cannot read, or a hub model that is not in
            the cache while offline.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    name = resolve(section.name)
    if Path(name).exists():
        check_local_model(name)
        if is_gguf(name):
            gguf_base.check(name)
    elif HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(name, "config.json", revision=section.revision), str
    ):
        raise ModelError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE is set. Unset it to download the model, or give a "
            f"local folder: --model /path/to/{name.split('/')[-1]}"
        )


def load_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a padding token.

    Raises:
        ModelError: there is no tokenizer, or no model at all.
    """
    from transformers import AutoTokenizer

    name = resolve(section.name)
    try:
        if is_gguf(name):
            tokenizer = gguf_base.load_tokenizer(name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=section.revision, trust_remote_code=section.trust_remote_code
            )
    except (OSError, ValueError, ImportError, KeyError) as error:
        if Path(name).exists():
            check_base(section)  # which says what it is, where it is no model
        raise ModelError(cannot_load("tokenizer", section, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return cast("PreTrainedTokenizerBase", tokenizer)


def cannot_load(what: str, section: ModelSection, error: Exception) -> str:
    """Why the `what` of a model cannot be loaded, and what to type instead."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    name = resolve(section.name)
    return (
        f"Cannot load the {what} of {section.name} ({name}): {reason} Check the name with `ptp models`; for a gated "
        "model, accept its licence on the hub and type `hf auth login`; without a network, give a local folder."
    )

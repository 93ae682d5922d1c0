"""Checks of a base, its configuration and its tokenizer: enough to look at data, without importing torch and peft."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from prefixtune_cli import gguf_base
from prefixtune_cli.errors import AdapterError, ModelError, first_line
from prefixtune_cli.recipe.aliases import check_local_model, resolve
from prefixtune_cli.recipe.gguf_header import is_gguf
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.run_dir import RunDir

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

    from prefixtune_cli.data.tokenized_data import TokenizedData


def check_base(section: ModelSection) -> None:
    """Refuse a base that cannot be loaded, before anything is loaded.

    Raises:
        ModelError: see `check_is_there`; or the base is a GGUF file that transformers cannot read.
    """
    check_is_there(section)
    if is_gguf(name := resolve(section.name)):
        gguf_base.check(name)


def check_is_there(section: ModelSection) -> None:
    """Refuse a base that is not there. This check does not import transformers.

    Raises:
        ModelError: a folder holds no model, or a hub model is not in the cache while offline.
    """
    name = resolve(section.name)
    if Path(name).exists():
        check_local_model(name)
        return
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if HF_HUB_OFFLINE and not isinstance(
        try_to_load_from_cache(name, "config.json", revision=section.revision), str
    ):
        raise ModelError(
            f"{name} is not in the local cache, and HF_HUB_OFFLINE is set. Unset it to download the model, or give a "
            f"local folder: --model /path/to/{name.split('/')[-1]}"
        )


def load_config(section: ModelSection) -> PreTrainedConfig:
    """The base's configuration.

    Raises:
        ModelError: the model cannot be found or read.
    """
    from transformers import AutoConfig

    name = resolve(section.name)
    if is_gguf(name):
        return gguf_base.load_config(name)
    try:
        return AutoConfig.from_pretrained(
            name,
            revision=section.revision,
            trust_remote_code=section.trust_remote_code,
        )
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(cannot_load("configuration", section, error)) from error


def load_tokenizer(
    section: ModelSection, adapter: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """The base's tokenizer with a padding token, or the tokenizer and chat template that an adapter was trained with.

    Args:
        section: the base.
        adapter: an adapter folder. Its own tokenizer and template, which `ptp train` and TRL save, replace the base's.

    Raises:
        ModelError: there is no tokenizer, or no model at all.
        AdapterError: the adapter's tokenizer or template cannot be read.
    """
    template = None if adapter is None else _template(Path(adapter))
    if adapter is not None and _tokenizer_config(Path(adapter)).exists():
        tokenizer = _adapters_tokenizer(section, Path(adapter))
    else:
        tokenizer = _bases_tokenizer(section)
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise AdapterError(
                f"The chat template {template} cannot be read: {error}. Give another with --chat-template FILE."
            ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is not None:
        check_ids(section, tokenizer, [tokenizer.pad_token_id], "The tokenizer's padding")
    return tokenizer


def check_ids(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, ids: Iterable[int], where: str
) -> None:
    """Refuse token ids that the base has no embedding for.

    A tokenizer may have more tokens than its base, as long as they do not occur.

    Args:
        section: the base.
        tokenizer: the one that made the ids.
        ids: the ids that occur.
        where: where they occur, for the message.

    Raises:
        ModelError: the embedding has no row for one of them.
    """
    rows = _embedding_rows(section)
    highest = max(ids, default=-1)
    if rows is None or highest < rows:
        return
    name = resolve(section.name)
    resized = f"{Path(name).name}-resized"
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f"t = T.from_pretrained({tokenizer.name_or_path or name!r}); m = M.from_pretrained({name!r}, dtype='auto'); "
        f"m.resize_token_embeddings(len(t)); m.save_pretrained({resized!r}); t.save_pretrained({resized!r})"
    )
    raise ModelError(
        f"{where} has the token {tokenizer.convert_ids_to_tokens(highest)!r}, id {highest}, but the embedding of "
        f"{section.name} has only {rows:,} rows: the tokenizer ({len(tokenizer):,} tokens) was enlarged and the base "
        "was not, or they do not belong together. Use the tokenizer that came with the base; or resize the base once "
        f"with the line below, and type --model ./{resized}\n  python -c {shlex.quote(code)}"
    )


def check_data(
    section: ModelSection, tokenizer: PreTrainedTokenizerBase, data: TokenizedData
) -> None:
    """Refuse data with token ids that the base has no embedding for.

    Raises:
        ModelError: see `check_ids`; the message names the row.
    """
    rows = _embedding_rows(section)
    if rows is not None and (found := data.first_from(rows)) is not None:
        row, highest = found
        check_ids(section, tokenizer, [highest], data.rows.row_origin(row))


def _embedding_rows(section: ModelSection) -> int | None:
    """How many tokens the base can embed; None if it does not say, or if it is only a tokenizer, to look at data."""
    name = Path(resolve(section.name))
    file = name / "config.json" if name.is_dir() else name
    if not file.exists():
        return None if name.is_dir() else _stated_rows(section, 0)
    return _stated_rows(section, file.stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)  # else every prompt would ask the hub
def _stated_rows(section: ModelSection, time: int) -> int | None:
    rows = getattr(load_config(section).get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) and rows > 0 else None


def carries_tokenizer(adapter: str | Path) -> bool:
    """Whether an adapter has the tokenizer, or the chat template, that it was trained with."""
    adapter = Path(adapter)
    return _tokenizer_config(adapter).exists() or _template(adapter) is not None


def _tokenizer_config(adapter: Path) -> Path:
    return adapter / "tokenizer_config.json"


def _template(adapter: Path) -> Path | None:
    """The adapter's template, or the one of its run: a checkpoint or an older adapter may have none."""
    run = RunDir(adapter.parent)
    found = [adapter / run.chat_template.name]
    if run.recipe.exists():
        found.append(run.chat_template)
    return next((file for file in found if file.exists()), None)


def _adapters_tokenizer(section: ModelSection, adapter: Path) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(
            str(adapter), trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise AdapterError(
            f"The tokenizer of the adapter in {adapter} cannot be loaded: {error} To use the tokenizer of "
            f"{section.name}, delete {_tokenizer_config(adapter)}."
        ) from error
    return cast("PreTrainedTokenizerBase", found)


def _bases_tokenizer(section: ModelSection) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    name = resolve(section.name)
    try:
        if is_gguf(name):
            return gguf_base.load_tokenizer(name)
        found = AutoTokenizer.from_pretrained(
            name, revision=section.revision, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError, ImportError, KeyError) as error:
        if Path(name).exists():
            check_base(section)  # if it is no model, this says what it is
        raise ModelError(cannot_load("tokenizer", section, error)) from error
    return cast("PreTrainedTokenizerBase", found)


def cannot_load(what: str, section: ModelSection, error: Exception) -> str:
    """Why the `what` of a model cannot be loaded, and what to type instead."""
    reason = first_line(error)
    name = resolve(section.name)
    return (
        f"Cannot load the {what} of {section.name} ({name}): {reason} Check the name with `ptp models`; for a gated "
        "model, accept its licence on the hub and type `hf auth login`; without a network, give a local folder."
    )

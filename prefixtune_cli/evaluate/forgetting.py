"""Forgetting: how much worse an adapted model predicts text that has nothing to do with its task.

Each document is cut into windows. The last token of a window is also the first of the next one, so the model predicts
every token once, from the tokens before it in its window. No window spans two documents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.data.lines import BOM, iconv
from prefixtune_cli.data.load import evenly_spread, load_rows
from prefixtune_cli.data.locate import check_text
from prefixtune_cli.data.row_encoder import start_ids, with_start
from prefixtune_cli.errors import DataError, UsageError
from prefixtune_cli.evaluate.losses import (
    Judged,
    check_numbers,
    loss_items,
    loss_lines,
    ratio_line,
)
from prefixtune_cli.evaluate.outcome import Outcome
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.evaluate.settings import FORGETTING, check_limit
from prefixtune_cli.recipe.schema import DataSection


@dataclass(frozen=True)
class Window:
    """A stretch of a document.

    Attributes:
        origin: the document and the range of its tokens.
        ids: its tokens; the model does not predict the first one.
        bytes: the UTF-8 bytes of the text of the predicted tokens.
    """

    origin: str
    ids: list[int]
    bytes: int


@dataclass(frozen=True)
class WindowedText:
    """A text, cut into windows of at most `window` tokens.

    Attributes:
        source: what the user typed; `fingerprint` is the sha256 of its content.
        documents: the number of texts that are not blank.
        total: the number of all windows; `windows` has the chosen ones.
    """

    source: str
    fingerprint: str
    documents: int
    window: int
    total: int
    windows: list[Window]

    def __len__(self) -> int:
        return len(self.windows)


def prepare(
    source: str, tokenizer: PreTrainedTokenizerBase, window: int, limit: int | None
) -> WindowedText:
    """Read, tokenize and cut, before a model loads.

    Args:
        source: a plain text file, which is one document; or data of the format `text`, each row a document.
        tokenizer: the base's.
        window: the most tokens that the model sees at once.
        limit: the most windows, evenly spread; None takes all.

    Raises:
        DataError: the text is missing, empty, not UTF-8, of another format, or shorter than two tokens.
        ResourceError: the hub cannot be reached, or the disk is full.
        UsageError: the window is below 2, or the limit below 1.
    """
    check_limit(limit)
    if window < 2:
        raise UsageError(
            f"A window must have at least 2 tokens, got {window}: the model does not predict the first one."
        )
    documents, fingerprint = _documents(source)
    windows = [
        found for where, text in documents for found in _windows(where, text, tokenizer, window)
    ]
    if not windows:
        raise DataError(
            f"{source} has too little text: fewer than two tokens, and the model does not predict the first. "
            "Give a text of some thousand words."
        )
    chosen = evenly_spread(len(windows), limit or len(windows))
    return WindowedText(
        source=source,
        fingerprint=fingerprint,
        documents=len(documents),
        window=window,
        total=len(windows),
        windows=[windows[i] for i in chosen],
    )


def judge(scorer: Scorer, text: WindowedText, name: str) -> Judged:
    """Ask one model; see `own_data.judge`."""
    examples = [{"input_ids": window.ids, "labels": window.ids} for window in text.windows]
    losses = scorer.losses(examples, task := f"text loss of {name}")
    check_numbers([nats for nats, _ in losses], task)
    return Judged(losses, [])


def compare(text: WindowedText, judged: Mapping[str, Judged]) -> Outcome:
    """Loss, perplexity and bits per byte; if the base took part, every model is compared with it.

    Args:
        text: what `prepare` returned.
        judged: model → what it did; the base is under BASE.
    """
    losses = {model: found.losses for model, found in judged.items()}
    bits = {
        model: np.array([nats for nats, _ in found]) / math.log(2)
        for model, found in losses.items()
    }
    sizes = np.array([window.bytes for window in text.windows], dtype=float)
    lines = [*loss_lines(FORGETTING, losses), ratio_line(FORGETTING, "bits per byte", bits, sizes)]
    record: dict[str, Any] = {
        "text": {
            "source": text.source,
            "sha256": text.fingerprint,
            "documents": text.documents,
            "window_tokens": text.window,
            "windows": text.total,
            "evaluated": len(text),
            "bytes": int(sizes.sum()),
        },
        "items": [
            {**item, "bytes": window.bytes}
            for item, window in zip(
                loss_items([window.origin for window in text.windows], losses),
                text.windows,
                strict=True,
            )
        ],
    }
    return Outcome(FORGETTING, lines, record)


def _documents(source: str) -> tuple[list[tuple[str, str]], str]:
    """(origin, text) of each document that is not blank, and the sha256 of the source."""
    path = Path(source).expanduser()
    if check_text(source):
        content = _read_plain(path)
        found, fingerprint = [(source, content)], hashlib.sha256(content.encode()).hexdigest()
    else:
        rows = load_rows(source, DataSection(format="text"))
        found = [(rows.row_origin(i), row["text"]) for i, row in enumerate(rows.dataset)]
        fingerprint = rows.fingerprint
    found = [(where, text) for where, text in found if text.strip()]
    if not found:
        raise DataError(
            f"{source} is empty: it holds nothing but white space. Give a text of some thousand words."
        )
    return found, fingerprint


def _read_plain(path: Path) -> str:
    try:
        return path.read_bytes().removeprefix(BOM).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start + 1}. Convert the "
            f"file first: {iconv(path)}"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}.") from error


def _windows(
    where: str, text: str, tokenizer: PreTrainedTokenizerBase, window: int
) -> Iterator[Window]:
    """The windows of one document; the last one may be shorter."""
    own, ends = _tokens_with_ends(text, tokenizer)
    ids = with_start(start_ids(tokenizer), own)
    ends = [*([0] * (len(ids) - len(own))), *ends]
    for first in range(0, len(ids) - 1, window - 1):
        last = min(first + window, len(ids)) - 1
        predicted = text[ends[first] : ends[last]]
        # A character of several tokens counts with its first token; a window has at least one byte even so.
        size = max(1, len(predicted.encode()))
        yield Window(f"{where}, tokens {first + 1}–{last}", ids[first : last + 1], size)


def _tokens_with_ends(
    text: str, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], Sequence[int]]:
    """The tokens, and the number of characters after which each ends; a slow tokenizer gives evenly spread ends."""
    encoded = tokenizer(
        text,
        add_special_tokens=False,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=False,
        verbose=False,
    )
    ids = list(encoded["input_ids"])
    if tokenizer.is_fast:
        return ids, [end for _, end in encoded["offset_mapping"]]
    return ids, [round(len(text) * (i + 1) / len(ids)) for i in range(len(ids))]

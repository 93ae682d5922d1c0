"""What the data looks like to the model: statistics in words, and examples with their mask."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from prefixtune_cli.data.lines import start_of
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.data.tokenized_data import DataStatistics, TokenizedData
from prefixtune_cli.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"


@dataclasses.dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    Attributes:
        origin: file and line.
        spans: the pieces of the decoded text, each with whether it is trained; together they are the whole text.
        length: tokens before truncation. `tokens` of them are left, and `trained_tokens` of those have a loss.
        rejected: the same prompt with the other answer, of a pair.
        desirable: the label of a labelled answer.
    """

    origin: str
    spans: tuple[tuple[str, bool], ...]
    length: int
    tokens: int
    trained_tokens: int
    rejected: Example | None = None
    desirable: bool | None = None


@dataclasses.dataclass(frozen=True)
class Inspection:
    """All that `ptp inspect-data` shows."""

    source: str
    fingerprint: str
    statistics: DataStatistics
    examples: tuple[Example, ...]
    notices: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def inspect(
    tokenized: TokenizedData,
    tokenizer: PreTrainedTokenizerBase,
    *,
    examples: int,
    seed: int,
) -> Inspection:
    """Statistics and `examples` rows, drawn at random by `seed`, in the order of the files."""
    import numpy as np

    rows = tokenized.rows
    count = min(examples, len(rows))
    chosen = np.sort(np.random.default_rng(seed).choice(len(rows), size=count, replace=False))
    return Inspection(
        source=rows.source,
        fingerprint=rows.fingerprint,
        statistics=tokenized.statistics,
        examples=tuple(example(tokenized, tokenizer, int(i)) for i in chosen),
        notices=rows.notices + tokenized.notices,
    )


def example(tokenized: TokenizedData, tokenizer: PreTrainedTokenizerBase, i: int) -> Example:
    """Row `i` of the loaded data, decoded."""
    where, rejected = tokenized.rows.row_origin(i), tokenized.rejected
    other = None if rejected is None else _decoded(rejected[i], where, tokenizer)
    label = tokenized.rows.dataset[i]["desirable"] if tokenized.rows.labelled else None
    shown = _decoded(tokenized.every_row[i], where, tokenizer)
    return dataclasses.replace(shown, rejected=other, desirable=label)


def _decoded(row: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase) -> Example:
    trained = [label != MASKED for label in row["labels"]]
    return Example(
        origin=where,
        spans=spans(row["input_ids"], trained, tokenizer),
        length=row["length"],
        tokens=len(row["input_ids"]),
        trained_tokens=row["trained"],
    )


def spans(
    ids: list[int], trained: list[bool], tokenizer: PreTrainedTokenizerBase
) -> tuple[tuple[str, bool], ...]:
    """The text of `ids` in pieces, each trained or not. Joined, they are the text of all ids.

    The text up to each boundary is decoded whole, as a character may need several tokens and a
    tokenizer may drop a leading space. A character across a boundary goes to the later piece.
    """
    ends = [i + 1 for i in range(len(ids)) if i + 1 == len(ids) or trained[i] != trained[i + 1]]
    pieces: list[tuple[str, bool]] = []
    done = ""
    whole = _decode(ids, tokenizer)
    for end in ends:
        text = whole if end == len(ids) else _decode(ids[:end], tokenizer).rstrip(REPLACEMENT)
        text = text if whole.startswith(text) and len(text) >= len(done) else done
        if text != done:
            pieces.append((text[len(done) :], trained[end - 1]))
        done = text
    return tuple(pieces)


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def check(tokenized: TokenizedData, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse data with nothing to train on.

    Raises:
        DataError: no row has a trained token, no pair two answers, or all labels are the same; the first row is shown,
            decoded.
    """
    statistics = tokenized.statistics
    if statistics.kept and statistics.desirable in (0, statistics.kept):
        label = "true" if statistics.desirable else "false"
        raise DataError(
            f"All {statistics.kept:,} labels of the rows read from {tokenized.rows.source} are {label}, so that no "
            "desirable answer can be compared with another one. Add answers with the other label, or check the column: "
            "--map label=COLUMN."
        )
    if statistics.kept:
        return
    shown = example(tokenized, tokenizer, 0)
    text = "".join(piece for piece, _ in shown.spans)
    alike = statistics.identical + statistics.alike_when_cut
    if alike:
        cut = f", {statistics.alike_when_cut} of them when cut" if statistics.alike_when_cut else ""
        raise DataError(
            f"None of the {statistics.rows} pairs of {tokenized.rows.source} can be trained on: in {alike} both "
            f"answers are the same{cut}, and in the others one is empty or too long. Check the columns, --map and "
            f"--max-length. {shown.origin} reads: {start_of(text, 500)}"
        )
    if statistics.dropped or (statistics.rejected and statistics.rejected.dropped):
        hint = f"All are longer than {statistics.max_length} tokens: use a larger --max-length, or --on-long truncate."
    elif statistics.truncated:
        hint = f"Truncation to {statistics.max_length} tokens leaves only the prompt: use a larger --max-length."
    else:
        hint = "Every answer is blank: check the columns, and --map."
    raise DataError(
        f"None of the {statistics.rows} rows of {tokenized.rows.source} has a token to train on. {hint} "
        f"{shown.origin}, with {shown.length} tokens, reads: {start_of(text, 500)}"
    )


def facts(statistics: DataStatistics) -> list[str]:
    """The statistics in plain lines; see also `warnings`."""
    s = statistics
    told = [f"{s.rows:,} rows of format {s.format}, {s.kept:,} of them trained on"]
    if s.desirable is not None:
        told.append(f"{s.desirable:,} answers are desirable, {s.kept - s.desirable:,} are not")
    if s.rejected is None:
        return told + _sizes(s)
    sides = (("chosen", s), ("rejected", s.rejected))
    return told + [f"{name}: {line}" for name, side in sides for line in _sizes(side)]


def _sizes(s: DataStatistics) -> list[str]:
    p = s.length_percentiles
    share = 100 * s.trained_tokens / s.tokens if s.tokens else 0.0
    return [
        f"{s.tokens:,} tokens, {s.trained_tokens:,} of them trained ({share:.1f} %)",
        f"length in tokens: p5 {p['p5']}, median {p['p50']}, p95 {p['p95']}, p99 {p['p99']}, longest {p['max']}; "
        f"the limit is {s.max_length}",
    ]


def warnings(statistics: DataStatistics) -> list[str]:
    """What the user should look at, with counts, such as rows cut, dropped or left out. Empty if all is well."""
    s = statistics
    if s.rejected is not None:
        pairs = [
            (s.identical, "have twice the same answer and are left out"),
            (s.alike_when_cut, "have the same answer twice when cut (see --max-length), left out"),
        ]
        sides = (("chosen", s), ("rejected", s.rejected))
        told = [f"{name}: {line}" for name, side in sides for line in _counted(_found(side), s)]
        return _counted(pairs, s) + told
    return _counted(_found(s), s)


def _found(s: DataStatistics) -> list[tuple[int, str]]:
    found = [
        (s.truncated, f"are truncated to {s.max_length} tokens (see --max-length, --on-long)"),
        (s.dropped, f"are longer than {s.max_length} tokens, and dropped (see --max-length)"),
        (s.rows_without_end_of_turn, "are cut before their end-of-turn token"),
        (s.rows_without_trained_tokens, "have nothing to train on and are left out"),
    ]
    found += [
        (s.openings, "begin with an answer, which is context and not trained"),
        (
            s.openings_left_out,
            "begin with an answer that the chat template refuses: it is left out",
        ),
    ]
    found += [
        (count, f"have {key!r}, which neither the chat template nor ptp uses")
        for key, count in s.unprinted_keys.items()
    ]
    found += [
        (count, f"spell {token} in their own text: the model sees a control token there")
        for token, count in s.control_tokens.items()
    ]
    return found


def _counted(found: list[tuple[int, str]], s: DataStatistics) -> list[str]:
    return [
        f"{count:,} of {s.rows:,} rows ({100 * count / s.rows:.1f} %) {what}"
        for count, what in found
        if count
    ]

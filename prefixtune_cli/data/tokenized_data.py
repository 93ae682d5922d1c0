"""A tokenized data set and its statistics.

The tokens are written to an Arrow file beside the rows and memory-mapped. The file is named after the rows' content,
the tokenizer and the settings. The statistics are read from it column by column.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from prefixtune_cli.data.load import LoadedData
from prefixtune_cli.data.row_encoder import MASKED, Remark, RowEncoder
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

# Part of the cache's key: raise it whenever the same rows give other tokens than before.
VERSION = 5
ROWS_A_BATCH = 1000
ONE_PROMPT = (
    "All rows have the same prompt, so KTO compares their answers with each other, not with others."
)


@dataclasses.dataclass(frozen=True)
class DataStatistics:
    """Statistics that are shown before the model loads.

    Attributes:
        rows: rows read; `kept` of them are trained on.
        tokens, trained_tokens: of the kept rows, after truncation.
        length_percentiles: p5, p50, p95, p99 and max of all rows' tokens, before truncation.
        truncated, dropped: rows longer than max_length, by what happens to them.
        rows_without_trained_tokens: rows left out because no token of theirs is trained; dropped rows do not count.
        rows_without_end_of_turn: kept rows whose last end-of-turn token was truncated.
        control_tokens: the number of rows by the control token that their own text spells.
        openings: rows that begin with an answer; `openings_left_out`: those for which the template refuses it.
        unprinted_keys: the number of rows by a key of their messages, or `tools`, that the template uses in no row.
        identical, alike_when_cut: pairs left out as both answers are the same, as written or after truncation.
        rejected: of pairs, the same statistics of the rejected answers; the others are of the chosen ones.
        desirable: of labelled answers, how many of the kept ones are desirable.
    """

    format: str
    rows: int
    kept: int
    tokens: int
    trained_tokens: int
    length_percentiles: dict[str, int]
    max_length: int
    truncated: int
    dropped: int
    rows_without_trained_tokens: int
    rows_without_end_of_turn: int
    control_tokens: dict[str, int] = dataclasses.field(default_factory=dict)
    openings: int = 0
    openings_left_out: int = 0
    unprinted_keys: dict[str, int] = dataclasses.field(default_factory=dict)
    identical: int = 0
    alike_when_cut: int = 0
    rejected: DataStatistics | None = None
    desirable: int | None = None


@dataclasses.dataclass(frozen=True)
class TokenizedData:
    """Token ids with labels.

    Attributes:
        dataset: `input_ids` and `labels` (int32 lists; MASKED where not trained) of the kept rows, and
            `row`, their numbers in `rows`. Of pairs these are the chosen answers, and `other_ids` and `other_labels`
            the rejected ones. Of labelled answers, `desirable` has the labels, and `other_ids` and `other_labels` are
            the answer to another prompt, behind this one.
        every_row: the same for all rows, in the order of `rows`, with `length`, `trained`, `ended` and `remarks`.
        statistics: the statistics of both.
        rows, encoder: the rows, and the encoder that tokenized them. It also turns them into questions.
        notices: what the user should know.
        rejected: of pairs, the rejected answers, all of them.
    """

    dataset: Dataset
    every_row: Dataset
    statistics: DataStatistics
    rows: LoadedData
    encoder: RowEncoder
    notices: tuple[str, ...]
    rejected: Dataset | None = None

    def kept(self) -> LoadedData:
        """The rows of `dataset`, as they were loaded."""
        return self.rows.select(self.dataset["row"])

    def first_from(self, token_id: int) -> tuple[int, int] | None:
        """The first row of `dataset` with a token of this id or a higher one: its number, and its highest id."""
        import pyarrow.compute as pc

        columns = ["input_ids", *(["other_ids"] if self.rejected is not None else [])]
        highest = max(
            pc.max(pc.list_flatten(every_row.data.column("input_ids"))).as_py() or 0
            for every_row in filter(None, (self.every_row, self.rejected))
        )
        if highest < token_id:
            return None
        rows = ((row["row"], max(max(row[name]) for name in columns)) for row in self.dataset)
        return next((found for found in rows if found[1] >= token_id), None)


def tokenize(
    rows: LoadedData,
    tokenizer: PreTrainedTokenizerBase,
    section: DataSection,
    first_tokens: int | None = None,
) -> TokenizedData:
    """Render, tokenize, mask and truncate.

    Args:
        rows: what `load_rows` returned.
        tokenizer: the model's; it is not changed.
        section: train_on, max_length, on_long and chat_template are used.
        first_tokens: see `RowEncoder`.

    Raises:
        DataError: no template for chats, a template that does not fit, or long rows with on_long error.
    """
    import numpy as np

    encoder = RowEncoder(rows, tokenizer, section, first_tokens)
    every_row = _encoded(rows, tokenizer, encoder)
    kept = _kept(every_row, section)
    rejected = None
    if not rows.of_pairs:
        statistics = _count(every_row, kept, rows, section)
        dataset = every_row.select_columns(["input_ids", "labels", "row"])
    else:
        rejected = _encoded(rows.rejected(), tokenizer, encoder)
        both = kept & _kept(rejected, section)
        same = both & _same(every_row, rejected)
        kept = both & ~same
        cut = same & _differ_as_written(rows, same)
        statistics = dataclasses.replace(
            _count(every_row, kept, rows, section),
            identical=int((same & ~cut).sum()),
            alike_when_cut=int(cut.sum()),
            rejected=_count(rejected, kept, rows, section),
        )
        dataset = _beside(every_row, rejected)
    if statistics.kept < statistics.rows:
        dataset = dataset.select(np.flatnonzero(kept))
    notices = _notices(rows, tokenizer, encoder)
    if rows.labelled and statistics.kept:
        labels = np.array(rows.dataset["desirable"])[kept]
        statistics = dataclasses.replace(statistics, desirable=int(labels.sum()))
        prompts = _prompts(dataset)
        if len(set(prompts)) == 1:
            notices += (ONE_PROMPT,)
        dataset = _beside_others(dataset, _others(prompts), section.max_length)
        dataset = dataset.add_column("desirable", labels)
    return TokenizedData(dataset, every_row, statistics, rows, encoder, notices, rejected)


def _encoded(rows: LoadedData, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder) -> Dataset:
    every_row = rows.dataset.with_format("arrow").map(
        encoder,
        batched=True,
        with_indices=True,
        batch_size=ROWS_A_BATCH,
        remove_columns=rows.dataset.column_names,
        new_fingerprint=_fingerprint(rows, tokenizer, encoder),
        desc="Tokenizing",
    )
    return every_row.with_format(None)


def _beside(chosen: Dataset, rejected: Dataset) -> Dataset:
    """Pairs: the columns of both; nothing is copied."""
    from datasets import concatenate_datasets

    names = {"input_ids": "other_ids", "labels": "other_labels"}
    other = rejected.select_columns(list(names)).rename_columns(names)
    return concatenate_datasets(
        [chosen.select_columns(["input_ids", "labels", "row"]), other], axis=1
    )


def _beside_others(dataset: Dataset, others: list[int], max_length: int) -> Dataset:
    """Each prompt with its own answer, and with that of the row whose number is in `others`.

    KTO estimates from the others how far a model is from its reference (Ethayarajh et al. 2024, arXiv 2402.01306,
    section 4.1). They depend on the rows alone: neither on batches nor on the number of processes.
    """

    def with_others(rows: dict[str, list[Any]]) -> dict[str, list[list[int]]]:
        answers = dataset[rows["other"]]
        found: dict[str, list[list[int]]] = {"other_ids": [], "other_labels": []}
        for ids, labels, other_ids, other_labels in zip(
            rows["input_ids"], rows["labels"], answers["input_ids"], answers["labels"], strict=True
        ):
            asked, answered = _prompt_tokens(labels), _prompt_tokens(other_labels)
            found["other_ids"].append([*ids[:asked], *other_ids[answered:]][:max_length])
            masked = [*labels[:asked], *other_labels[answered:]]
            found["other_labels"].append(masked[:max_length])
        return found

    return dataset.add_column("other", others).map(
        with_others,
        batched=True,
        batch_size=ROWS_A_BATCH,
        remove_columns=["other"],
        desc="Tokenizing",
    )


def _prompts(dataset: Dataset) -> list[int]:
    """A number for each row, which rows with the same prompt have in common."""
    return [
        hash(tuple(ids[: _prompt_tokens(labels)]))
        for some in dataset.select_columns(["input_ids", "labels"]).iter(ROWS_A_BATCH)
        for ids, labels in zip(some["input_ids"], some["labels"], strict=True)
    ]


def _others(prompts: list[int]) -> list[int]:
    """For each row the number of one with another prompt: the first from half the data away on, if there is any."""
    count = len(prompts)
    # How many rows from here on have the same prompt as this one, so that a long run of them is passed at once.
    same = [1] * count
    for i in reversed(range(count - 1)):
        same[i] = same[i + 1] + 1 if prompts[i] == prompts[i + 1] else 1
    found = []
    for i in range(count):
        passed = 0
        while prompts[other := (i + count // 2 + passed) % count] == prompts[i] and passed < count:
            passed += same[other]
        found.append(other)
    return found


def _prompt_tokens(labels: list[int]) -> int:
    """The tokens before the first one that is trained."""
    return next(i for i, label in enumerate(labels) if label != MASKED)


def _numbers(every_row: Dataset, column: str) -> Any:
    return every_row.data.column(column).to_numpy()


def _kept(every_row: Dataset, section: DataSection) -> Any:
    """Which rows are trained on (bool array)."""
    trained = _numbers(every_row, "trained") > 0
    if section.on_long == "drop":
        trained = trained & (_numbers(every_row, "length") <= section.max_length)
    return trained


def _same(chosen: Dataset, rejected: Dataset) -> Any:
    """Which rows have the same tokens, after truncation (bool array)."""
    import numpy as np

    return np.array(
        [
            one == other
            for one, other in zip(
                chosen.data.column("input_ids"), rejected.data.column("input_ids"), strict=True
            )
        ]
    )


def _differ_as_written(rows: LoadedData, same: Any) -> Any:
    """Which of the pairs that are the same after truncation have two answers in the file (bool array)."""
    found = same.copy()
    for i in same.nonzero()[0].tolist():
        row = rows.dataset[i]
        found[i] = row[rows.answers] != row["rejected"]
    return found


def _fingerprint(
    rows: LoadedData, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder
) -> str | None:
    """A name for the tokens, made of everything that they depend on. None leaves the name to `datasets`."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    section = encoder.section
    settings = json.dumps(
        [
            VERSION,
            rows.fingerprint,
            section.train_on,
            section.max_length,
            encoder.first_tokens,
            encoder.chat.source if encoder.chat else None,
            tokenizer.special_tokens_map,
        ],
        default=str,
        sort_keys=True,
    )
    return hashlib.sha256((settings + backend.to_str()).encode()).hexdigest()[:32]


def _notices(
    rows: LoadedData, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder
) -> tuple[str, ...]:
    ends = _on_ends(rows, tokenizer, encoder)
    if (first := encoder.first_tokens) is None:
        return ends
    return (
        *ends,
        f"The first {first} answer tokens of a row are learned; the rest of the row is left out.",
    )


def _on_ends(
    rows: LoadedData, tokenizer: PreTrainedTokenizerBase, encoder: RowEncoder
) -> tuple[str, ...]:
    end = tokenizer.convert_ids_to_tokens(encoder.end_id)
    if rows.layout == "text":
        return (f"{end} ends each text.",)
    if encoder.chat is None:
        return (
            "The tokenizer has no chat template: prompt and completion are joined as they are, with a space between "
            f"them if neither has one, and {end} ends each example.",
        )
    pieces = tuple(
        f"The chat template writes {text}, which is not a token of the tokenizer: it becomes several, like any text. A "
        "template that was made for this tokenizer needs fewer."
        for text in _not_tokens(encoder.chat.source, tokenizer)
    )
    added = " ptp adds it, as the template has no such token." if encoder.appends_end else ""
    return (f"Chat template: {end} ends each answer.{added}", *pieces)


def _not_tokens(template: str, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts in a template that look like special tokens but are none of the tokenizer's."""
    written = dict.fromkeys(re.findall(r"<\|[^\s|<>]+\|>|<(?:start|end)_of_\w+>", template))
    return [
        text for text in written if len(tokenizer(text, add_special_tokens=False).input_ids) > 1
    ]


def _count(every_row: Dataset, kept: Any, rows: LoadedData, section: DataSection) -> DataStatistics:
    """The statistics; `kept` tells which rows are trained on (bool array)."""
    import numpy as np

    length, trained, ended = (_numbers(every_row, name) for name in ("length", "trained", "ended"))
    long = length > section.max_length
    if section.on_long == "error" and long.any():
        first = int(np.argmax(long))
        raise DataError(
            f"{long.sum()} of {len(long)} rows are longer than {section.max_length} tokens; the first is "
            f"{rows.row_origin(first)} with {length[first]}, the longest has {length.max()}. Use --max-length "
            f"{length.max()}, or --on-long truncate or drop."
        )
    dropped = long if section.on_long == "drop" else np.zeros_like(long)
    remarks = _remarks(every_row)
    left_out = remarks[Remark.OPENING_LEFT_OUT].total()
    printed = remarks[Remark.PRINTED].keys()
    percentiles = np.percentile(length, [5, 50, 95, 99, 100], method="inverted_cdf")
    return DataStatistics(
        format=rows.format,
        rows=len(length),
        kept=int(kept.sum()),
        tokens=int(np.minimum(length, section.max_length)[kept].sum()),
        trained_tokens=int(trained[kept].sum()),
        length_percentiles=dict(
            zip(("p5", "p50", "p95", "p99", "max"), map(int, percentiles), strict=True)
        ),
        max_length=section.max_length,
        truncated=int((long & ~dropped).sum()),
        dropped=int(dropped.sum()),
        rows_without_trained_tokens=int((~dropped & (trained == 0)).sum()),
        rows_without_end_of_turn=int((kept & ~ended).sum()),
        control_tokens=dict(remarks[Remark.CONTROL]),
        openings=remarks[Remark.OPENING].total() + left_out,
        openings_left_out=left_out,
        unprinted_keys={k: n for k, n in remarks[Remark.UNPRINTED].items() if k not in printed},
    )


def _remarks(every_row: Dataset) -> dict[Remark, Counter[str]]:
    """The number of rows with each remark: {remark: {the name of the token or key, "" if there is none: rows}}."""
    import pyarrow.compute as pc

    found: dict[Remark, Counter[str]] = {remark: Counter() for remark in Remark}
    flat = pc.list_flatten(every_row.data.column("remarks").combine_chunks())
    for entry in pc.value_counts(flat).to_pylist():
        remark, _, name = entry["values"].partition(": ")
        found[Remark(remark)][name] = entry["counts"]
    return found

"""A user's test data, read and tokenized before a model loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixtune_cli.data.inspect import check, warnings
from prefixtune_cli.data.load import LoadedData, load_rows
from prefixtune_cli.data.tokenized_data import TokenizedData, tokenize
from prefixtune_cli.evaluate.settings import check_limit
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import DataSection, Kind


@dataclass(frozen=True)
class ReadData:
    """Test data.

    Attributes:
        tokenized: the chosen rows.
        rows: those of them that have a token with a loss and are not too long, in the order of the file.
        fingerprint: sha256 of the whole data.
        total: rows of the whole data.
        chosen: rows that the limit has left.
    """

    tokenized: TokenizedData
    rows: LoadedData
    fingerprint: str
    total: int
    chosen: int

    @property
    def facts(self) -> dict[str, Any]:
        """What the record of a result says of the data."""
        return {
            "source": self.rows.source,
            "sha256": self.fingerprint,
            "rows": self.total,
            "evaluated": len(self.rows),
            "skipped": self.chosen - len(self.rows),
        }


def read_data(
    source: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    *,
    limit: int | None,
    kind: Kind = "answers",
) -> ReadData:
    """Load, check and tokenize.

    Args:
        source: a file, a folder, `sample:NAME` or a hub data set id.
        section: says how to read and tokenize; its `train` and `eval` are not used.
        tokenizer: the base's.
        reporter: hears what was found.
        limit: the most rows, evenly spread; None takes all.
        kind: of the rows that are read.

    Raises:
        OtherRowsError: the rows are of another kind.
        DataError: the data is missing or wrong, or no row has a token with a loss.
        ResourceError: the hub cannot be reached, or the disk is full.
        UsageError: the limit is below 1.
    """
    check_limit(limit)
    rows = load_rows(source, section, kind)
    fingerprint, total = rows.fingerprint, len(rows)
    if limit is not None:
        rows = rows.spread(limit)
    tokenized = tokenize(rows, tokenizer, section)
    for notice in (*rows.notices, *tokenized.notices):
        reporter.notice(notice)
    for warning in warnings(tokenized.statistics):
        reporter.warning(warning)
    check(tokenized, tokenizer)
    return ReadData(tokenized, tokenized.kept(), fingerprint, total, len(rows))

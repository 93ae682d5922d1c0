"""Real data sets, read from their folder beside the repository."""

from pathlib import Path

import pytest

from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.row_encoder import RowEncoder
from prefixtune_cli.data.tokenized_data import tokenize
from prefixtune_cli.errors import DataError
from prefixtune_cli.recipe.schema import DataSection, ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

FOLDER = Path(__file__).parents[3] / "shared" / "data"

pytestmark = pytest.mark.skipif(
    not FOLDER.is_dir(), reason="needs Banking77 and GSM8K in ../shared/data beside the repository"
)


def test_banking77_is_read_by_mapped_columns_and_its_answers_are_labels() -> None:
    section = DataSection(map={"prompt": "text", "completion": "category"}, max_length=256)
    rows = load_rows(str(FOLDER / "banking77" / "train.csv"), section)
    assert len(rows) == 10003
    tokenizer = load_tokenizer(ModelSection())
    tokenized = tokenize(rows, tokenizer, section)
    assert tokenized.statistics.kept == 10003
    assert tokenized.statistics.truncated == 0
    chosen = rows.select(range(0, 10003, 100))
    assert {
        asked.answer for asked in map(RowEncoder(chosen, tokenizer, section).prompt, chosen.dataset)
    } <= set(rows.dataset["completion"])
    assert len(set(rows.dataset["completion"])) == 77


def test_banking77_without_a_map_asks_what_its_columns_are() -> None:
    with pytest.raises(DataError, match=r"--map prompt=text,completion=category\..*--format text"):
        load_rows(str(FOLDER / "banking77" / "train.csv"), DataSection())


def test_gsm8k_is_recognised_as_questions_and_answers() -> None:
    rows = load_rows(str(FOLDER / "gsm8k" / "train.jsonl"), DataSection())
    assert (rows.format, len(rows)) == ("question-answer", 7473)
    assert "#### " in rows.dataset[0]["completion"]

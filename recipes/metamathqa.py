"""The data and the score of metamathqa.yaml, by the rules of PEFT's method_comparison/MetaMathQA.

python recipes/metamathqa.py data MetaMathQA/MetaMathQA-395K.json gsm8k metamathqa
python recipes/metamathqa.py score answers.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from decimal import Decimal, DivisionByZero, InvalidOperation
from itertools import islice
from pathlib import Path
from typing import Any

PROMPT = "Question: {} Think step by step.\nAnswer:"
LONGEST = 1300  # characters of query and response with a space between them
ROWS = 20_000  # that 5,000 steps of 4 rows see, the first of the file
VALID_ROWS = 50  # of GSM8K's training set
MARKS = (
    "The answer is: ",
    "The answer is ",
    "The final answer is: ",
    "The final answer is ",
    "#### ",
)


def training_rows(rows: Iterable[dict[str, str]], count: int = ROWS) -> list[dict[str, str]]:
    """The first rows of MetaMathQA that are short enough, as one text each."""
    short = (row for row in rows if len(row["query"]) + 1 + len(row["response"]) <= LONGEST)
    return [{"text": PROMPT.format(r["query"]) + r["response"]} for r in islice(short, count)]


def question(row: dict[str, str]) -> dict[str, str]:
    """A row of GSM8K."""
    return {"prompt": PROMPT.format(row["question"]), "completion": row["answer"]}


def final_answer(text: str) -> float | str | None:
    """What stands behind the last of the first kind of mark that there is: a number where it is one."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    found = text.rpartition(mark)[2].strip().partition("\n")[0].strip(" .!?$%")
    try:
        over, slash, under = found.partition("/")
        return float(Decimal(over.strip()) / Decimal(under.strip()) if slash else Decimal(found))
    except (InvalidOperation, DivisionByZero):
        return found


def is_right(row: dict[str, str]) -> bool:
    """Whether a row that `ptp generate` answered has its reference's final answer."""
    said = final_answer(row["prompt"] + row["generated"])
    return said is not None and said == final_answer(row["completion"])


def _gsm8k(folder: str, split: str) -> list[dict[str, Any]]:
    from pyarrow import parquet

    (file,) = Path(folder, "main").glob(f"{split}-*.parquet")
    return [question(row) for row in parquet.read_table(file).to_pylist()]


def _write(path: Path, rows: list[dict[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{path}: {len(rows)} rows")


def _data(metamathqa: str, gsm8k: str, out: str) -> None:
    import numpy as np

    rows = json.loads(Path(metamathqa).read_text(encoding="utf-8"))
    train = _gsm8k(gsm8k, "train")
    order = np.arange(len(train))
    np.random.RandomState(0).shuffle(order)
    _write(Path(out, "train.jsonl"), training_rows(rows))
    _write(Path(out, "valid.jsonl"), [train[i] for i in order[:VALID_ROWS]])
    _write(Path(out, "test.jsonl"), _gsm8k(gsm8k, "test"))


def _score(answers: str) -> None:
    lines = Path(answers).read_text(encoding="utf-8").split("\n")
    right = [is_right(json.loads(line)) for line in lines if line]
    print(f"{sum(right)} of {len(right)} right: {100 * sum(right) / len(right):.1f} %")


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["data", metamathqa, gsm8k, out]:
            _data(metamathqa, gsm8k, out)
        case ["score", answers]:
            _score(answers)
        case _:
            sys.exit(__doc__)

"""The rows of a comparison: they are drawn once, written to files, and the same for every method.

The test rows are the recipe's held-out data. The validation rows, which choose the learning rates, are taken out of the
training data, so that no choice sees the test rows. Few-shot takes K of the other rows of each class, drawn anew for
each seed.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prefixtune_cli.compare.comparison import OOD, TEST
from prefixtune_cli.compare.folder import mark
from prefixtune_cli.data.conversation import Conversation
from prefixtune_cli.data.format import as_written
from prefixtune_cli.data.load import LoadedData, load_rows
from prefixtune_cli.errors import DataError
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import json_line, write_atomically

TRAIN, VALIDATION = "train", "validation"
VALIDATION_SHARE = 0.1  # of the training rows, and at most evaluate.max_rows of them


@dataclass(frozen=True)
class Rows:
    """The files of a comparison.

    Attributes:
        train: the training file of each seed; without few-shot all seeds share one.
        validation, test, ood: the other files; None where there is no data of another distribution.
        about: data set → source, rows, sha256.
        notices: what a reader of the figures should know.
    """

    train: Mapping[int, Path]
    validation: Path
    test: Path
    ood: Path | None
    about: Mapping[str, Mapping[str, Any]]
    notices: Sequence[str]


def draw_rows(
    recipe: Recipe,
    folder: Path,
    seeds: Sequence[int],
    *,
    few_shot: int | None,
    ood: str | None,
    reporter: Reporter,
) -> Rows:
    """Draw the rows and write them to data/ of a comparison's folder, as JSONL in the format that they were read in.

    Nothing is written before all data is read; then the folder is marked as a comparison's.

    Args:
        recipe: its train.seed draws the validation rows, and the test rows where there is no data.eval.
        folder: the comparison's.
        seeds: of the cells.
        few_shot: training examples of each class; None takes all rows.
        ood: data of another distribution, in the same formats.
        reporter: hears what was found.

    Raises:
        DataError: data is missing, wrong or too little, or few-shot finds no classes.
    """
    section, seed = recipe.data, recipe.train.seed
    if section.train is None:
        raise DataError("data.train is missing. Type --data FILE, or --recipe quickstart.")
    kind = recipe.kind
    rows = load_rows(section.train, section, kind)
    for notice in rows.notices:
        reporter.notice(notice)
    if section.eval is not None:
        test, test_source = load_rows(section.eval, section, kind), section.eval
    else:
        rows, test = rows.split(section.held_out_share, seed)
        test_source = f"{section.train} (held out)"
    share = min(VALIDATION_SHARE, recipe.evaluate.max_rows / len(rows))
    rows, validation = rows.split(share, seed + 1)
    notices: list[str] = []
    names, drawn = dict.fromkeys(seeds, TRAIN), {TRAIN: rows}
    if few_shot is not None:
        classes = _classes(rows, few_shot)
        if short := sum(len(found) < few_shot for found in classes.values()):
            notices = [f"{short} of {len(classes)} classes have fewer than {few_shot} rows."]
        names = {s: f"{TRAIN}-{few_shot}-shot-seed-{s}" for s in seeds}
        drawn = {names[s]: _few_of_each(rows, classes, few_shot, s) for s in seeds}
    other = None if ood is None else _other(ood, recipe)
    mark(folder)
    data = folder / "data"
    each = [_write(data, name, part, section.train) for name, part in drawn.items()]
    hashes = {"sha256": [about["sha256"] for about in each]}
    about = {
        TRAIN: each[0] if few_shot is None else {**each[0], **hashes},
        VALIDATION: _write(data, VALIDATION, validation, section.train),
        TEST: _write(data, TEST, test, test_source),
    }
    if ood is not None and other is not None:
        about[OOD] = _write(data, OOD, other, ood)
    for notice in notices:
        reporter.notice(notice)
    counts = sorted({len(part) for part in drawn.values()})
    shown = "–".join(map(str, dict.fromkeys((counts[0], counts[-1]))))
    reporter.notice(
        f"Rows: {shown} to train on, {len(validation)} to choose learning rates by, {len(test)} to test on."
    )
    return Rows(
        train={s: _file(data, names[s]) for s in seeds},
        validation=_file(data, VALIDATION),
        test=_file(data, TEST),
        ood=None if other is None else _file(data, OOD),
        about=about,
        notices=notices,
    )


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.jsonl"


def _write(folder: Path, name: str, rows: LoadedData, source: str) -> dict[str, Any]:
    """Write the rows, unless the file has them already; what `Rows.about` says of them."""
    text = "".join(json_line(as_written(row, rows.format)) for row in rows.dataset)
    digest = hashlib.sha256(text.encode()).hexdigest()
    file = _file(folder, name)
    if not file.exists() or hashlib.sha256(file.read_bytes()).hexdigest() != digest:
        write_atomically(file, text)
    return {"source": source, "rows": len(rows), "sha256": digest}


def _other(source: str, recipe: Recipe) -> LoadedData:
    """Out-of-distribution rows: their columns have the names that the recipe maps, or those of their own format."""
    kind = recipe.kind
    try:
        return load_rows(source, recipe.data, kind)
    except DataError:
        if not recipe.data.map and recipe.data.format == "auto":
            raise
        as_named = recipe.data.model_copy(update={"map": {}, "format": "auto"})
        return load_rows(source, as_named, kind)


def _classes(rows: LoadedData, count: int) -> dict[str, list[int]]:
    """Answer → the indices of its rows; rows of one class have the same answer.

    Raises:
        DataError: a row has no answer, or most answers are different, so that they are no classes.
    """
    found: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows.dataset):
        found[_answer(row, rows.row_origin, i)].append(i)
    if 2 * len(found) > len(rows):
        raise DataError(
            f"--few-shot {count} draws rows a class, but the {len(rows)} training rows have {len(found)} different "
            "answers: they are no classes. Leave --few-shot out."
        )
    return found


def _few_of_each(
    rows: LoadedData, classes: Mapping[str, Sequence[int]], count: int, seed: int
) -> LoadedData:
    """`count` random rows of each class."""
    rng = np.random.default_rng(seed)
    chosen = [i for name in sorted(classes) for i in rng.permutation(classes[name])[:count]]
    return rows.select(sorted(map(int, chosen)))


def _answer(row: Mapping[str, Any], origin: Any, i: int) -> str:
    if "completion" in row:
        return str(row["completion"]).strip()
    talk = Conversation.of(row) if "messages" in row else Conversation([])
    if not talk.learned:
        raise DataError(f"--few-shot needs answers, and {origin(i)} has none. Leave it out.")
    return str(talk.messages[talk.learned[-1]]["content"]).strip()

"""Answers that are labels: their codes, their confusion matrix, and macro-F1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.evaluate.matching import compared_part
from prefixtune_cli.evaluate.questions import Question


def label_codes(
    labels: Sequence[str],
    questions: Sequence[Question],
    answers: Sequence[str],
    pattern: str | None = None,
) -> NDArray[np.int64]:
    """Each row as reference · (labels + 1) + answered label; the extra label means any other answer.

    With a `pattern`, the labels are what it finds in references and answers.
    """
    number: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    other = len(number)
    return np.array(
        [
            number.get(label_of(q, pattern), other) * (other + 1)
            + number.get(compared_part(answer, pattern), other)
            for q, answer in zip(questions, answers, strict=True)
        ],
        dtype=np.int64,
    )


def label_of(question: Question, pattern: str | None) -> str:
    """The reference as a label."""
    return compared_part(question.answer, pattern) or ""


def confusion(codes: NDArray[np.int64], labels: int) -> NDArray[np.int64]:
    """Counts [labels, labels + 1] by reference and answered label."""
    return np.bincount(codes, minlength=labels * (labels + 1)).reshape(labels, labels + 1)


def macro_f1(codes: NDArray[np.int64], labels: int) -> float:
    """The mean F1 of the labels that occur as references.

    It equals scikit-learn's f1_score and is a hundred times as fast: a bootstrap calls it two thousand times.

    Args:
        codes: one a row, from `label_codes`.
        labels: the number of labels.
    """
    counts = confusion(codes, labels)
    wanted, given = counts.sum(axis=1), counts[:, :labels].sum(axis=0)
    occur = wanted > 0
    return float(np.mean(2 * counts.diagonal()[occur] / (wanted + given)[occur]))

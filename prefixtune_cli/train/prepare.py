"""Loads, checks, splits and tokenizes the data of a run, before the base model loads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefixtune_cli.data.inspect import check, facts, warnings
from prefixtune_cli.data.load import load_rows
from prefixtune_cli.data.locate import named
from prefixtune_cli.data.tokenized_data import DataStatistics, tokenize
from prefixtune_cli.evaluate.questions import Questions, example, short_questions
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.tokenizer import check_data
from prefixtune_cli.train.order import ROWS_AT_ONCE

BALANCED = (0.9, 1.5)  # a little wider than 1 to 4/3, so that no warning is for a few rows


@dataclass(frozen=True)
class Data:
    """The data that a run trains on, and the data that judges it.

    Attributes:
        train: rows with the columns of `TokenizedData`.
        origin: gives the file and line of a row of `train`.
        held_out: rows like those of `train`, with whole answers.
        answers: those of `held_out` that are to be given: of labelled ones, the desirable ones.
        questions: the held-out rows as prompts with their answers.
        example: a held-out prompt to try the result with; see `questions.example`.
        end_id: the token that ends an answer.
        fingerprints: source, rows and sha256 of each data set.
    """

    train: Dataset
    origin: Callable[[int], str]
    held_out: Dataset
    answers: Dataset
    questions: Questions
    example: dict[str, str]
    end_id: int | None
    fingerprints: dict[str, Any]

    @property
    def held_out_sha256(self) -> str:
        """The digest of the held-out rows."""
        return content(self.held_out)


def content(rows: Dataset) -> str:
    """The sha256 of rows of token ids and labels."""
    found = hashlib.sha256()
    for some in rows.iter(ROWS_AT_ONCE):
        found.update(json.dumps(some).encode())
    return found.hexdigest()


def prepare_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> Data:
    """Load, check, split and tokenize; tell the reporter what was found."""
    section = recipe.data
    source = named(section.train)
    rows = load_rows(source, section, recipe.kind)
    for notice in rows.notices:
        reporter.notice(notice)
    fingerprints: dict[str, Any] = {
        "train": {"source": source, "rows": len(rows), "sha256": rows.fingerprint}
    }
    if section.eval is not None:
        held_out_rows = load_rows(section.eval, section, recipe.kind)
        for notice in held_out_rows.notices:
            if notice not in rows.notices:
                reporter.notice(f"held-out: {notice}")
        if held_out_rows.fingerprint == rows.fingerprint:
            reporter.warning(
                f"--eval-data {section.eval} has the same rows as the training data, so the held-out figures say "
                "nothing about new rows. Name other rows, such as FOLDER:test, or leave out --eval-data."
            )
        fingerprints["eval"] = {
            "source": section.eval,
            "rows": len(held_out_rows),
            "sha256": held_out_rows.fingerprint,
        }
    else:
        rows, held_out_rows = rows.split(section.held_out_share, recipe.train.seed)
        reporter.notice(
            f"Held out for evaluation: {len(held_out_rows)} of {len(rows) + len(held_out_rows)} rows."
        )
    tokenized = tokenize(rows, tokenizer, section, recipe.train.first_tokens)
    for notice in (*tokenized.notices, *facts(tokenized.statistics)):
        reporter.notice(notice)
    for warning in warnings(tokenized.statistics):
        reporter.warning(warning)
    check(tokenized, tokenizer)
    if (said := _out_of_balance(recipe, tokenized.statistics)) is not None:
        reporter.warning(said)
    check_data(recipe.model, tokenizer, tokenized)
    held_out_rows = held_out_rows.spread(recipe.evaluate.max_rows)
    held_out = tokenize(held_out_rows, tokenizer, section)
    for warning in warnings(held_out.statistics):
        reporter.warning(f"held-out: {warning}")
    check(held_out, tokenizer)
    check_data(recipe.model, tokenizer, held_out)
    chat = tokenized.encoder.chat
    if section.chat_template is not None and chat is not None:
        digest = hashlib.sha256(chat.source.encode()).hexdigest()
        fingerprints["chat_template"] = {"source": section.chat_template, "sha256": digest}
    kept, answers = held_out.kept(), held_out.dataset
    if kept.labelled:
        desirable = np.flatnonzero(answers["desirable"]).tolist()
        kept, answers = kept.select(desirable), answers.select(desirable)
    questions = short_questions(kept, held_out.encoder, recipe.evaluate)
    if questions.notice is not None:
        reporter.notice(questions.notice)
    return Data(
        train=tokenized.dataset,
        origin=rows.row_origin,
        held_out=held_out.dataset,
        answers=answers,
        questions=questions,
        example=example(kept),
        end_id=tokenized.encoder.end_id,
        fingerprints=fingerprints,
    )


def _out_of_balance(recipe: Recipe, statistics: DataStatistics) -> str | None:
    """The warning that one label has much more weight than the other; None if there is no need for it.

    Desirable answers should together have between 1 and 4/3 of the weight of the others (Ethayarajh et al. 2024, arXiv
    2402.01306, eq. 8).
    """
    desirable, train = statistics.desirable, recipe.train
    if desirable is None:
        return None
    others = statistics.kept - desirable
    weight = desirable * train.desirable_weight / (others * train.undesirable_weight)
    low, high = BALANCED
    if low <= weight <= high:
        return None
    name, value = (
        ("undesirable_weight", desirable * train.desirable_weight / others)
        if weight > 1
        else ("desirable_weight", others * train.undesirable_weight / desirable)
    )
    return (
        f"The {desirable:,} desirable answers together have {weight:.2g} times the weight of the {others:,} others. To "
        f"balance them, type --set train.{name}={value:.2g}."
    )

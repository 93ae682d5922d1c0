"""A user's own pairs of answers: how often, and by how much, a model prefers the chosen one.

A line's difference between adapter and base needs no β: where the margin has grown by x nats, DPO's implicit reward is
ahead by β·x (Rafailov et al. 2023, arXiv 2305.18290). Per token, the figures are SimPO's (Meng et al. 2024, arXiv
2405.14734). The three functions are those of `own_data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from prefixtune_cli.evaluate.likelihoods import (
    likelihoods_of,
    per_token,
    rows_of_pairs,
    trained_tokens,
)
from prefixtune_cli.evaluate.losses import check_numbers, compared_line
from prefixtune_cli.evaluate.outcome import BASE, Line, Outcome
from prefixtune_cli.evaluate.paired import Floats, mean_difference, mean_interval
from prefixtune_cli.evaluate.preferences import Likelihoods, Preference, hits
from prefixtune_cli.evaluate.read_data import ReadData, read_data
from prefixtune_cli.evaluate.scorer import Example, Scorer
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import DataSection, Kind


@dataclass(frozen=True)
class OwnPairs:
    """Pairs of answers, or labelled ones, ready for a model.

    Attributes:
        name: the name of the evaluation, and of its files.
        read: the rows.
        examples: token ids and labels of the chosen answers, and behind them of the rejected ones; of labelled answers,
            of those and behind them of the answers to other prompts.
    """

    name: str
    read: ReadData
    examples: list[Example]

    def origin(self, example: int) -> str:
        """Where an example came from."""
        return self.read.rows.row_origin(example % len(self.read.rows))


def prepare(
    source: str,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
    *,
    name: str,
    limit: int | None,
    kind: Kind = "pairs",
) -> OwnPairs:
    """Load, check and tokenize, before a model loads."""
    read = read_data(source, section, tokenizer, reporter, limit=limit, kind=kind)
    return OwnPairs(name, read, rows_of_pairs(read.tokenized.dataset))


def judge(scorer: Scorer, data: OwnPairs, name: str) -> Likelihoods:
    """Ask one model."""
    losses = scorer.losses(data.examples, task := f"log-probabilities of {name}")
    check_numbers([nats for nats, _ in losses], task)
    return likelihoods_of(losses)


def compare(data: OwnPairs, judged: Mapping[str, Likelihoods]) -> Outcome:
    """The table; if the base took part, every model is compared with it, otherwise each has its own interval."""
    pairs = data.read.tokenized.dataset
    means = {model: per_token(found, pairs) for model, found in judged.items()}
    ahead = {model: found.chosen - found.rejected for model, found in judged.items()}
    ahead_per_token = {model: found.chosen - found.rejected for model, found in means.items()}

    def line(metric: str, values: Mapping[str, Floats], **how: Any) -> Line:
        return compared_line(
            data.name,
            metric,
            len(pairs),
            {model: float(found.mean()) for model, found in values.items()},
            lambda a, b: mean_difference([values[b]], [values[a]]),
            lambda a: mean_interval([values[a]]),
            **how,
        )

    def right(values: Mapping[str, Floats]) -> dict[str, Floats]:
        return {model: hits(found) for model, found in values.items()}

    lines = [
        line("chosen is likelier", right(ahead), percent=True),
        line("chosen is likelier per token", right(ahead_per_token), percent=True),
        line("margin", ahead),
        line("margin per token", ahead_per_token),
        line("chosen", {model: found.chosen for model, found in judged.items()}),
        line(
            "rejected",
            {model: found.rejected for model, found in judged.items()},
            higher_is_better=None,
        ),
    ]
    tokens = trained_tokens(pairs)
    items = [
        {
            "origin": data.origin(i),
            "tokens": {"chosen": tokens[0][i], "rejected": tokens[1][i]},
            "nats": {
                model: {"chosen": -float(found.chosen[i]), "rejected": -float(found.rejected[i])}
                for model, found in judged.items()
            },
        }
        for i in range(len(pairs))
    ]
    notices = ["Log-probabilities are in nats, of whole answers unless it says per token."]
    if base := judged.get(BASE):
        others = {model: found for model, found in judged.items() if model != BASE}
        if others:
            notices.append(
                "DPO's implicit reward is β times the margin's difference from the base."
            )
        notices += [
            f"Both answers are less likely to {model} than to the base, not only the rejected ones."
            for model, found in others.items()
            if Preference.of(found).has_both_below(Preference.of(base))
        ]
    return Outcome(data.name, lines, {"data": data.read.facts, "items": items}, tuple(notices))

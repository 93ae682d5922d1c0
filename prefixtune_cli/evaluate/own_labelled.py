"""A user's own labelled answers: how well a model tells desirable answers from others.

They are prepared and judged as pairs are, see `own_pairs`: beside each answer stands one to another prompt.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from prefixtune_cli.evaluate.labelled import Auc
from prefixtune_cli.evaluate.likelihoods import per_token, trained_tokens
from prefixtune_cli.evaluate.losses import compared_line
from prefixtune_cli.evaluate.outcome import BASE, Line, Outcome
from prefixtune_cli.evaluate.own_pairs import OwnPairs
from prefixtune_cli.evaluate.paired import (
    mean_difference,
    mean_interval,
)
from prefixtune_cli.evaluate.preferences import Likelihoods


def compare(data: OwnPairs, judged: Mapping[str, Likelihoods]) -> Outcome:
    """The table; if the base took part, every model is compared with it, otherwise each has its own interval."""
    rows = data.read.tokenized.dataset
    desirable = np.array(rows["desirable"])
    likelier = {m: Auc(per_token(found, rows).chosen, desirable) for m, found in judged.items()}

    def mean(metric: str, kind: np.ndarray, *, up: bool | None) -> Line:
        values = {model: found.chosen[kind] for model, found in judged.items()}
        return compared_line(
            data.name,
            metric,
            int(kind.sum()),
            {model: float(found.mean()) for model, found in values.items()},
            lambda a, b: mean_difference([values[b]], [values[a]]),
            lambda a: mean_interval([values[a]]),
            higher_is_better=up,
        )

    lines = [
        compared_line(
            data.name,
            "desirable is likelier per token",
            len(rows),
            {model: found.value for model, found in likelier.items()},
            lambda a, b: likelier[a].difference(likelier[b]),
            lambda a: likelier[a].interval,
            percent=True,
        ),
        mean("desirable", desirable, up=True),
        mean("undesirable", ~desirable, up=None),
    ]
    tokens = trained_tokens(rows)
    items = [
        {
            "origin": data.origin(i),
            "desirable": bool(desirable[i]),
            "tokens": {"chosen": tokens[0][i], "rejected": tokens[1][i]},
            "nats": {
                model: {"chosen": -float(found.chosen[i]), "rejected": -float(found.rejected[i])}
                for model, found in judged.items()
            },
        }
        for i in range(len(rows))
    ]
    notices = [
        "Each desirable answer is compared with each undesirable one. Means are log-probabilities in nats, of whole "
        "answers."
    ]
    if base := judged.get(BASE):
        notices += [
            f"To {model}, desirable answers are less likely than to the base, and not only the undesirable ones."
            for model, found in judged.items()
            if all(found.chosen[k].mean() < base.chosen[k].mean() for k in (desirable, ~desirable))
        ]
    return Outcome(data.name, lines, {"data": data.read.facts, "items": items}, tuple(notices))

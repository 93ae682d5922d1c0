"""How a run ended: summary.json with the scores and the verdict, and the answers beside it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from prefixtune_cli.evaluate.held_out import Divergence, Score
from prefixtune_cli.evaluate.matching import match_rule
from prefixtune_cli.evaluate.preferences import Preferences
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, json_line, write_atomically, write_json
from prefixtune_cli.train.callbacks import slower
from prefixtune_cli.train.prepare import Data

HELD_OUT = "held-out"
LEAST_GAIN = 0.001  # of the base's held-out loss; a smaller gain does not count


@dataclass(frozen=True)
class Summary:
    """How a run ended: the content of summary.json, and what `ptp train` prints.

    Attributes:
        why_no_exact_match: a sentence; None if answers were matched.
        started, finished: in UTC.
        seconds: from loading to the scores, since the run was started or last resumed.
        example: a held-out `prompt` to try the result with, perhaps with its `system` message.
        preferences: for a run on preferences; the scores are then those of the chosen or the desirable answers.
        divergence: for a run on preferences, from the base on the same answers.
        start: the run or the adapter folder that training went on from; None for a fresh adapter. `of_start` is its
            score.
    """

    run: str
    base: Score
    adapter: Score
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    steps: int
    held_out_rows: int
    peak_memory_gib: float
    model: str | None = None
    method: str | None = None
    started: str | None = None
    finished: str | None = None
    seconds: float | None = None
    why_no_exact_match: str | None = None
    answer_pattern: str | None = None
    example: dict[str, str] = field(default_factory=dict)
    preferences: Preferences | None = None
    divergence: Divergence | None = None
    start: str | None = None
    of_start: Score | None = None

    @property
    def scores(self) -> dict[str, Score]:
        """The score of base, start and adapter, as far as there are such."""
        found = {"base": self.base, "start": self.of_start, "adapter": self.adapter}
        return {who: score for who, score in found.items() if score is not None}

    @property
    def compared_with(self) -> str:
        """What the adapter is compared with: the `start` if there is one, else the `base`."""
        if self.preferences is not None:
            return self.preferences.compared_with
        return "base" if self.of_start is None else "start"

    @property
    def losses(self) -> tuple[float, float]:
        """The held-out losses of what the adapter is compared with and of the adapter, by the run's own objective."""
        if self.preferences is not None:
            return self.preferences.reference_loss, self.preferences.loss
        return self.scores[self.compared_with].loss, self.adapter.loss

    @property
    def verdict(self) -> Literal["better", "no better", "worse"]:
        """Judged by the held-out loss; but an adapter with more right answers than before is not worse.

        Nor is one that has brought more chosen answers ahead than it has set back.
        """
        base, adapter = self.losses
        margin = LEAST_GAIN * base
        if adapter < base - margin:
            return "better"
        if self.preferences is not None:
            is_right = self.preferences.is_ahead
        else:
            before = self.scores[self.compared_with]
            is_right = (self.adapter.exact_match or 0) > (before.exact_match or 0)
        as_good = adapter <= base + margin  # False for NaN, too
        return "no better" if as_good or is_right else "worse"

    def to_json(self) -> dict[str, Any]:
        return {
            **self.__dict__,
            "verdict": self.verdict,
            "base": self.base.to_json(),
            "adapter": self.adapter.to_json(),
            "divergence": asdict(self.divergence) if self.divergence else None,
            "of_start": self.of_start.to_json() if self.of_start else None,
            "exact_match_rule": match_rule(self.answer_pattern),
            "preferences": self.preferences.to_json() if self.preferences else None,
        }

    @classmethod
    def read(cls, run_dir: RunDir) -> Summary:
        """Read the summary of a finished run."""
        found = json.loads(run_dir.summary.read_text(encoding="utf-8"))
        for name in ("base", "adapter", "of_start"):
            if found.get(name):
                found[name] = Score(found[name]["loss"], found[name]["exact_match"])
        if found.get("divergence"):
            found["divergence"] = Divergence(**found["divergence"])
        if found.get("preferences"):
            found["preferences"] = Preferences.of_json(found["preferences"])
        return cls(**{name: found[name] for name in cls.__dataclass_fields__ if name in found})


def conclude(
    run_dir: RunDir,
    data: Data,
    base: tuple[Score, list[str]],
    adapter: tuple[Score, list[str]],
    summary: Summary,
) -> None:
    """Write the answers, the scores and, last, the summary."""
    answers = (
        {"origin": q.origin, "prompt": q.asked, "answer": q.answer, "base": b, "adapter": a}
        for q, b, a in zip(data.questions.asked, base[1], adapter[1], strict=True)
    )
    write_atomically(run_dir.answers, "".join(map(json_line, answers)))
    found = summary.to_json()
    kept = ("base", "adapter", *(["preferences"] if summary.preferences else []))
    write_json(run_dir.eval_result(HELD_OUT), {name: found[name] for name in kept})
    write_json(run_dir.summary, found)


def both_fell_warning(found: Preferences) -> str:
    """The warning that the better and the worse answers have both become less likely."""
    before, adapter, (better, worse) = found.reference, found.adapter, found.words
    closer, of, digits = "a larger --beta or ", "", 2
    if found.is_per_token:
        closer, of, digits = "", " per token", 4
    return (
        f"Of the held-out {found.rows} not only the {worse} ones have become less likely{of}: the mean "
        f"log-probability{of} of the {better} ones fell from {before.chosen:.{digits}f} to "
        f"{adapter.chosen:.{digits}f}, "
        f"that of the {worse} ones from {before.rejected:.{digits}f} to {adapter.rejected:.{digits}f}. Look at what "
        f"the model says now; {closer}a smaller --learning-rate keeps it closer to its {found.compared_with}."
    )


def not_better_warning(recipe: Recipe, run_dir: RunDir, summary: Summary) -> str:
    """The warning that the adapter's held-out loss is not below the base's, with what to try."""
    than, (before, adapter) = summary.compared_with, summary.losses
    losses = [row["loss"] for row in run_dir.read_metrics() if "loss" in row]
    rate = recipe.train.learning_rate or math.nan
    first, last = (losses[0], losses[-1]) if losses else (math.nan, math.nan)
    if last < 0.9 * first:
        why = "the training loss has fallen, so the adapter has memorized its rows"
        what = f"Try fewer --epochs, or more rows. {slower(rate)}"
    elif last > 1.02 * first:
        why, what = "the training loss has risen", slower(rate)
    else:
        why = "the training loss has hardly moved"
        what = f"Try more steps, or --learning-rate {3 * rate:.1g}, three times as much."
    return (
        f"The adapter is no better than its {than}: its held-out loss is {adapter:.4f}, the {than}'s {before:.4f}. "
        f"In training, the loss was {first:.4g} at first and {last:.4g} at last: {why}. {what}"
    )

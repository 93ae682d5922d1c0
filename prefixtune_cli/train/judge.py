"""What base, start and adapter make of a run's held-out rows."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.evaluate import labelled
from prefixtune_cli.evaluate.held_out import Divergence, Score, divergence, score
from prefixtune_cli.evaluate.likelihoods import likelihoods, per_token, trained_tokens
from prefixtune_cli.evaluate.preferences import Likelihoods, Objective, Preferences, compared
from prefixtune_cli.evaluate.subjects import hash_of_base
from prefixtune_cli.parallel.devices import device
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.parallel.sharding import is_sharded
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.train.fit import Job
from prefixtune_cli.train.preference import Reference
from prefixtune_cli.train.prepare import content

Who = Literal["base", "start", "adapter"]


class Judge:
    """Scores the models of a run on its held-out rows. All processes call each method together.

    Args:
        job: the run.
        tokenizer: the run's.
        bases: remembers the base's score, if one process does several runs in turn.
    """

    def __init__(
        self, job: Job, tokenizer: PreTrainedTokenizerBase, bases: SharedBase | None
    ) -> None:
        self._job = job
        self._tokenizer = tokenizer
        self._bases = bases
        room = {"max_new_tokens": job.data.questions.room}
        self._section = job.recipe.evaluate.model_copy(update=room)

    def score(self, model: PeftModel | PreTrainedModel, who: Who) -> tuple[Score, list[str]]:
        """One model's score, and its answers to the short questions."""
        job = self._job

        def find() -> tuple[Score, list[str]]:
            with _as(model, who):
                return score(
                    model,
                    self._tokenizer,
                    job.data.answers,
                    job.data.questions.asked,
                    self._section,
                    end_id=job.data.end_id,
                    name=who,
                    processes=Processes() if is_sharded(model) else job.processes,
                    reporter=job.reporter,
                )

        if who != "base" or self._bases is None:
            return find()
        whole = job.recipe.adapter.method == "full"
        asked = (job.recipe.model, whole, self._section.model_dump_json(), job.data.held_out_sha256)
        found: tuple[Score, list[str]] = self._bases.once(asked, find)
        return found

    def reference(self, model: PeftModel | PreTrainedModel) -> Reference:
        """What the adapter's log-probabilities will be compared with: the start's, or the base's; before training."""
        recipe, data, start = self._job.recipe, self._job.data, self._job.start
        of = None
        if self._job.processes.leads:
            of = {
                "base": hash_of_base(recipe.model),
                "start": start.sha256 if start else None,
                "train": content(data.train),
                "held_out": content(data.held_out),
                "precision": f"{recipe.model.bits} bits on {device(recipe.model.device).type}",
            }
        who: Literal["base", "start"] = "base" if start is None else "start"
        reference = Reference(self._job.run_dir.reference, of, self._job.processes, who)
        reference.find_held_out(len(data.held_out), lambda: self._likelihoods(model, who))
        return reference

    def preferences(self, model: PeftModel | PreTrainedModel, reference: Reference) -> Preferences:
        """What the trained adapter prefers, against the reference."""
        held_out = self._job.data.held_out
        found = [reference.held_out, self._likelihoods(model, "adapter")]
        if reference.who == "start":
            found.insert(0, self._likelihoods(model, "base"))
        objective = Objective.of(self._job.recipe.train)
        if objective.name == "kto":
            base, *start, adapter = found
            desirable, tokens = (
                np.array(held_out["desirable"]),
                np.array(trained_tokens(held_out)[0]),
            )
            return labelled.compared(
                base, adapter, objective, desirable, tokens, start[0] if start else None
            )
        if objective.is_per_token:
            found = [per_token(nats, held_out) for nats in found]
        base, *start, adapter = found
        return compared(base, adapter, objective, start[0] if start else None)

    def divergence(self, model: PeftModel) -> Divergence:
        """How far the adapter has moved the model from its base, on the held-out answers that are to be given."""
        job = self._job
        return divergence(
            model, self._tokenizer, job.data.answers, self._section, job.processes, job.reporter
        )

    def _likelihoods(self, model: PeftModel | PreTrainedModel, who: Who) -> Likelihoods:
        with _as(model, who):
            return likelihoods(
                model,
                self._tokenizer,
                self._job.data.held_out,
                self._section,
                name=who,
                processes=self._job.processes,
                reporter=self._job.reporter,
            )


def _as(model: PeftModel | PreTrainedModel, who: Who) -> AbstractContextManager[None]:
    """Within the block, the model is its base, if that is meant."""
    return models.without_adapter(model) if who == "base" else nullcontext()

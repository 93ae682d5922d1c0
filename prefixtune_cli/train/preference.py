"""Training on preferences: TRL's DPOTrainer, for DPO, SimPO and ORPO, and its KTOTrainer, made safe.

`evaluate.preferences.Objective` and `evaluate.labelled` have the losses. The reference of DPO and KTO does not change,
so its log-probabilities are computed once, before the first step, and kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils.memory import should_reduce_batch_size
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from prefixtune_cli import model as models
from prefixtune_cli.data.row_encoder import MASKED
from prefixtune_cli.evaluate.preferences import CERTAIN, Likelihoods
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.schema import WITH_REFERENCE, Recipe
from prefixtune_cli.run_dir import RunDir, write_atomically
from prefixtune_cli.train.fused_head import fitted_to
from prefixtune_cli.train.order import ROW, row_lengths
from prefixtune_cli.train.sft import shared_arguments
from prefixtune_cli.train.trainer import SafeTrainer
from prefixtune_cli.train.trial import OutOfMemory

# TRL's means over the pairs of a step, to which a blank pair adds nothing.
REWARDS = ("rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
MEANS = (*REWARDS, "logps/chosen", "logps/rejected")


# Log-probabilities of a row's two answers, in nats: a chosen and a rejected one, or its own and another prompt's.
Pairs = Sequence[tuple[float, float]]


class Reference:
    """The reference's log-probabilities of the answers, computed once and kept in a file.

    All processes call each method together.

    Args:
        file: where they are kept.
        of: everything that they depend on, as JSON types; the leader's counts. What the file has for anything else is
            not used.
        processes: of the run; its leader reads and writes.
        who: the model.
    """

    def __init__(
        self, file: Path, of: Any, processes: Processes, who: Literal["base", "start"] = "base"
    ) -> None:
        self.who = who
        self._file = file
        self._of = of
        self._processes = processes
        kept: dict[str, dict[str, tuple[float, float]]] = {}
        if processes.leads:
            with suppress(OSError, ValueError, KeyError, TypeError):
                found = json.loads(file.read_text(encoding="utf-8"))
                kept = found["rows"] if found["of"] == of else {}
        self._kept = processes.told(kept)

    def of_rows(
        self, name: str, rows: Sequence[int], find: Callable[[Sequence[int]], Pairs]
    ) -> Pairs:
        """Those of these rows of the data set with this name; `find` gives what has not been asked for before."""
        known = self._kept.setdefault(name, {})
        if missing := [row for row in rows if str(row) not in known]:
            known.update(zip(map(str, missing), find(missing), strict=True))
            if self._processes.leads:
                write_atomically(self._file, json.dumps({"of": self._of, "rows": self._kept}))
        return [known[str(row)] for row in rows]

    def find_held_out(self, rows: int, find: Callable[[], Likelihoods]) -> None:
        """Have `held_out`, of so many rows, from `find` if need be."""
        self.of_rows("held_out", range(rows), lambda _: np.stack(find(), axis=1).tolist())

    @property
    def held_out(self) -> Likelihoods:
        """Those of the held-out rows."""
        return Likelihoods(*np.array([*self._kept["held_out"].values()]).T)


def _padded(
    pad_id: int, ids: Sequence[Sequence[int]], labels: Sequence[Sequence[int]]
) -> dict[str, torch.Tensor]:
    """Ids, attention and trained tokens, [rows, length] each, as TRL names them."""

    def padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
        # Two columns at least: of rows with one token, blank ones, TRL would take no column for all of them.
        widened = ([*row, *[value] * (2 - len(row))] for row in rows)
        return pad_sequence([torch.tensor(row) for row in widened], True, value)

    return {
        "input_ids": padded(ids, pad_id),
        "attention_mask": padded([[1] * len(row) for row in ids], 0),
        "completion_mask": padded([[int(x != MASKED) for x in row] for row in labels], 0),
    }


class PairCollator:
    """Pads pairs: the chosen answers of a batch, and behind them the rejected ones, as DPOTrainer takes them."""

    columns = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The tokens of 2·pairs rows, and the reference [pairs], where it is known."""

        def both(chosen: str, rejected: str) -> list[list[int]]:
            return [pair[chosen] for pair in pairs] + [pair[rejected] for pair in pairs]

        tokens = _padded(
            self.pad_id, both("input_ids", "other_ids"), both("labels", "other_labels")
        )
        return tokens | _known(pairs, self.columns)


class LabelledCollator:
    """Pads labelled answers, and those to other prompts beside them, as KTOTrainer takes them."""

    columns = ("ref_logps", "ref_KL_logps")

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        """The tokens of both, whether an answer is desirable [rows], and the reference [rows], where it is known."""
        own, others = (
            _padded(self.pad_id, [row[ids] for row in rows], [row[labels] for row in rows])
            for ids, labels in (("input_ids", "labels"), ("other_ids", "other_labels"))
        )
        others = {f"KL_{name}": values for name, values in others.items()}
        label = torch.tensor([row["desirable"] for row in rows])
        return own | others | {"label": label} | _known(rows, self.columns)


def _known(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in columns if name in rows[0]}


class SafePreferenceTrainer(SafeTrainer):
    """What TRL's trainers of preferences have in common, made safe.

    Args:
        reference: has the log-probabilities of the rows of `train_dataset` and `eval_dataset`, by these names. What is
            missing is computed before the first step, when the adapter still is the start, for the rows that the steps
            take.
        reporter: hears how far that is.
        **arguments: those of `SafeTrainer`.
    """

    collator: ClassVar[type[PairCollator] | type[LabelledCollator]]

    def __init__(self, *, reference: Reference, reporter: Reporter, **arguments: Any) -> None:
        self._reference = reference
        self._reporter = reporter
        pad_id = arguments["processing_class"].pad_token_id
        super().__init__(data_collator=self.collator(pad_id or 0), **arguments)
        # TRL copies the adapter, which it takes for one that is trained already, to be the reference.
        self.model.delete_adapter("ref")
        if reference.who == "start":  # else TRL switches the adapter off
            self.ref_model = self.model
        self.precompute_ref_logps = True

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        """The rows as they are: they are tokens."""
        return dataset

    def train(self, *args: Any, **kwargs: Any) -> Any:
        for name in ("train_dataset", "eval_dataset"):
            if (rows := getattr(self, name)) is not None:
                setattr(self, name, self._with_reference(rows, name))
        return super().train(*args, **kwargs)

    def _real_rows(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Which rows, or pairs, of a batch are not blank, bool [rows]."""
        mask = inputs["completion_mask"]
        if self.collator is PairCollator:
            mask = mask[: len(mask) // 2]
        real: torch.Tensor = mask.any(dim=1)
        return real

    def _share(self, real: torch.Tensor) -> torch.Tensor:
        """What the sum over this process's real rows is multiplied by.

        The processes' mean is then the mean over the real rows of all of them.
        """
        share: torch.Tensor = self.processes.size / self.accelerator.gather(real.sum()).sum()
        return share

    def _with_reference(self, rows: Dataset, name: str) -> Dataset:
        taken: Sequence[int] = range(len(rows))
        # A step that took a row without a reference would have no finite loss, and the run would end.
        known = np.full((len(rows), 2), math.nan)
        if name == "train_dataset":
            steps, epochs = self.args.max_steps, self.args.num_train_epochs
            taken = self._order.taken(steps=steps, epochs=epochs)
            known[self.real_rows :] = 0.0  # blank
        known[taken] = self._reference_of(rows, name, taken)
        for column, values in zip(self.collator.columns, known.T, strict=True):
            rows = rows.add_column(column, values)
        return rows

    def _reference_of(self, rows: Dataset, name: str, taken: Sequence[int]) -> Pairs:
        """The reference's log-probabilities of the rows `taken` from the data set with this name."""
        return self._reference.of_rows(name, taken, lambda missing: self._of_rows(rows, missing))

    def _of_rows(self, rows: Dataset, taken: Sequence[int]) -> Pairs:
        """The model's log-probabilities of the rows `taken`, as a step computes them."""
        lengths, size = row_lengths(rows), self.args.train_batch_size
        # Little padding, and the longest ones first: where memory does not suffice, it shows at once.
        order = sorted(taken, key=lengths.__getitem__, reverse=True)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        processes, found = self.processes, dict[int, tuple[float, float]]()
        task = f"log-probabilities of the {self._reference.who}"
        with models.evaluating(self.model), fitted_to(self.args.device):
            for i in range(0, len(batches), processes.size):
                self._reporter.progress(task, i, len(batches), {})
                self.stop_if_asked()
                mine = i + processes.rank
                both = self._of_a_batch(rows, batches[mine]) if mine < len(batches) else []
                if processes.agree(int(both is None))[0]:
                    raise OutOfMemory
                if both:
                    found.update(zip(batches[mine], both, strict=True))
        self._reporter.progress(task, len(batches), len(batches), {})
        found = processes.joined(found)
        return [found[row] for row in taken]

    def _of_a_batch(self, rows: Dataset, batch: Sequence[int]) -> list[tuple[float, float]] | None:
        """The log-probabilities of these rows; None if the memory does not suffice."""
        inputs = self.data_collator([rows[row] for row in batch])
        inputs = {k: value.to(self.args.device) for k, value in inputs.items() if k != ROW}
        try:
            both = self.compute_ref_log_probs(self.model, inputs)
        except RuntimeError as error:  # torch.OutOfMemoryError is a subclass
            if not should_reduce_batch_size(error):
                raise
            return None
        one, other = (values.tolist() for values in both)
        return list(zip(one, other, strict=True))

    @contextmanager
    def _log_probabilities(self, model: Any) -> Iterator[list[torch.Tensor]]:
        """Within the block, collect those of the tokens of each pass, [rows, length − 1]."""
        passed: list[torch.Tensor] = []
        hook = model.register_forward_hook(lambda _m, _i, out: passed.append(out.log_probs))
        try:
            yield passed
        finally:
            hook.remove()


class SafeDPOTrainer(SafePreferenceTrainer, DPOTrainer):
    """DPOTrainer, made safe."""

    collator = PairCollator

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not self._order.blanks or not self.model.training:
            return loss
        real = self._real_rows(inputs)
        pairs, share = len(real), self._share(real)
        for name in MEANS:
            self._metrics["train"][name][-1] *= pairs * share.item()
        return (pairs * loss - math.log(2) * (pairs - real.sum())) * share


class SafeReferenceFreeTrainer(SafeDPOTrainer):
    """DPOTrainer for an objective without a reference, made safe.

    TRL is given one that needs no model, with log π₀(y⁺|x) = |y⁺|·`ahead` and log π₀(y⁻|x) = 0. Only the judge asks the
    real one, for the held-out pairs.

    Args:
        ahead: in nats per token.
        **arguments: those of `SafeDPOTrainer`.
    """

    def __init__(self, *, ahead: float = 0.0, **arguments: Any) -> None:
        self._ahead = ahead
        super().__init__(**arguments)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        for name in REWARDS:  # TRL's are those of DPO
            self._metrics["train" if self.model.training else "eval"].pop(name)
        return loss

    def _reference_of(self, rows: Dataset, name: str, taken: Sequence[int]) -> Pairs:
        return [
            (self._ahead * sum(label != MASKED for label in labels), 0.0)
            for labels in rows.select_columns("labels").select(taken)["labels"]
        ]


class SafeSimPOTrainer(SafeReferenceFreeTrainer):
    """DPOTrainer with the loss of SimPO, made safe.

    TRL's loss `sigmoid_norm` divides what an answer is ahead of the reference by the answer's length. It is SimPO's if
    the chosen answers of the reference are ahead by γ/β.

    Args:
        gamma: γ.
        **arguments: those of `SafeDPOTrainer`.
    """

    def __init__(self, *, gamma: float, **arguments: Any) -> None:
        super().__init__(ahead=gamma / arguments["args"].beta, **arguments)


class SafeORPOTrainer(SafeReferenceFreeTrainer):
    """DPOTrainer with the loss of ORPO, made safe.

    Its loss is computed here, from the log-probabilities of TRL's pass, whose own loss nothing uses. TRL's ORPOTrainer
    is experimental, makes tokens of the rows once more, and builds the logits of whole rows.

    Args:
        **arguments: those of `SafeDPOTrainer`.
    """

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._log_probabilities(model) as passed:
            super().compute_loss(model, inputs, *args, **kwargs)
        trained = inputs["completion_mask"][:, 1:]
        lengths = trained.sum(dim=1)
        real = self._real_rows(inputs)
        means = passed[0][:, -trained.shape[1] :].sum(dim=1) / lengths.clamp(min=1)
        chosen, rejected = means.chunk(2)
        margins = _log_odds(chosen) - _log_odds(rejected)
        losses = -chosen - self.beta * F.logsigmoid(margins)
        if not self._order.blanks or not self.model.training:
            return losses.mean()
        return (losses * real).sum() * self._share(real)


class SafeKTOTrainer(SafePreferenceTrainer, KTOTrainer):
    """KTOTrainer, made safe.

    Its loss is computed here, from the log-probabilities of TRL's passes: over several processes, blank rows would
    count in TRL's.
    """

    collator = LabelledCollator

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        with self._log_probabilities(model) as passed:
            super().compute_loss(model, inputs, *args, **kwargs)
        others, own = (
            log_p[:, 1 - inputs[ids].shape[1] :].sum(dim=1) - inputs[reference]
            for log_p, ids, reference in zip(
                passed, ("KL_input_ids", "input_ids"), reversed(self.collator.columns), strict=True
            )
        )
        real, desirable = self._real_rows(inputs), inputs["label"]
        share = self._share(real)
        ahead = (others * real).sum() * share / self.processes.size
        ahead = self.accelerator.gather(ahead).sum().clamp(min=0)
        sign = torch.where(desirable, 1.0, -1.0)
        weight = torch.where(desirable, self.desirable_weight, self.undesirable_weight)
        losses = weight * torch.sigmoid(self.beta * sign * (ahead - own))
        self._tell(ahead, self.beta * own.detach(), desirable, real)
        return (losses * real).sum() * share

    def _tell(
        self,
        ahead: torch.Tensor,
        rewards: torch.Tensor,
        desirable: torch.Tensor,
        real: torch.Tensor,
    ) -> None:
        """Put our figures in the place of TRL's, which count blank rows."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in [name for name in metrics if name.startswith(("rewards/", "kl"))]:
            del metrics[name]
        metrics["labelled/kl"].append(ahead.item())
        both = [real & desirable, real & ~desirable]
        sums = torch.stack([part for kind in both for part in ((rewards * kind).sum(), kind.sum())])
        sums = self.accelerator.gather(sums[None]).sum(dim=0)
        if sums[1] and sums[3]:
            margin = sums[0] / sums[1] - sums[2] / sums[3]
            metrics["labelled/margin"].append(margin.item())


def _log_odds(log_p: torch.Tensor) -> torch.Tensor:
    """log p/(1 − p), as in `evaluate.preferences`."""
    known = log_p.clamp(max=CERTAIN)
    return known - torch.log(-torch.expm1(known))


def trainer_of(recipe: Recipe, **arguments: Any) -> SafePreferenceTrainer:
    """The trainer of the recipe's objective."""
    if recipe.train.objective == "simpo":
        return SafeSimPOTrainer(gamma=recipe.train.gamma, **arguments)
    kinds: dict[str, type[SafePreferenceTrainer]] = {
        "dpo": SafeDPOTrainer,
        "orpo": SafeORPOTrainer,
        "kto": SafeKTOTrainer,
    }
    return kinds[recipe.train.objective](**arguments)


def training_arguments(recipe: Recipe, run_dir: RunDir) -> DPOConfig | KTOConfig:
    """The recipe in the terms of TRL; where there are several processes, their group is formed already."""
    section = recipe.train
    shared = dict(
        **shared_arguments(recipe, run_dir),
        beta=section.beta,
        disable_dropout=section.objective in WITH_REFERENCE,  # their reference has none
        router_aux_loss_coef=0.0,  # the routers of a mixture of experts are the base's, and frozen
        max_length=None,  # rows are cut already
        remove_unused_columns=False,  # the collators know the columns
    )
    if section.objective == "kto":
        return KTOConfig(
            **shared,
            desirable_weight=section.desirable_weight,
            undesirable_weight=section.undesirable_weight,
        )
    return DPOConfig(
        **shared, loss_type=["sigmoid" if section.objective == "dpo" else "sigmoid_norm"]
    )

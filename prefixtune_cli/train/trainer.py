"""A safe version of transformers' Trainer: checkpoints are whole or absent; a bad loss or a signal stops the run."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from prefixtune_cli.errors import TrainingError
from prefixtune_cli.model import drop_model_card
from prefixtune_cli.parallel.processes import Processes
from prefixtune_cli.parallel.sharding import adapter_at_hand, is_sharded, reshard
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.train.basis import Basis
from prefixtune_cli.train.checks import told_in_words
from prefixtune_cli.train.fused_head import fitted_to
from prefixtune_cli.train.order import ROW, Order, blank_rows, row_lengths
from prefixtune_cli.train.stop import StopRequest


class StopTraining(Exception):
    """A signal has arrived, and everything is saved."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class SafeTrainer(Trainer):
    """A Trainer that seals its checkpoints, and stops at a signal or at a loss that is not finite.

    Use it as the first base class, before a trainer of TRL's: `SafeSFTTrainer(SafeTrainer, SFTTrainer)`.

    With several processes, each sees its own rows of a batch; together they see the rows that one process would see.
    Blank rows, which have no loss, fill the last batch of an epoch. Only the leader writes.

    Args:
        run_dir: the run directory, for the checkpoints.
        origin: gives the file and line of a row, for the error.
        processes: of the run.
        stop: what the signals ask for.
        save_minutes: minutes between two checkpoints, besides those by steps; None saves none by time.
        group_by_length: whether the rows of a step have about the same length.
        **arguments: those of the trainer.
    """

    def __init__(
        self,
        *,
        run_dir: RunDir,
        origin: Callable[[int], str],
        processes: Processes,
        stop: StopRequest,
        save_minutes: float | None,
        group_by_length: bool,
        **arguments: Any,
    ) -> None:
        self.processes = processes
        self._run_dir = run_dir
        self._origin = origin
        self._stop = stop
        self._save_seconds = None if save_minutes is None else 60 * save_minutes
        self._saved_at = time.monotonic()
        self._begun: int | None = None  # the step that is being computed
        self._random: Any = None  # the random states at its beginning
        self._saving = False
        # The step of the last checkpoint. We do not read it from the folder: other nodes may see the folder later.
        self._saved_step: int | None = None
        # Without a launcher, transformers would spread a batch over all GPUs by DataParallel.
        arguments["args"]._n_gpu = min(arguments["args"].n_gpu, 1)
        saving = arguments["args"].save_strategy
        if is_sharded(arguments["model"]):
            # transformers refuses to save a sharded model, as it would save one shard of the optimizer's state. But
            # we train only the adapter, which is whole.
            arguments["args"].save_strategy = SaveStrategy.NO
        super().__init__(**arguments)
        self.args.save_strategy = saving
        collate: Any = self.data_collator  # type: ignore[has-type]

        def collate_and_remember(examples: list[dict[str, Any]]) -> dict[str, Any]:
            batch: dict[str, Any] = collate(examples)
            if ROW in examples[0]:
                batch[ROW] = torch.tensor([example[ROW] for example in examples])
            return batch

        self.data_collator = collate_and_remember
        rows: Any = self.train_dataset  # type: ignore[has-type]
        self.real_rows = len(rows)  # without the blank ones
        self.losses: dict[
            int, float
        ] = {}  # number of finished steps → this process's loss of the next one
        self._order = Order(
            len(rows),
            self.args.seed,
            row_lengths(rows) if group_by_length else None,
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.processes.size,
        )
        if processes.size > 1:
            self._order.blanks = -len(rows) % (self.args.train_batch_size * processes.size)
            pad_id = self.processing_class.pad_token_id
            self.train_dataset = blank_rows(rows, self._order.blanks, pad_id)
        self.add_callback(_Beginnings(self))

    def _get_train_sampler(self, train_dataset: Any = None) -> Order:
        return self._order

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def training_step(
        self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        self._save_or_stop(model)
        rows = inputs.pop(ROW, None)
        loss = self.plain_training_step(model, inputs, *args, **kwargs)
        step = self.state.global_step
        self.losses[step] = self.losses.get(step, 0.0) + loss.item()
        if not torch.isfinite(loss):
            origins = "packed, so that its rows are not known"
            if rows is not None:
                origins = "; ".join(self._origin(row) for row in rows.tolist() if row >= 0)
            raise TrainingError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1}. "
                f"The batch was {origins}. Try a lower "
                f"--learning-rate (it is {self.args.learning_rate:g}), --set train.max_grad_norm=0.5, or --bits 32; "
                "look at those rows with `ptp inspect-data`."
            )
        return loss

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """The trainer's; on a CPU, of the trained tokens alone."""
        with fitted_to(self.args.device):
            return super().compute_loss(*args, **kwargs)

    def without_reducing(self, model: Any) -> Any:
        """A context in which backward passes leave the gradients of other processes alone."""
        if self.is_distributed_loading_by_transformers:
            self.accelerator.gradient_state._set_sync_gradients(False)
            return nullcontext()
        return self.accelerator.no_sync(model)

    def plain_training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward and backward pass of one batch."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        return loss

    def stop_if_asked(self) -> None:
        """Raise StopTraining if any process has received a signal; for use before the first step, on all processes."""
        if number := self.processes.agree(self._stop.number)[0]:
            raise StopTraining(number)

    def _save_or_stop(self, model: Any) -> None:
        """Save or stop if asked to, before a forward pass, on all processes; what an unfinished step did is dropped."""
        step, starting = self.state.global_step, self._begun != self.state.global_step
        elapsed = time.monotonic() - self._saved_at
        due = starting and self._save_seconds is not None and elapsed >= self._save_seconds
        stop, save = self.processes.agree(self._stop.number, int(due))
        if starting:
            self._begun, self._random = step, _random_states()
        if stop or save:
            _set_random_states(self._random)
            if step and step != self._saved_step:
                self._save_checkpoint(model, trial=None)
                self.callback_handler.on_save(self.args, self.state, self.control)
            self._saved_at = time.monotonic()
        if stop:
            raise StopTraining(stop)

    def prediction_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._save_or_stop(model)
        inputs.pop(ROW, None)
        return super().prediction_step(model, inputs, *args, **kwargs)

    def finished_at(self, checkpoint: Path) -> int | None:
        """If `checkpoint` is that of the last step, load its weights and return the step; otherwise None.

        If the last step is not the end of an epoch, transformers would train one more.
        """
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        if state["global_step"] < state["max_steps"]:
            return None
        self._load_from_checkpoint(str(checkpoint))
        return int(state["global_step"])

    def _bases(self) -> list[Basis]:
        """The callback that adds to each checkpoint, if the adapter is trained in a basis."""
        return [found for found in self.callback_handler.callbacks if isinstance(found, Basis)]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card: the run directory describes itself."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        reshard(self.model)
        if (
            self.processes.leads or self.is_deepspeed_enabled
        ):  # DeepSpeed gathers from all processes
            super().save_model(output_dir, _internal_call)
        if self.is_deepspeed_enabled and output_dir and isinstance(self.model, PeftModel):
            # DeepSpeed gathers the parameters only, and these hold no M while there is a basis.
            with adapter_at_hand(self.model):
                if self.processes.leads:
                    self.model.save_pretrained(output_dir)
        if self.processes.leads and output_dir:
            drop_model_card(output_dir)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._run_dir.checkpoint_part if self._saving else self._run_dir.path)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        part, leads = self._run_dir.checkpoint_part, self.processes.leads
        if leads:
            shutil.rmtree(part, ignore_errors=True)
        self.processes.wait()
        self._saving = True
        try:
            # In here, because a full disk shows only while the half-written checkpoint is still on it.
            with told_in_words(self._run_dir, self._stop):
                super()._save_checkpoint(model, trial)
                self.processes.wait()
                if leads:
                    for folder in part.iterdir():
                        for basis in self._bases():
                            basis.save(folder)
                        self._run_dir.seal(folder, self.state.global_step)
                    self._run_dir.drop_old_checkpoints(self.args.save_total_limit)
        finally:
            self._saving = False
            if leads:
                shutil.rmtree(part, ignore_errors=True)
        self.processes.wait()
        self._saved_at, self._saved_step = time.monotonic(), self.state.global_step

    def _save_rng_state(self, output_dir: str) -> None:
        with TemporaryDirectory() as own:
            super()._save_rng_state(own)
            files = {file.name: file.read_bytes() for file in Path(own).iterdir()}
        for given in self.processes.gathered(files):
            for name, content in given.items() if self.processes.leads else ():
                (Path(output_dir) / name).write_bytes(content)


class _Beginnings(TrainerCallback):
    """Tells the trainer which step it starts from, and which epoch begins."""

    def __init__(self, trainer: SafeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._saved_step = state.global_step

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer._order.epoch = int(state.epoch or 0)


def _random_states() -> tuple[Any, ...]:
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    on_gpu = torch.cuda.get_rng_state() if used else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_gpu


def _set_random_states(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    if states[3] is not None:
        torch.cuda.set_rng_state(states[3])

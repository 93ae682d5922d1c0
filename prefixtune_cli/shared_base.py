"""One base for many runs and evaluations of a process: loaded once, and restored after each."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import PreTrainedModel

from prefixtune_cli.model import load_base
from prefixtune_cli.recipe.schema import ModelSection


class SharedBase:
    """Keeps the last base, and results that are computed once."""

    def __init__(self) -> None:
        self._section: ModelSection | None = None
        self._base: PreTrainedModel | None = None
        self._found: dict[Any, Any] = {}

    @contextlib.contextmanager
    def lent(self, section: ModelSection) -> Iterator[PreTrainedModel]:
        """Lend the base to the caller within the block, to attach and train adapters. Its weights must not change.

        After an error the base is no longer trusted, and is loaded again the next time.

        Raises:
            ModelError, ResourceError: see `model.load_base`.
        """
        if section != self._section or self._base is None:
            self.release()
            self._base, self._section = load_base(section), section
        base = self._base
        try:
            yield base
        except BaseException:
            self.release()
            raise
        if not _restored(base):
            self.release()

    def release(self) -> None:
        """Forget the base, to free its memory for another one."""
        self._base = self._section = None
        gc.collect()  # a trainer that used it has reference cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def once(self, key: Any, find: Callable[[], Any]) -> Any:
        """What `find` returned when this key was first asked for."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def _restored(base: PreTrainedModel) -> bool:
    """Undo what training leaves on a base besides the adapter. Returns False if an adapter is left."""
    if any(isinstance(module, BaseTunerLayer) for module in base.modules()):
        return False
    vars(base).pop("forward", None)  # TRL's, with a fused head
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    base.requires_grad_(False).eval()
    return True

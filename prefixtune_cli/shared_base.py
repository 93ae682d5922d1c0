"""One base for many runs and evaluations of a process: loaded once, and given back as it was after each."""

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
    """Keeps the base that was lent last, and what was once found out about it."""

    def __init__(self) -> None:
        self._section: ModelSection | None = None
        self._base: PreTrainedModel | None = None
        self._found: dict[Any, Any] = {}

    @contextlib.contextmanager
    def lent(self, section: ModelSection) -> Iterator[PreTrainedModel]:
        """Within the block the base is the caller's, to adapt and to train adapters on; its weights stay as they are.

        After an error it is not trusted any more, and loaded anew the next time.

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
        """Forget the base, so that its memory is free for another one."""
        self._base = self._section = None
        gc.collect()  # a trainer that has used it has cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def once(self, key: Any, find: Callable[[], Any]) -> Any:
        """What `find` gave when it was first called with this key."""
        if key not in self._found:
            self._found[key] = find()
        return self._found[key]


def _restored(base: PreTrainedModel) -> bool:
    """Undo what training leaves on a base beside the adapter; whether it is as it was."""
    for module in base.modules():
        if isinstance(module, BaseTunerLayer):
            return False
    vars(base).pop("forward", None)  # TRL's, with a fused head
    if base.is_activation_checkpointing:
        base.activation_checkpointing_disable()
    base.disable_input_require_grads()
    base.requires_grad_(False).eval()
    return True

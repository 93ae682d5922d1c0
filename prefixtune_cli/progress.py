"""How long work reports its progress, without knowing how the progress is shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Reporter(Protocol):
    """Takes messages and progress. `cli/` shows them on stderr; a test or another program may collect them."""

    def notice(self, text: str) -> None:
        """Say something worth knowing."""

    def warning(self, text: str) -> None:
        """Say something that the user may want to act on."""

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """`done` of `total` steps of `task` are finished; `figures` are the latest measurements by name."""


class Silent:
    """Says nothing."""

    def notice(self, text: str) -> None: ...

    def warning(self, text: str) -> None: ...

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None: ...

"""A reporter that remembers what it hears."""

from __future__ import annotations

from collections.abc import Mapping


class Heard:
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.tasks: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def warning(self, text: str) -> None:
        self.warnings.append(text)

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.tasks.append(task)

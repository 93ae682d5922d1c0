"""The settings of `ptp eval`, checked without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune_cli.data.locate import check_exists, check_sources, check_text
from prefixtune_cli.errors import UsageError
from prefixtune_cli.pointed import Pointed

QUICKSTART, FORGETTING = "quickstart", "forgetting"
OWN_BENCHMARKS = (QUICKSTART, FORGETTING)


@dataclass(frozen=True)
class Settings:
    """What the user typed.

    Attributes:
        who: runs and adapters of one base, or a base by itself.
        data_settings: settings of the recipe's data section, for `data`.
        judging: settings of the recipe's evaluate section, for `data`.
        base: whether the base takes part.
        benches: names of benchmarks.
        data: the user's own test data.
        text: the text to measure forgetting on.
        window: tokens of a window of `text`; None takes what the base allows, up to 1024.
        bench_data: local copies of benchmarks' data, by benchmark or hub id.
        limit: the most items of each task.
        num_fewshot: examples before a question; None keeps the task's own number.
        batch_size: sequences a forward pass; None fits them to the memory.
        apply_chat_template: whether to render prompts with the model's chat template.
        runs_code: whether the user agrees to run code that the model writes.
        cache: the folder for finished requests; None keeps none.
        out: the folder for results; None means the run directories, or runs/<model>-eval.
    """

    who: tuple[Pointed, ...]
    data_settings: Mapping[str, Any] = field(default_factory=dict)
    judging: Mapping[str, Any] = field(default_factory=dict)
    base: bool = True
    benches: tuple[str, ...] = ()
    data: tuple[str, ...] = ()
    text: str | None = None
    window: int | None = None
    bench_data: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: int | None = None
    apply_chat_template: bool = False
    runs_code: bool = False
    cache: Path | None = None
    out: Path | None = None

    def to_json(self) -> dict[str, Any]:
        told = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in self.__dict__.items()
        }
        return {**told, "who": [one.given for one in self.who]}

    def check(self) -> None:
        """Refuse settings that contradict each other, and data that does not exist.

        Raises:
            UsageError: there is nothing to evaluate, a number is out of range, or two results would have one name.
            DataError: a file is missing.
        """
        if not self.benches and not self.data:
            raise UsageError(
                "There is nothing to evaluate. Type --bench NAME (such as quickstart or mmlu; `ptp eval --list` shows "
                "all), or --data FILE."
            )
        if (FORGETTING in self.benches) != (self.text is not None):
            raise UsageError(
                "--bench forgetting and --text FILE belong together: the file holds text that has nothing to do with "
                "the task, such as a chapter of a book."
            )
        if self.judging and not self.data:
            raise UsageError(
                "--answer-pattern belongs to --data FILE: benchmarks have prompts, answers and metrics of their own."
            )
        check_limit(self.limit)
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UsageError(f"--num-fewshot must be 0 or more, got {self.num_fewshot}.")
        names = [f"data-{stem(source)}" for source in self.data]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise UsageError(
                f"Two data sets would both be written to {twice[0]}.json. Evaluate them one at a time, with another "
                "--out."
            )
        check_sources(*self.data)
        if template := self.data_settings.get("chat_template"):
            check_exists("The chat template", template)
        for name, path in self.bench_data.items():
            check_exists(f"The data of {name},", path)
        if self.text is not None:
            check_text(self.text)


def check_limit(limit: int | None) -> None:
    """Raise UsageError for a limit below 1."""
    if limit is not None and limit < 1:
        raise UsageError(
            f"--limit must be at least 1, got {limit}. Leave it out to evaluate everything."
        )


def stem(source: str) -> str:
    """The name of a data set in the name of its result's file."""
    return Path(source.replace("sample:", "").replace(":", "-")).stem

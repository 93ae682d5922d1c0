"""Loads lm-eval's tasks: reads their data from the hub or from local copies, and builds their requests once.

A task stays lm-eval's own, except for the source of its rows. lm-eval calls `datasets.load_dataset` with the hub's id.
While tasks load, we replace that function by one that reads the user's copies.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune_cli.data.benchmark import Wanted, load_benchmark
from prefixtune_cli.data.locate import ask_hub
from prefixtune_cli.errors import DataError, PtpError, ResourceError, UsageError
from prefixtune_cli.evaluate.catalogue import Catalogue, Listed

FILE_TYPES = {"json", "csv", "parquet", "text", "arrow"}  # some tasks have these as their data set
FEW_SHOT_SEED = 1234  # lm-eval's own, so that we draw the same examples


@dataclass(frozen=True)
class Rendering:
    """How requests are built.

    Attributes:
        limit: the most items of each task; None takes all.
        num_fewshot: examples before each question; None keeps the task's own number.
        chat_template: renders messages by the model's chat template; None uses plain prompts.
        runs_code: whether the user agrees to run code that the model writes.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    chat_template: Callable[..., str] | None = None
    runs_code: bool = False


@dataclass(frozen=True)
class Benchmark:
    """The tasks of one name, with their requests, and the groups that they form."""

    name: str
    tasks: dict[str, Any]
    groups: dict[str, Any]
    notices: tuple[str, ...]

    @property
    def requests(self) -> int:
        return sum(len(task.instances) for task in self.tasks.values())

    @property
    def versions(self) -> dict[str, Any]:
        """The version of each task, and the settings of its requests; they are a part of the cache's key."""
        return {
            name: [task.VERSION, task.get_config("num_fewshot")]
            for name, task in self.tasks.items()
        }


def load_benchmark_tasks(
    name: str, catalogue: Catalogue, data: Mapping[str, Path], rendering: Rendering
) -> Benchmark:
    """Load a task, group or tag, check it and build its requests.

    Args:
        name: what `--bench` takes.
        catalogue: lm-eval's names.
        data: hub id of a data set → its local copy; see `local_data`.
        rendering: how requests are built.

    Raises:
        DataError, ResourceError: the data is missing or malformed.
        UsageError: the settings do not fit the task.
    """
    from lm_eval.tasks import TaskManager

    listed = catalogue.tasks(name)
    if (unsafe := [task.name for task in listed if task.runs_code]) and not rendering.runs_code:
        raise UsageError(
            f"{unsafe[0]} runs code that the model writes on this machine. To allow that, type "
            "--confirm-run-unsafe-code."
        )
    for dataset in dict.fromkeys(task.dataset for task in listed):
        if dataset is not None and "/" in dataset and dataset not in data:
            ask_hub(dataset, _instead(name))
    manager = TaskManager(include_defaults=False, include_path=list(catalogue.folders(name)))
    with _rows_from(data, listed, name):
        try:
            loaded = manager.load([name])
            tasks = loaded["tasks"]
            notices = [notice for task in tasks.values() for notice in _shots(task, rendering)]
            for task in tasks.values():
                _build(task, rendering)
        except PtpError:
            raise
        except (ImportError, OSError) as error:
            raise ResourceError(f"{name} needs something that is not here: {error}") from error
        except Exception as error:  # a task's own code may raise anything on unexpected rows
            raise DataError(
                f"{name} cannot be loaded ({type(error).__name__}: {error}). Does the data have the columns and "
                "splits that the task reads?"
            ) from error
    return Benchmark(name, tasks, dict(loaded.get("groups", {})), tuple(dict.fromkeys(notices)))


def local_data(given: Mapping[str, str], catalogue: Catalogue) -> dict[str, Path]:
    """`--bench-data NAME=PATH` as hub id → path; NAME is a benchmark, or the id itself.

    Raises:
        UsageError: the name is unknown, or is a group with several data sets.
    """
    found: dict[str, Path] = {}
    ids = {entry.dataset for entry in catalogue.entries.values()}
    for name, path in given.items():
        if name not in catalogue.entries and name in ids:
            found[name] = Path(path).expanduser()
            continue
        catalogue.check([name], ())
        datasets = sorted({task.dataset for task in catalogue.tasks(name) if task.dataset})
        if not datasets or set(datasets) & FILE_TYPES:
            raise UsageError(
                f"--bench-data {name}={path}: {name} contains its data or downloads files from a URL, so a copy cannot "
                "replace it."
            )
        if len(datasets) != 1:
            raise UsageError(
                f"--bench-data {name}={path}: {name} reads {len(datasets)} data sets. Give each by its own name: "
                + ", ".join(f"--bench-data {dataset}=…" for dataset in datasets)
            )
        found[datasets[0]] = Path(path).expanduser()
    return found


def _instead(name: str) -> str:
    return (
        f"With a copy of the data, type: --bench-data {name}=PATH (a clone of the data set's repository, or its CSV, "
        "JSONL or parquet files)."
    )


@contextlib.contextmanager
def _rows_from(data: Mapping[str, Path], listed: list[Listed], bench: str) -> Iterator[None]:
    """Within the block, `datasets.load_dataset` reads the ids of `data` from the copies, and raises our errors."""
    import datasets

    original = datasets.load_dataset
    seen: dict[tuple[str, str, str], str | None] = {}

    def load(path: str, name: str | None = None, *arguments: Any, **settings: Any) -> Any:
        if path in data:
            its = [
                task for task in listed if task.dataset == path and task.subset == (name or None)
            ]
            rows = load_benchmark(
                data[path],
                Wanted(
                    bench=bench,
                    dataset=path,
                    subset=name,
                    splits=tuple(dict.fromkeys(split for task in its for split in task.splits)),
                    columns=its[0].columns if len(its) == 1 else (),
                ),
            )
            for split, found in rows.items():
                other = seen.setdefault((path, split, repr(found[0])), name)
                if other != name:
                    raise DataError(
                        f"{data[path]} has the same {split} rows for {name} as for {other}, so they cannot be told "
                        f"apart. Give a folder with a file for each, such as {name}/{split}.jsonl."
                    )
            return rows[settings["split"]] if settings.get("split") else rows
        try:
            return original(path, name, *arguments, **settings)
        except (OSError, datasets.exceptions.DatasetsError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise ResourceError(
                f"{bench} reads the data set {path}{f' ({name})' if name else ''}, which cannot be loaded: {said}. "
                + _instead(bench)
            ) from error

    datasets.load_dataset = load
    try:
        yield
    finally:
        datasets.load_dataset = original


def _shots(task: Any, rendering: Rendering) -> Iterator[str]:
    """Set the number of examples and yield notices. A task's own 0 stays, as in lm-eval; refuse more than there are."""
    own, wanted = task.get_config("num_fewshot"), rendering.num_fewshot
    if wanted is not None and own == 0 and wanted != 0:
        yield f"{task.task_name} never shows examples; --num-fewshot {wanted} does not change that."
    elif wanted is not None:
        task.set_config("num_fewshot", wanted)
    elif own is None:
        task.set_config("num_fewshot", 0)
    task.set_fewshot_seed(FEW_SHOT_SEED)
    shots = task.get_config("num_fewshot")
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    split = getattr(getattr(task, "fewshot_cfg", None), "split", None)
    # lm-eval draws one more example if the split is that of the questions, or if both are None.
    available = len(sampler.df) - (split == task.config.test_split)
    if shots > available:
        raise UsageError(
            f"--num-fewshot {shots} is more than the {available} examples that {task.task_name} has"
            f"{f' in its split {split}' if split else ''}. Type --num-fewshot {available} or less."
        )


def _build(task: Any, rendering: Rendering) -> None:
    """Build the requests now; when lm-eval builds them again, it gets the same ones, without answers."""
    chat = rendering.chat_template
    with contextlib.redirect_stderr(io.StringIO()):  # a bar for each task
        task.build_all_requests(
            limit=rendering.limit,
            rank=0,
            world_size=1,
            apply_chat_template=chat is not None,
            fewshot_as_multiturn=chat is not None,
            chat_template=chat,
        )

    def again(**_: Any) -> None:
        for instance in task.instances:
            instance.resps, instance.filtered_resps = [], {}

    task.build_all_requests = again

"""lm-eval's tasks, groups and tags by name, without loading any of them.

lm-eval reads some fourteen thousand YAML files to list its tasks, which takes seconds. They change only with its
version. So one JSON file keeps what we need of them, and a benchmark is loaded from its own folders only.
"""

from __future__ import annotations

import contextlib
import difflib
import fnmatch
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from prefixtune_cli.errors import UsageError
from prefixtune_cli.run_dir import write_atomically

VERSION = 1  # raise it when Listed changes


@dataclass(frozen=True)
class Listed:
    """A task, or a group or tag of them.

    Attributes:
        name: what `--bench` takes.
        kind: `task`, `group` or `tag`.
        folder: the folder of its YAML file, below lm-eval's tasks; empty for a tag.
        members: the names in a group or tag.
        output_type: `multiple_choice`, `generate_until`, `loglikelihood` or `loglikelihood_rolling`.
        dataset: the hub id of its data set.
        subset: the data set's configuration.
        splits: the splits that it reads: the one to evaluate, and the one with the examples.
        columns: the columns that its templates name; it may need more.
        runs_code: whether it runs code that the model wrote.
    """

    name: str
    kind: str
    folder: str = ""
    members: tuple[str, ...] = ()
    output_type: str = ""
    dataset: str | None = None
    subset: str | None = None
    splits: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    runs_code: bool = False


class Catalogue:
    """All of lm-eval's names."""

    def __init__(self, entries: Mapping[str, Listed]) -> None:
        self.entries = entries

    def find(self, pattern: str = "*") -> list[Listed]:
        """Entries whose name matches a glob, or contains the text; upper and lower case are alike.

        The nearest come first: the name itself, names that begin with it, names with it as a word, then the others.
        """
        glob = (pattern if set("*?[") & set(pattern) else f"*{pattern}*").lower()
        text = pattern.lower().strip("*")

        def distance(name: str) -> tuple[int, str]:
            words = f"_{re.sub(r'[^a-z0-9]+', '_', name.lower())}_"
            nearness = name.lower() == text, name.lower().startswith(text), f"_{text}_" in words
            return next((i for i, near in enumerate(nearness) if near), len(nearness)), name

        found = [name for name in self.entries if fnmatch.fnmatchcase(name.lower(), glob)]
        return [self.entries[name] for name in sorted(found, key=distance)]

    def outermost(self, found: Sequence[Listed], typed: str) -> list[Listed]:
        """Those of `found` that belong to no group or tag in `found`, and the one named exactly `typed`."""
        held = {
            inner.name
            for outer in found
            for inner in self._below(outer.name, set())
            if inner.name != outer.name
        }
        return [one for one in found if one.name not in held or one.name == typed]

    def check(self, names: Iterable[str], own: Iterable[str]) -> None:
        """Refuse names that are neither lm-eval's nor in `own`.

        Raises:
            UsageError: a name is unknown; the message has the nearest names.
        """
        known = {known.lower(): known for known in (*own, *self.entries)}
        for name in names:
            if name in known.values():
                continue
            near = difflib.get_close_matches(name.lower(), known, n=5, cutoff=0.6)
            near = [known[lower] for lower in near] or [
                listed.name for listed in self.find(name)[:5]
            ]
            hint = f" Did you mean {', '.join(near)}?" if near else ""
            raise UsageError(
                f"There is no benchmark {name!r}.{hint} `ptp eval --list` shows all, and `ptp eval --list TEXT` those "
                "with TEXT in their name."
            )

    def tasks(self, name: str) -> list[Listed]:
        """The tasks of an entry, or the entry itself if it is a task."""
        return [listed for listed in self._below(name, set()) if listed.kind == "task"]

    def folders(self, name: str) -> list[Path]:
        """The folders of an entry. None lies inside another, and each tag lies in one of them.

        lm-eval reads folder after folder, and a later tag replaces an earlier one of the same name.
        """
        below = list(self._below(name, set()))
        found = {listed.folder for listed in below if listed.folder}
        for tag in (listed for listed in below if listed.kind == "tag"):
            its = [self.entries[member].folder for member in tag.members]
            found.add(os.path.commonpath(its) if all(its) else "")
        paths = {_tasks_folder() / folder for folder in found}
        return sorted(path for path in paths if not paths & set(path.parents))

    def _below(self, name: str, seen: set[str]) -> Iterator[Listed]:
        if name in seen or name not in self.entries:  # groups may define members of their own
            return
        seen.add(name)
        listed = self.entries[name]
        yield listed
        for member in listed.members:
            yield from self._below(member, seen)


def load_catalogue() -> Catalogue:
    """lm-eval's names, from our file; the first time from lm-eval itself, which takes seconds."""
    root = _tasks_folder()
    version = distribution("lm_eval").version
    file = Path(HF_HOME) / "prefixtune" / f"lm-eval-{version}-tasks.json"
    key = [VERSION, str(root), root.stat().st_mtime_ns]
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        kept = json.loads(file.read_text(encoding="utf-8"))
        if kept["key"] == key:
            return Catalogue({entry["name"]: _from_json(entry) for entry in kept["entries"]})
    entries = _read(root)
    with contextlib.suppress(OSError):  # without the file, the next call only takes longer
        listed = [
            {name: value for name, value in asdict(entry).items() if value}
            for entry in entries.values()
        ]
        write_atomically(file, json.dumps({"key": key, "entries": listed}))
    return Catalogue(entries)


def _from_json(entry: dict[str, Any]) -> Listed:
    for name in ("members", "splits", "columns"):
        entry[name] = tuple(entry.get(name, ()))
    return Listed(**entry)


def _tasks_folder() -> Path:
    return Path(str(distribution("lm_eval").locate_file("lm_eval/tasks")))


def _read(root: Path) -> dict[str, Listed]:
    from lm_eval.tasks import TaskManager

    found = {}
    for name, entry in TaskManager().task_index.items():
        settings: dict[str, Any] = entry.cfg or {}
        if entry.kind.name == "TAG":
            found[name] = Listed(name, "tag", members=tuple(sorted(entry.tags)))
            continue
        folder = entry.yaml_path.parent.relative_to(root).as_posix() if entry.yaml_path else ""
        if entry.kind.name == "GROUP":
            members = tuple(dict.fromkeys(_members(settings.get("task"))))
            found[name] = Listed(name, "group", folder, members)
            continue
        found[name] = Listed(
            name,
            "task",
            folder,
            output_type=settings.get("output_type") or "",
            dataset=settings.get("dataset_path") or None,
            subset=settings.get("dataset_name") or None,
            splits=tuple(_splits(settings)),
            columns=tuple(_columns(settings)),
            runs_code=bool(settings.get("unsafe_code")),
        )
    return found


def _members(tasks: Any) -> Iterator[str]:
    """The names in a group's list of tasks, which may hold further lists."""
    for task in tasks if isinstance(tasks, list) else [tasks]:
        if isinstance(task, str):
            yield task
        elif isinstance(task, dict):
            if isinstance(task.get("group"), str):
                yield task["group"]
            yield from _members(task.get("task"))


def _splits(settings: Mapping[str, Any]) -> Iterator[str]:
    """The split to evaluate, and the split of the examples, by lm-eval's rules."""
    evaluated = settings.get("test_split") or settings.get("validation_split")
    examples = settings.get("fewshot_config")
    shown = settings.get("fewshot_split") or (
        examples.get("split") if isinstance(examples, dict) else None
    )
    shown = shown or settings.get("training_split") or settings.get("validation_split")
    yield from dict.fromkeys(split for split in (evaluated, shown) if split)


def _columns(settings: Mapping[str, Any]) -> Iterator[str]:
    """The columns that the templates name; none if code prepares the rows."""
    from jinja2 import Environment, TemplateError, meta

    if settings.get("process_docs"):
        return
    found: dict[str, None] = {}
    for part in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        template = settings.get(part)
        if not isinstance(template, str) or "/" in template:  # a function is given by its path
            continue
        if re.fullmatch(r"[A-Za-z_]\w*", template):
            found[template] = None
            continue
        with contextlib.suppress(TemplateError):
            names = meta.find_undeclared_variables(Environment().parse(template))
            found.update(dict.fromkeys(sorted(names)))
    yield from found

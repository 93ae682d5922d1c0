"""Keeps the losses and answers of finished requests on disk, so that an interrupted evaluation can go on.

Each subject has one SQLite file. A subject is everything that an answer depends on: the base, its precision, the
adapter's content, the task's version, and the settings. Another adapter is another subject, so it never reads an old
answer. The base's answers serve every adapter that is compared with it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.constants import HF_HOME

from prefixtune_cli.errors import ResourceError

VERSION = 1  # raise it when a change makes the same request give another answer
BYTES_A_REQUEST = 400
MARGIN_BYTES = 4 * 2**20


class AnswerCache:
    """The answers of one subject.

    Args:
        folder: the folder of the files; None keeps nothing.
        subject: everything that an answer depends on besides the request, in JSON's types.
    """

    def __init__(self, folder: Path | None, subject: Mapping[str, Any]) -> None:
        self.file = None if folder is None else folder / f"{digest([VERSION, subject])[:32]}.sqlite"
        self.subject = subject

    def complete(
        self, requests: Sequence[Any], answer: Callable[[list[int]], Iterable[Mapping[int, Any]]]
    ) -> list[Any]:
        """The answers to `requests`; asks only for those that the file lacks.

        Args:
            requests: each in JSON's types. Equal requests share an answer once it is kept.
            answer: takes the indices of the missing requests and yields {index: answer}, each answer in JSON's types.
                Each dictionary is kept as soon as it is yielded.

        Raises:
            ResourceError: the disk is full, or the file is not one of ours.
        """
        found: dict[int, Any] = {}
        if self.file is None:
            for answers in answer(list(range(len(requests)))):
                found.update(answers)
            return [found[i] for i in range(len(requests))]
        keys = [digest(request) for request in requests]
        with self._open() as database:
            with self._disk_errors_explained():
                for i, key in enumerate(keys):
                    row = database.execute(
                        "SELECT answer FROM answers WHERE key = ?", (key,)
                    ).fetchone()
                    if row is not None:
                        found[i] = json.loads(row[0])
            missing = [i for i in range(len(requests)) if i not in found]
            for answers in answer(missing) if missing else ():
                found.update(answers)
                with self._disk_errors_explained(), database:
                    database.executemany(
                        "INSERT OR REPLACE INTO answers VALUES (?, ?)",
                        [(keys[i], json.dumps(value)) for i, value in answers.items()],
                    )
        return [found[i] for i in range(len(requests))]

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        assert self.file is not None
        with self._disk_errors_explained():
            self.file.parent.mkdir(parents=True, exist_ok=True)
            database = sqlite3.connect(self.file, timeout=60)
        with contextlib.closing(database):
            with self._disk_errors_explained():
                database.execute(
                    "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT)"
                )
                database.commit()
            yield database

    @contextlib.contextmanager
    def _disk_errors_explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            assert self.file is not None
            damaged = type(error) is sqlite3.DatabaseError  # also raised for a file of another kind
            cure = "Remove it" if damaged else "What was kept before is safe. Free space there"
            raise ResourceError(
                f"The finished requests cannot be kept in {self.file}: {error}. {cure}, name another folder with "
                "--cache FOLDER, or do without: --no-cache."
            ) from error


def default_folder() -> Path:
    """The folder for finished requests, unless the user names another."""
    return Path(HF_HOME) / "prefixtune" / "finished"


def check_room(folder: Path, requests: int) -> None:
    """Make the folder, and check that its disk has room for the answers to so many requests.

    Raises:
        ResourceError: the folder is not writable, or the disk has too little room.
    """
    needed = MARGIN_BYTES + requests * BYTES_A_REQUEST
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ResourceError(
            f"Finished requests cannot be kept in {folder}: {error.strerror or error}. Name another folder with "
            "--cache FOLDER, or do without: --no-cache."
        ) from error
    if free < needed:
        raise ResourceError(
            f"Finished requests need {needed / 2**20:,.1f} MiB in {folder}, which has {free / 2**20:,.1f} MiB free. "
            "Free some, name another folder with --cache FOLDER, or do without: --no-cache."
        )


def digest(value: Any) -> str:
    """The sha256 of a value in JSON's types; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

"""The file that `ptp generate` writes: rows with the model's answers, which are kept as they are made.

They go to a part file beside it, in the order in which they are made. At the end the file takes its place whole, in the
order of the rows, and the part file goes.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from prefixtune_cli.data.read import Row
from prefixtune_cli.errors import Interrupted, ResourceError, RunDirError
from prefixtune_cli.lock import why_not
from prefixtune_cli.run_dir import json_line, write_atomically

COLUMN = "generated"


class AnswerFile:
    """A JSONL file of rows with their answers; within its `with` block it takes answers.

    Args:
        path: the file to write.
        rows: those that are answered.
        sources: the files that they come from.
        overwrite: replace a file that is there already, and the part file of an earlier command.

    Raises:
        RunDirError: the file is one of the sources, is there already, or is a folder; or a part file is there.
    """

    def __init__(
        self, path: Path, rows: Sequence[Row], sources: Sequence[Path], *, overwrite: bool
    ) -> None:
        self.path = path
        self.part = path.with_name(f"{path.stem}.part{path.suffix}")
        self.column = _free_column(rows)
        self._rows = rows
        self._lines: dict[int, str] = {}
        self._file: IO[bytes] | None = None
        for source in sources:
            if any(
                os.path.exists(file) and file.samefile(source) for file in (self.path, self.part)
            ):
                raise RunDirError(
                    f"--out {path} would replace {source}, which --data reads. Give another --out."
                )
        if os.path.exists(path) and not path.is_file():
            what = "a folder" if path.is_dir() else "no plain file"
            raise RunDirError(
                f"--out {path} is {what}. Give the name of a file, as in answers.jsonl."
            )
        if overwrite:
            return
        if os.path.lexists(path):
            raise RunDirError(
                f"--out {path} is there already. Type --overwrite to replace it, or give another name."
            )
        if os.path.exists(self.part):
            raise RunDirError(
                f"{self.part} holds the answers of a command that did not end, or that still runs. Move it away, give "
                "another --out, or type --overwrite to delete it."
            )

    def __enter__(self) -> AnswerFile:
        """Make the part file, before anything loads.

        Raises:
            ResourceError: it cannot be written.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self.part, "wb")
        except OSError as error:
            raise self._unwritable(error) from error
        return self

    def add(self, i: int, answer: str) -> None:
        """Keep the answer to row `i`."""
        assert self._file is not None
        self._lines[i] = json_line({**self._rows[i], self.column: answer})
        try:
            self._file.write(self._lines[i].encode())
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        self._file.close()
        if error is None:
            try:
                write_atomically(self.path, "".join(self._lines[i] for i in sorted(self._lines)))
            except OSError as why:
                failure = self._unwritable(why)
                failure.add_note(self._kept)
                raise failure from why
        elif self._lines:
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted(f"Stopped. {self._kept}") from None
            error.add_note(self._kept)
            return
        self.part.unlink(missing_ok=True)

    @property
    def _kept(self) -> str:
        return f"{len(self._lines)} of {len(self._rows)} answers are kept in {self.part}."

    def _unwritable(self, error: OSError) -> ResourceError:
        why = why_not(self.path.parent, error)
        return ResourceError(
            f"--out {self.path} cannot be written: {why}. Free some disk, or give another --out."
        )


def _free_column(rows: Sequence[Row]) -> str:
    """A name that no row has for a column of its own."""
    taken = {name for row in rows for name in row}
    names = (COLUMN, *(f"{COLUMN}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)

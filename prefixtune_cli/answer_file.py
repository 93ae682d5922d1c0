"""The file that `ptp generate` writes: rows with the model's answers.

Each answer is saved at once, to a part file beside it. At the end the whole file is written in the order of the rows,
and the part file is deleted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from prefixtune_cli.data.lines import Row
from prefixtune_cli.errors import Interrupted, ResourceError, RunDirError
from prefixtune_cli.lock import why_not
from prefixtune_cli.run_dir import json_line, write_atomically

COLUMN = "generated"


class AnswerFile:
    """A JSONL file of rows with their answers. Add answers within its `with` block.

    Args:
        path: the file to write.
        rows: the rows to answer.
        sources: the files that they come from.
        overwrite: replace an existing file, and the part file of an earlier command.

    Raises:
        RunDirError: the file is one of the sources, exists already, or is a folder; or a part file exists.
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
            what = "a folder" if path.is_dir() else "not a plain file"
            raise RunDirError(
                f"--out {path} is {what}. Give the name of a file, as in answers.jsonl."
            )
        if overwrite:
            return
        if os.path.lexists(path):
            raise RunDirError(
                f"--out {path} exists already. Type --overwrite to replace it, or give another name."
            )
        if os.path.exists(self.part):
            raise RunDirError(
                f"{self.part} holds the answers of a command that was cut off, or that still runs. Move it away, give "
                "another --out, or type --overwrite to delete it."
            )

    def __enter__(self) -> AnswerFile:
        """Create the part file, before anything loads.

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
    """A name for the column of answers that no row has already."""
    taken = {name for row in rows for name in row}
    names = (COLUMN, *(f"{COLUMN}_{number}" for number in range(2, len(taken) + 3)))
    return next(name for name in names if name not in taken)

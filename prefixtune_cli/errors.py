"""The errors that a user can cause, as a tree.

Each error says what is wrong, what was received and what to type instead. `cli/app.py` prints the
message without a traceback and exits with `exit_code`.

    PtpError
    ├── UsageError            the command line itself (exit code 2)
    ├── RecipeError           a recipe, a flag's value, a --set (exit code 2)
    ├── DataError             a row, a file or a data set, with file and line if known
    │   └── OtherRowsError    rows of another kind than is wanted: answers, pairs of them, or labelled ones
    ├── ModelError            a base model that cannot be found, read or adapted
    │   └── AdapterError      an adapter folder that does not fit the base, or is too new
    ├── RunDirError           an output directory that is taken, incomplete or of another recipe
    ├── ResourceError         disk, memory, GPUs, network
    ├── TrainingError         training went wrong: a loss that is not finite, weights that did not move
    ├── LostWorker            another process of the run has failed and says why (exit code 3)
    └── Interrupted           Ctrl-C, once the work so far is saved (exit code 130)
        └── Preempted         SIGTERM or SIGUSR1 from a scheduler, once the work so far is saved (exit code 0)
"""

# `ptp` sets this environment variable for the processes that it starts, and says which of them was lost.
LAUNCHER_PID = "PTP_LAUNCHER_PID"


class PtpError(Exception):
    """A problem that the user can fix. The message is all that they see."""

    exit_code = 1


class UsageError(PtpError):
    """The command line cannot be read."""

    exit_code = 2


class RecipeError(PtpError):
    """A recipe, a flag's value or a `--set` is wrong. One error lists all problems of a recipe."""

    exit_code = 2


class DataError(PtpError):
    """A data file or a row of it is wrong."""


class OtherRowsError(DataError):
    """The rows are of another kind than is wanted: see `recipe.schema.Kind`."""


class ModelError(PtpError):
    """A base model cannot be found, read or adapted."""


class AdapterError(ModelError):
    """An adapter folder cannot be read, or does not fit the base."""


class RunDirError(PtpError):
    """A run directory is taken, incomplete, or belongs to another recipe."""


class ResourceError(PtpError):
    """Disk, memory, GPUs or the network do not suffice."""


class TrainingError(PtpError):
    """Training went wrong, and more training would hide it."""


class LostWorker(PtpError):
    """Another process of the run has failed, so this one cannot continue. The other one says why."""

    exit_code = 3


class Interrupted(PtpError):
    """The user stopped the work. What was done is kept."""

    exit_code = 130


class Preempted(Interrupted):
    """The scheduler stopped the work. What was done is kept; the same command with `--resume auto` continues it."""

    exit_code = 0


def first_line(error: Exception) -> str:
    """The first line of another library's error, or the name of its class if it has no text."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""The errors that a user can cause, as a tree.

Every one of them says what is wrong, what was received and what to type instead; `cli/app.py`
prints the message without a traceback and exits with `exit_code`.

    PtpError
    ├── UsageError            the command line itself (exit code 2)
    ├── RecipeError           a recipe, a flag's value, a --set (exit code 2)
    ├── DataError             a row, a file or a data set: file and line where there is one
    ├── ModelError            a base model that cannot be found, read or adapted
    │   └── AdapterError      an adapter folder that does not fit the base, or is too new
    ├── RunDirError           an output directory that is taken, incomplete or of another recipe
    ├── ResourceError         disk, memory, GPUs, network
    ├── TrainingError         training went wrong: a loss that is not finite, weights that did not move
    ├── LostWorker            another process of the run has failed, and says why itself (exit code 3)
    └── Interrupted           Ctrl-C, after what was done was saved (exit code 130)
        └── Preempted         SIGTERM or SIGUSR1, a scheduler's, likewise (exit code 0)
"""

# `ptp` sets it in the environment of processes that it starts; it names the one that was lost.
LAUNCHER_PID = "PTP_LAUNCHER_PID"


class PtpError(Exception):
    """Something that the user can put right; the message is all that they see."""

    exit_code = 1


class UsageError(PtpError):
    """The command line cannot be read."""

    exit_code = 2


class RecipeError(PtpError):
    """A recipe, a flag's value or a `--set` is wrong; all problems of a recipe stand in one error."""

    exit_code = 2


class DataError(PtpError):
    """A data file or a row of it is wrong."""


class ModelError(PtpError):
    """A base model cannot be found, read or adapted."""


class AdapterError(ModelError):
    """An adapter folder cannot be read, or does not fit the base."""


class RunDirError(PtpError):
    """A run directory is taken, incomplete, or belongs to another recipe."""


class ResourceError(PtpError):
    """Disk, memory, GPUs or the network do not suffice."""


class TrainingError(PtpError):
    """Training went wrong in a way that going on would hide."""


class LostWorker(PtpError):
    """Another process of the run has failed, so this one cannot go on; the other one says why."""

    exit_code = 3


class Interrupted(PtpError):
    """The user stopped the work; what was done is kept."""

    exit_code = 130


class Preempted(Interrupted):
    """The scheduler stopped the work; what was done is kept, and the same command with `--resume auto` goes on."""

    exit_code = 0

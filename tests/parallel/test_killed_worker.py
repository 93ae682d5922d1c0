"""`ptp train --gpus 2` when a process or its launcher is killed: nothing is lost, and no process is left.

The README promises that all of a run ends within half a minute, whichever process is killed.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.run_dir import RunDir, step_of
from tests.train.test_chaos import assert_whole, outcome

SECONDS_TO_END = 30
STEPS = 24
OFTEN = ("--save-steps", 3)

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="finds the processes by /proc"
)


class Typed:
    """`ptp train --gpus 2` on the CPU, as a process.

    Args:
        run_dir: of the run.
        base: the model's folder.
        data: the file to train on.
        flags: further flags.
    """

    def __init__(self, run_dir: RunDir, base: Path, data: Path, *flags: object) -> None:
        self.run_dir = run_dir
        typed = ["--model", base, "--data", data, "--out", run_dir.path, "--bits", 32]
        typed += ["--gpus", 2, "--device", "cpu", "--steps", STEPS, "--batch-size", 4]
        typed += ["--max-length", 64, "--set", "train.log_steps=1"]
        typed += ["--set", "evaluate.max_new_tokens=4", *flags]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefixtune_cli", "train", *map(str, typed)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(run_dir.path.parent)},
        )
        self._workers: dict[int, int] = {}

    def wait_until(self, so_far: Callable[[], Any]) -> None:
        """Wait until the run has come so far."""
        deadline = time.monotonic() + 180
        while not so_far():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self._workers = workers_of(self.process.pid)

    def kill(self, rank: int) -> int:
        """Kill the process of a rank with -9 in the middle of the run; returns its process id."""
        pid = self._workers[rank]
        os.kill(pid, signal.SIGKILL)
        assert not self.run_dir.finished
        return pid

    def end(self, seconds: float = SECONDS_TO_END) -> tuple[int, str]:
        """Exit code and stderr of the whole command, after all of its processes have ended."""
        _, said = self.process.communicate(timeout=seconds)
        assert [pid for pid in self._workers.values() if runs(pid)] == []
        return self.process.returncode, said

    def clear(self) -> None:
        """Kill whatever is left of it."""
        for pid in (self.process.pid, *self._workers.values()):
            if runs(pid):
                os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def workers_of(pid: int) -> dict[int, int]:
    """The worker processes among a process's children: process ids by rank."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [int(one[5:]) for one in environment if one.startswith(b"RANK=")]
            found.update({rank: int(child) for rank in ranks})
    return found


def runs(pid: int) -> bool:
    """Whether a process exists and has not ended (a zombie has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


Start = Callable[..., Typed]


@pytest.fixture
def start(random_base: Path, colours: Path, tmp_path: Path) -> Iterator[Start]:
    """Start the command; every call returns the same folder."""
    started: list[Typed] = []

    def start(*flags: object) -> Typed:
        started.append(Typed(RunDir(tmp_path / "run"), random_base, colours, *flags))
        return started[-1]

    yield start
    for one in started:
        one.clear()


@pytest.fixture(scope="module")
def wanted(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of two undisturbed processes."""
    run_dir = RunDir(tmp_path_factory.mktemp("whole") / "run")
    whole = Typed(run_dir, random_base, colours, *OFTEN)
    try:
        assert whole.end(180)[0] == 0
    finally:
        whole.clear()
    return outcome(run_dir)


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_worker_ends_the_command_which_names_it(rank: int, start: Start) -> None:
    run = start(*OFTEN)
    run.wait_until(run.run_dir.checkpoints)
    pid = run.kill(rank)
    code, said = run.end()
    assert code == 1
    assert said.count("error: ") == 1
    assert f"error: Rank {rank} (process {pid}) was killed by SIGKILL" in " ".join(said.split())
    saved = step_of(run.run_dir.checkpoints()[-1])
    assert f"The run is saved up to step {saved}." in " ".join(said.split())
    assert run.run_dir.resume_command in " ".join(said.split())
    assert "Traceback" not in said
    assert_whole(run.run_dir)


def test_sigterm_makes_both_save_together(start: Start) -> None:
    run = start(*OFTEN, "--resume", "auto")
    run.wait_until(run.run_dir.checkpoints)
    run.process.send_signal(signal.SIGTERM)
    code, said = run.end()
    assert code == 0, said
    assert said.count("Stopped by SIGTERM at step") == 1
    assert "error: " not in said
    assert_whole(run.run_dir)
    saved = step_of(run.run_dir.checkpoints()[-1])
    assert f"at step {saved} of {STEPS}; a checkpoint is saved." in " ".join(said.split())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_command_goes_on_to_the_bytes_of_a_run_that_nobody_stopped(
    number: int, start: Start, wanted: dict[str, Any]
) -> None:
    """test_chaos does so at each change, with processes that no launcher starts."""
    run = start(*OFTEN)
    run.wait_until(run.run_dir.checkpoints)
    if number == signal.SIGKILL:
        run.kill(1)
    else:
        run.process.send_signal(number)
    run.end()
    saved = step_of(run.run_dir.checkpoints()[-1])
    code, said = start(*OFTEN, "--resume", "auto").end(180)
    assert code == 0, said
    assert f"from checkpoint-{saved}." in " ".join(said.split())
    assert outcome(run.run_dir) == wanted


@pytest.mark.slow
def test_workers_whose_launcher_is_killed_save_a_checkpoint_and_end(start: Start) -> None:
    run = start("--save-steps", 1000)
    run.wait_until(run.run_dir.read_metrics)
    run.process.kill()
    code, said = run.end()
    assert code == -signal.SIGKILL
    assert said.count("Stopped by SIGTERM at step") == 1
    assert "Traceback" not in said
    assert_whole(run.run_dir)
    assert len(run.run_dir.checkpoints()) == 1
    assert not run.run_dir.finished


@pytest.mark.slow
def test_a_worker_killed_before_the_others_have_found_it_ends_the_command(start: Start) -> None:
    """The other one waits for it at a meeting place that outlives both, and would wait for an hour."""
    run = start(*OFTEN)
    run.wait_until(lambda: len(workers_of(run.process.pid)) == 2)
    pid = run.kill(1)
    code, said = run.end()
    assert code == 1
    assert said.count("error: ") == 1
    assert f"error: Rank 1 (process {pid}) was killed by SIGKILL" in " ".join(said.split())
    assert "No checkpoint was saved yet." in " ".join(said.split())
    assert not run.run_dir.recipe.exists()

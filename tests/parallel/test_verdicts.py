"""The launcher's message and exit code when processes end, with stand-ins for `ptp` that end in every way."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ports import free_port

# Runs the launcher; its processes run sys.argv[2] instead of `ptp`.
LAUNCHER = """
import sys
from prefixtune_cli.cli.app import _tell
from prefixtune_cli.errors import PtpError
from prefixtune_cli.parallel import launch
from prefixtune_cli.parallel.nodes import Nodes
plain = launch.SubprocessContext.__init__
def init(self, **given):
    given["args"] = {i: ("-c", sys.argv[2]) for i in given["args"]}
    plain(self, **given)
launch.SubprocessContext.__init__ = init
try:
    launch.launch([], int(sys.argv[1]), eval(sys.argv[3]), on_gpu=False, advice=lambda: "ADVICE")
except PtpError as error:
    sys.exit(_tell(error))
"""
WORKER = """
import os, signal, sys, time
rank = int(os.environ["RANK"])
def stop(how): sys.exit(how)
"""


def start(worker: str, workers: int = 2, nodes: str = "Nodes()") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, str(workers), WORKER + worker, nodes],
        stderr=subprocess.PIPE,
        text=True,
    )


def verdict(worker: str, workers: int = 2) -> tuple[int, str]:
    run = start(worker, workers)
    said = run.communicate(timeout=60)[1]
    return run.returncode, said


KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
HANGS = "signal.signal(signal.SIGTERM, lambda *_: None); time.sleep(100)"


def test_all_is_well_where_all_processes_end_well() -> None:
    assert verdict("stop(0)") == (0, "")


def test_a_run_that_ended_worse_than_its_base_keeps_its_exit_code() -> None:
    assert verdict("stop(4 if rank == 0 else 0)") == (4, "")


def test_what_the_first_process_says_is_not_said_again() -> None:
    code, said = verdict(
        "sys.stderr.write('error: mine') if rank == 0 else None; stop(2 if rank == 0 else 3)"
    )
    assert (code, said) == (2, "error: mine")


def test_a_process_that_was_killed_is_named_though_the_others_end_first() -> None:
    code, said = verdict(f"{KILLED} if rank == 1 else stop(3)")
    assert code == 1
    assert said.count("error: ") == 1
    assert "error: Rank 1 (process " in said
    assert "was killed by SIGKILL" in said
    assert said.rstrip().endswith("ADVICE")


def test_the_error_of_another_process_is_shown_though_the_first_one_hangs() -> None:
    code, said = verdict(
        "print('error: the loss became nan\\nat step 7', file=sys.stderr) if rank == 1 else None\n"
        f"if rank == 0: {HANGS}\nstop(1)"
    )
    assert code == 1
    assert "Rank 1 (process " in said
    assert "failed with exit code 1: the loss became nan\nat step 7" in said
    assert "SIGKILL" not in said


def test_a_process_gets_a_moment_to_say_why_where_another_has_failed() -> None:
    code, said = verdict(
        "if rank == 1: stop(1)\ntime.sleep(1)\nsys.stderr.write('error: the disk is full')\nstop(2)"
    )
    assert (code, said) == (2, "error: the disk is full")


def test_processes_that_lose_each_other_without_a_reason_are_no_silent_end() -> None:
    code, said = verdict("print('error: gloo: no route to host', file=sys.stderr)\nstop(3)")
    assert code == 1
    assert "none of them says why" in said
    assert "GLOO_SOCKET_IFNAME" in said


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)]
)
@pytest.mark.parametrize(
    "worker",
    [
        pytest.param("", id="killed by it while they start"),
        pytest.param(
            "for n in (2, 10, 15): signal.signal(n, lambda *_: stop(3 if rank else 0))\n",
            id="one is lost as the other ends",
        ),
    ],
)
def test_a_signal_ends_all_processes_with_its_own_exit_code(
    worker: str, number: signal.Signals, code: int, tmp_path: Path
) -> None:
    ready = f"open({str(tmp_path)!r} + f'/{{rank}}', 'w').close(); time.sleep(30); stop(9)"
    run = start(worker + ready)
    deadline = time.monotonic() + 30
    while len(list(tmp_path.iterdir())) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.send_signal(number)
    said = run.communicate(timeout=40)[1]
    assert run.returncode == code, said
    assert f"Stopped by {number.name}. ADVICE" in said


def test_on_every_node_the_process_is_named_that_was_killed_on_one() -> None:
    port = free_port()
    worker = f"time.sleep(3)\nif rank == 1: {KILLED}\nstop(3)"  # gloo tells the others at once
    two = [start(worker, 1, f"Nodes(2, {rank}, '127.0.0.1', {port})") for rank in (0, 1)]
    said = [run.communicate(timeout=60)[1] for run in two]
    assert [run.returncode for run in two] == [1, 1], said
    assert "Rank 1 (process " in said[0]
    assert "On node 1: " in said[0]
    assert "was killed by SIGKILL" in said[0]
    assert "was killed by SIGKILL" in said[1]


def test_a_launcher_that_waits_for_the_first_node_hears_ctrl_c() -> None:
    port = free_port()
    run = start("", 1, f"Nodes(2, 1, '127.0.0.1', {port})")
    time.sleep(6)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode != 0


def test_a_process_that_has_not_begun_ends_quietly() -> None:
    """`ptp`'s own processes take some seconds to start."""
    environment = {**os.environ, "PTP_LAUNCHER_PID": str(os.getpid()), "RANK": "0"}
    for number, code in ((signal.SIGTERM, 0), (signal.SIGUSR1, 0), (signal.SIGINT, 130)):
        run = subprocess.Popen(
            [sys.executable, "-c", "import sys, time\nfrom prefixtune_cli.cli import app\n"
             "app.app = lambda **_: (print(flush=True), time.sleep(30))\napp.main()"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert run.stdout is not None
        run.stdout.readline()
        run.send_signal(number)
        _, said = run.communicate(timeout=20)
        assert (run.returncode, said) == (code, "")

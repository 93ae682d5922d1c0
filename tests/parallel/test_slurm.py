"""The recipe for Slurm, with stand-ins for `srun` and `scontrol` that run everything on one machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "recipes" / "cluster" / "slurm.sh"
# Two tasks on one node, each with Slurm's variables for its place; srun exits with the worst exit code.
SRUN = """#!/bin/bash
[[ $1 == --kill-on-bad-exit=1 && $2 == --cpus-per-task=1 ]] || exit 9
shift 2
export SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
[[ -z $SIGNAL_AFTER ]] || { while [[ ! -e $SIGNAL_AFTER ]]; do sleep 0.1; done; kill -USR1 $first $second; }
wait $first; code=$?
wait $second || code=$?
exit $code
"""
SCONTROL = '#!/bin/bash\necho "$@" >> "$REQUEUED"\n'


def sbatch(folder: Path, *flags: object, **environment: object) -> subprocess.CompletedProcess[str]:
    """Run the script as `sbatch` would."""
    tools = folder / "bin"
    tools.mkdir(exist_ok=True)
    for name, text in {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "ptp": f'#!/bin/bash\nexec {sys.executable} -m prefixtune_cli "$@"\n',
    }.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    return subprocess.run(
        ["bash", SCRIPT, *map(str, flags)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env={
            **os.environ,
            "PATH": f"{tools}:{os.environ['PATH']}",
            "SLURM_JOB_ID": str(os.getpid()),
            "SLURM_CPUS_PER_TASK": "1",
            "OMP_NUM_THREADS": "1",
            "REQUEUED": str(folder / "requeued"),
            "CUDA_VISIBLE_DEVICES": "",
            **{name: str(value) for name, value in environment.items()},
        },
    )


@pytest.mark.skipif(sys.platform != "linux", reason="the stand-ins are shell scripts")
def test_a_job_saves_at_slurms_signal_queues_again_and_ends_in_the_next_slot(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    flags = ["--model", random_base, "--data", colours, f"--out={out}", "--bits", 32]
    flags += ["--max-length", 64, "--steps", 60, "--batch-size", 4, "--save-steps", 5]
    flags += ["--set", "evaluate.max_new_tokens=4"]
    first = sbatch(tmp_path, *flags, SIGNAL_AFTER=out / "checkpoint-5")
    assert first.returncode == 0, first.stderr
    assert "Stopped by SIGUSR1 at step" in first.stderr
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    assert not (out / "summary.json").exists()
    last = sbatch(tmp_path, *flags, SIGNAL_AFTER="")
    assert last.returncode == 0, last.stderr
    assert "Resuming" in last.stderr
    assert json.loads((out / "summary.json").read_text())["steps"] == 60
    assert json.loads((out / "environment.json").read_text())["processes"] == 2
    assert (tmp_path / "requeued").read_text().count("\n") == 1


def test_without_out_the_job_says_what_it_needs(tmp_path: Path) -> None:
    done = sbatch(tmp_path, "--recipe", "quickstart")
    assert done.returncode == 2
    assert "needs --out FOLDER" in done.stderr
    assert not (tmp_path / "requeued").exists()

"""Runs of `train`, and commands, that start at once: a process that has imported everything forks each of them.

Python takes ten seconds to import torch, trl and peft; a fork of a process that has done so takes a hundredth of a
second. The process itself (`main`) computes nothing, as threads do not survive a fork. `Zygote` is the test's side.
"""

import contextlib
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, write_json

# `train` imports these late; without this, each child would import them again.
IMPORTED_LATE = (
    "lm_eval.tasks",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "prefixtune_cli.cli.eval",
    "prefixtune_cli.cli.train",
    "prefixtune_cli.evaluate.benchmarks",
    "prefixtune_cli.evaluate.language_model",
    "prefixtune_cli.train",
    "torch.distributed.tensor",
    "torch.nn.parallel.distributed",
    "torch.optim.adamw",
    "transformers.models.llama.modeling_llama",
    "transformers.models.llama.tokenization_llama",
)
# The saved files of a folder.
NAMES = {"weights.safetensors", "optimizer.pt", "trainer_state.json"}
# Changes that a process makes to a folder, as Python's audit events.
CHANGES = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}


class Zygote:
    """The process that forks, and its children by their process ids."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.train.zygote"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            cwd=Path(__file__).parents[2],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self._ask(does="poll", pid=0)  # the answer comes after everything is imported

    def _ask(self, **order: Any) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(order) + "\n")
        answer = self._process.stdout.readline()
        assert answer, "the zygote has died"
        return json.loads(answer)

    def train(self, recipe: Recipe, diary: Path, environment: Mapping[str, str]) -> int:
        """Fork a child that trains with `resume="auto"`; returns its process id.

        Args:
            recipe: of the run.
            diary: gets the run's reports, one a line; a file beside it gets its stderr.
            environment: says which of several processes it is.
        """
        return int(
            self._ask(
                does="train",
                recipe=recipe.model_dump(mode="json"),
                diary=str(diary),
                environment=dict(environment),
            )
        )

    def command(self, said: Path, *typed: object) -> "Command":
        """Fork a child that is `ptp` with what was typed.

        Args:
            said: a file without a suffix; beside it lies what the command writes, as `.out` and `.err`.
            typed: the command line, without `ptp`.
        """
        order = {"typed": [str(one) for one in typed], "said": str(said)}
        return Command(self, int(self._ask(does="command", **order)), said)

    def save(self, run_dir: RunDir, step: int, dies_before: int) -> int:
        """Fork a child that does `save` and kills itself before change number `dies_before`, from 0; returns its id."""
        order = {"run_dir": str(run_dir.path), "step": step, "dies_before": dies_before}
        return int(self._ask(does="save", **order))

    def ended(self, pid: int, within: float) -> int | None:
        """The exit code of a child, negative for a signal; None if it still runs after `within` seconds."""
        deadline = time.monotonic() + within
        while (code := self._ask(does="poll", pid=pid)) is None and time.monotonic() < deadline:
            time.sleep(0.005)
        return None if code is None else int(code)

    def close(self) -> None:
        """End the process, which ends its children."""
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


class Command:
    """A forked `ptp`, with what the tests use of `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int, said: Path) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        self._said = said

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._wait(0)

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def said(self) -> str:
        """What it has written to stderr so far."""
        file = self._said.with_suffix(".err")
        return file.read_text() if file.exists() else ""

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """What it has written to stdout and to stderr, once it has ended."""
        if self._wait(timeout) is None:
            os.kill(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired("ptp", timeout)
        out, err = (self._said.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        return out, err

    def _wait(self, seconds: float) -> int | None:
        if self.returncode is None:
            self.returncode = self._zygote.ended(self.pid, seconds)
        return self.returncode


Start = Callable[..., Command]  # of what was typed


class Diary:
    """A reporter that writes each report to a file at once."""

    def __init__(self, file: Path) -> None:
        self._file = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def notice(self, text: str) -> None:
        os.write(self._file, f"{text}\n".encode())

    warning = notice

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        self.notice(f"{task} {done}/{total}")


def main() -> None:
    """Fork the children that stdin asks for, until stdin ends."""
    import importlib

    for name in IMPORTED_LATE:
        importlib.import_module(name)
    # The children share the libraries' million objects, which a collection of theirs would go through and copy.
    gc.collect()
    gc.freeze()
    children: set[int] = set()
    for line in sys.stdin:
        order = json.loads(line)
        does = order.pop("does")
        if does == "poll":
            ended, status = os.waitpid(order["pid"], os.WNOHANG) if children else (0, 0)
            children -= {ended}
            answer = os.waitstatus_to_exitcode(status) if ended else None
        else:
            if not (answer := os.fork()):
                _live({"train": _train, "save": _save, "command": _command}[does], order)
            children.add(answer)
        print(json.dumps(answer), flush=True)
    for pid in children:
        os.kill(pid, signal.SIGKILL)


def _live(what: Any, order: dict[str, Any]) -> None:
    """Do it, and exit without returning."""
    code = 1
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
        what(**order)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)


def _train(recipe: dict[str, Any], diary: str, environment: dict[str, str]) -> None:
    from prefixtune_cli.train import train

    errors = os.open(Path(diary).with_suffix(".stderr"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    os.environ.update(environment)
    train(Recipe.model_validate(recipe), resume="auto", reporter=Diary(Path(diary)))


def _command(typed: list[str], said: str) -> None:
    from prefixtune_cli.cli.app import main

    for number, suffix in ((1, ".out"), (2, ".err")):
        file = os.open(said + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.argv = ["ptp", *typed]
    main()


def _save(run_dir: str, step: int, dies_before: int) -> None:
    changes = count()

    def die_in_time(event: str, arguments: tuple[Any, ...]) -> None:
        if event in CHANGES and next(changes) == dies_before:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(die_in_time)
    save(RunDir(run_dir), step, kept=1)


def save(run_dir: RunDir, step: int, kept: int) -> None:
    """Write what a run writes at a step: a file, a checkpoint that replaces the older ones, and the adapter."""
    write_json(run_dir.environment, {"step": step})
    checkpoint = run_dir.checkpoint_part / f"checkpoint-{step}"
    adapter = run_dir.path / ".adapter.part"
    for old, new in ((run_dir.checkpoint_part, checkpoint), (adapter, adapter)):
        shutil.rmtree(old, ignore_errors=True)
        new.mkdir(parents=True)
        for name in sorted(NAMES):
            (new / name).write_text(f"{name} of step {step}")
    run_dir.seal(checkpoint, step)
    run_dir.drop_old_checkpoints(kept)
    run_dir.place(adapter, run_dir.adapter)


if __name__ == "__main__":
    main()

"""A disk fills up in the middle of a run: one clear error, and the last good checkpoint leads to the same result.

It runs on a small file system of its own, if one can be mounted. Everywhere, it also runs with writes that fail as
those to a full disk do, after half of the data.
"""

import builtins
import errno
import io
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import ResourceError
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.run_dir import RunDir, step_of
from prefixtune_cli.train import callbacks, train
from tests.train.test_chaos import assert_whole, outcome
from tests.train.test_run import Listener, recipe

STEPS = 12
FULL_AT = 5  # with checkpoints at 2 and 4


def chosen(base: Path, data: Path, out: Path) -> Recipe:
    return recipe(
        base,
        data,
        out,
        adapter={"method": "lora", "r": 8, "dropout": 0.3},
        train={"max_steps": STEPS, "batch_size": 4, "log_steps": 1, "save_steps": 2},
        evaluate={"max_new_tokens": 4},
    )


@pytest.fixture(scope="module")
def wanted(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The result of a run whose disk has room."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(chosen(random_base, colours, out))
    return outcome(RunDir(out))


def assert_told(error: ResourceError, run_dir: RunDir) -> None:
    """What happened, what is kept, and what to type."""
    assert f"No space is left for {run_dir.path}. " in str(error)
    assert "Whole checkpoints are kept: free some space and type ptp train " in str(error)
    assert str(error).endswith(run_dir.resume_command)


def assert_goes_on(settings: Recipe, run_dir: RunDir, wanted: dict[str, Any]) -> None:
    """Resumed from the newest checkpoint, the run ends as an uninterrupted one does."""
    checkpoint, damaged = run_dir.newest_whole_checkpoint()
    assert checkpoint is not None
    assert damaged == []
    listener = Listener()
    train(settings, resume=True, reporter=listener)
    assert f"Resuming {run_dir.path} from {checkpoint.name}." in listener.notices
    assert listener.warnings == []
    assert_whole(run_dir)
    assert outcome(run_dir) == wanted


class Ballast(Listener):
    """Fills up a disk in the middle of a run.

    Args:
        file: the file that fills the disk.
        left: bytes that stay free.
    """

    def __init__(self, file: Path, left: int) -> None:
        super().__init__()
        self.file = file
        self.left = left

    def progress(self, task: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        if (task, done) != ("training", FULL_AT) or self.file.exists():
            return
        free = shutil.disk_usage(self.file.parent).free
        with open(self.file, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - self.left)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root; the failing writes are tested anyway")
    yield folder
    # Lazily, because the error that the test has caught may hold a file open.
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(0, id="nothing"),
        pytest.param(100_000, id="less than a tokenizer"),
        pytest.param(300_000, id="less than the state of the optimizer, which torch writes"),
    ],
)
def test_a_disk_that_fills_up_is_told_and_the_last_checkpoint_goes_on(
    left: int, small_disk: Path, random_base: Path, colours: Path, wanted: dict[str, Any]
) -> None:
    run_dir = RunDir(small_disk / "run")
    settings = chosen(random_base, colours, run_dir.path)
    ballast = small_disk / "ballast"
    with pytest.raises(ResourceError) as caught:
        train(settings, reporter=Ballast(ballast, left))
    assert_told(caught.value, run_dir)
    assert [step_of(folder) for folder in run_dir.checkpoints()] == [2, 4]
    assert not run_dir.finished
    with pytest.raises(ResourceError, match=r"MiB free|No space is left"):
        train(settings, resume=True)
    assert [step_of(folder) for folder in run_dir.checkpoints()] == [2, 4]
    ballast.unlink()
    assert_goes_on(settings, run_dir, wanted)


class FullDisk:
    """Make one write below a folder, and all later ones, fail midway until there is room again.

    Args:
        run_dir: the folder; it fills up after the second checkpoint.
        name: a part of the path of the first file that fails.
    """

    def __init__(self, run_dir: RunDir, name: str) -> None:
        self.run_dir = run_dir
        self.name = name
        self.full = False
        self._open = open

    def open(self, file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        """Replaces `open`."""
        path = str(file)
        if not set(mode) & set("wax+") or not path.startswith(str(self.run_dir.path)):
            return self._open(file, mode, *arguments, **keywords)
        self.full |= self.name in path and len(self.run_dir.checkpoints()) >= 2
        if not self.full:
            return self._open(file, mode, *arguments, **keywords)
        raw = HalfWritten(path, mode.replace("b", "").replace("t", ""))
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


class HalfWritten(io.FileIO):
    """A file on a disk with room for half of the first write to it."""

    written = False

    def write(self, data: Any) -> int:
        if not self.written:
            super().write(bytes(data)[: len(data) // 2])
        self.written = True
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)


@pytest.mark.parametrize(
    ("name", "newest"),
    [
        pytest.param("metrics.jsonl", 4, id="a line of the metrics"),
        pytest.param("trainer_state.json", 4, id="a checkpoint"),
        pytest.param(".sha256.", 4, id="the hashes of a checkpoint"),
        pytest.param(".loss.", 4, id="the plot"),
        pytest.param(".adapter.part/adapter_config.json", STEPS, id="the adapter"),
        pytest.param(".held-out.", STEPS, id="the answers"),
        pytest.param(".summary.", STEPS, id="the summary"),
    ],
)
def test_a_write_that_fails_is_told_and_the_last_checkpoint_goes_on(
    name: str,
    newest: int,
    random_base: Path,
    colours: Path,
    wanted: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_dir = RunDir(tmp_path / "run")
    settings = chosen(random_base, colours, run_dir.path)
    with monkeypatch.context() as patched:
        disk = FullDisk(run_dir, name)
        patched.setattr(builtins, "open", disk.open)
        patched.setattr(callbacks, "SECONDS_BETWEEN_PLOTS", 0)
        with pytest.raises(ResourceError) as caught:
            train(settings)
    assert disk.full
    assert_told(caught.value, run_dir)
    assert step_of(run_dir.checkpoints()[-1]) == newest
    assert not run_dir.finished
    torn = [line for line in run_dir.metrics.read_text().splitlines() if not line.endswith("}")]
    assert len(torn) == (name == "metrics.jsonl")
    assert_goes_on(settings, run_dir, wanted)

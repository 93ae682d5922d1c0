"""The processes of a run: which one this is, what one of them does for all, and how they agree.

`ptp train --gpus N` (see `launch`), torchrun, accelerate launch or Slurm's srun starts a process, whose environment
says which. Work of a single process, such as tokenizing, comes before the process group exists, so that no collective
waits for it. Until then the processes talk through the group's key-value store.
"""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from prefixtune_cli.errors import LostWorker, ResourceError, UsageError, first_line

Value = TypeVar("Value")

# How long a collective waits for the slowest process, which may be writing a checkpoint of a whole model.
PATIENCE = timedelta(hours=1)
SECONDS_BETWEEN_LOOKS = 0.1
SECONDS_TO_MEET = 900  # for all processes to start

# torchrun and similar launchers set these.
_NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_PLACE = ("MASTER_ADDR", "MASTER_PORT")


@dataclass
class Processes:
    """This process among those of its run; the defaults are a run of one process.

    Attributes:
        rank, size: this process's number, and the number of all processes, on all nodes.
        local_rank: this process's number on its node.
        node: the name of its node.
        store: the key-value store for talking before the process group exists.
        folder: this process's own folder, for files that it gives to the others on its node.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    node: str = "0"
    store: Any = None
    folder: Path = Path()
    _asked: int = field(default=0, repr=False)

    @property
    def leads(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def first_on_each_node(self, make: Callable[[], Value]) -> Value:
        """The result of `make`: the first process of each node calls it, and the others there wait for a copy.

        Raises:
            LostWorker: on the processes that wait, if `make` failed.
        """
        if self.size == 1:
            return make()
        self._asked += 1
        key = f"ptp/{self._asked}/{self.node}"
        if self.local_rank == 0:
            file = self.folder / str(self._asked)
            try:
                value = make()
                file.write_bytes(pickle.dumps(value))
            except BaseException:
                self.store.set(key, "")
                raise
            self.store.set(key, str(file))
            return value
        while not self.store.check([key]):
            time.sleep(SECONDS_BETWEEN_LOOKS)
        copy = Path(self.store.get(key).decode())
        # Anyone who reaches the store's port can write to it, so unpickle only this user's files.
        if copy == Path() or copy.stat().st_uid != os.getuid():
            raise LostWorker("The first process of this node has failed; it says why.")
        given: Value = pickle.loads(copy.read_bytes())
        return given

    def heard(self, mine: int, seconds: float) -> list[int]:
        """The numbers of all processes, without a collective.

        Raises:
            LostWorker: not all of them have given theirs within so many seconds.
        """
        if self.size == 1:
            return [mine]
        self._asked += 1
        keys = [f"ptp/{self._asked}/heard/{rank}" for rank in range(self.size)]
        self.store.set(keys[self.rank], str(mine))
        deadline = time.monotonic() + seconds
        while not self.store.check(keys):
            if time.monotonic() > deadline:
                silent = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
                raise LostWorker(
                    f"Rank {silent[0]} did not answer for {seconds:g} seconds: if only one process runs out of "
                    "memory, the others wait for it. Take a smaller --batch-size."
                )
            time.sleep(SECONDS_BETWEEN_LOOKS)
        return [int(self.store.get(key)) for key in keys]

    def form_group(self, device: torch.device) -> None:
        """Make the process group: NCCL between GPUs, gloo between CPUs."""
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
            if device.index != self.local_rank:
                # A scheduler shows each process one GPU; accelerate would look for a GPU of the local rank's number.
                os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        dist.init_process_group(
            backend="cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
            store=self.store,
            rank=self.rank,
            world_size=self.size,
            timeout=PATIENCE,
        )

    def agree(self, *mine: int) -> tuple[int, ...]:
        """The largest of each number over all processes."""
        if self.size == 1:
            return mine
        numbers = torch.tensor(mine)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return tuple(numbers.tolist())

    def told(self, value: Value) -> Value:
        """The value that the leader has."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share(self, count: int) -> range:
        """The indices of this process's share of `count` pieces of work."""
        return range(self.rank, count, self.size)

    def joined(self, mine: Mapping[int, Value]) -> dict[int, Value]:
        """The shares of all processes together."""
        return {key: value for share in self.gathered(dict(mine)) for key, value in share.items()}

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.agree(0)


@contextmanager
def joined(wanted: int | None) -> Iterator[Processes]:
    """Within the block, this process is one of its run's; the end of the block destroys the process group, if any.

    Args:
        wanted: the number of processes that the recipe asks for on this machine; None takes any.

    Raises:
        UsageError: another number of processes was started.
    """
    _take_over_from_slurm()
    check_environment()
    size = int(os.environ.get("WORLD_SIZE", "1"))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if wanted is not None and wanted != here:
        raise UsageError(
            f"train.gpus asks for {wanted} processes on this machine, but {here} were started. Have torchrun, "
            f"accelerate launch or srun start {wanted}, or leave out --gpus. Without them, `ptp train --gpus {wanted}` "
            "starts the processes."
        )
    if size == 1:
        yield Processes()
        return
    store, rank = _store(), int(os.environ["RANK"])
    local_rank = int(os.environ.get("LOCAL_RANK", rank))
    node = os.environ.get("GROUP_RANK", os.environ.get("SLURM_NODEID", str(rank - local_rank)))
    with TemporaryDirectory(prefix="ptp-") as folder:
        try:
            yield Processes(rank, size, local_rank, node, store, Path(folder))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


def check_environment() -> None:
    """Raise UsageError if the environment has some of torchrun's variables but not the rest."""
    given = {name: os.environ[name] for name in (*_NUMBERS, *_PLACE) if name in os.environ}
    if not {"WORLD_SIZE", "LOCAL_RANK"} & given.keys():  # the others alone have no effect
        return
    wrong = [name for name in _NUMBERS if not given.get(name, "0").isdecimal()]
    missing = [name for name in ("WORLD_SIZE", "RANK", *_PLACE) if name not in given]
    if wrong:
        what = f"and {wrong[0]} must be a number"
    elif missing and not (given.get("WORLD_SIZE") == "1" and "LOCAL_RANK" not in given):
        what = f"but no {' and no '.join(missing)}"
    elif int(given.get("RANK", 0)) >= int(given["WORLD_SIZE"]):
        what = "and ranks go from 0 to WORLD_SIZE - 1"
    else:
        return
    found = ", ".join(f"{name}={value}" for name, value in given.items())
    raise UsageError(
        f"The environment has {found}, as torchrun sets it, {what}. For a run of one process, type: unset "
        f"{' '.join(given)}. For several, start them by --gpus N, torchrun, accelerate launch or srun."
    )


def _store() -> Any:
    """The key-value store of the run; rank 0 opens it if no launcher has."""
    opens = os.environ["RANK"] == "0" and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
    deadline = time.monotonic() + SECONDS_TO_MEET
    while True:
        try:
            # Short attempts, because Python handles signals only between them.
            seconds = SECONDS_TO_MEET if opens else 5
            store = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))[0]
            store.set_timeout(PATIENCE)
            return store
        except (dist.DistError, RuntimeError) as error:
            if opens or time.monotonic() > deadline:
                where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
                raise ResourceError(
                    f"The processes of the run cannot meet at {where}: {first_line(error)} Set MASTER_ADDR "
                    "to the name of the first node, and MASTER_PORT to a free port on it."
                ) from error


def leads() -> bool:
    """Whether this process is the one that reports; RANK without WORLD_SIZE is left over from something else."""
    return "WORLD_SIZE" not in os.environ or os.environ.get("RANK", "0") == "0"


def says_that_one_is_lost(error: BaseException) -> bool:
    """Whether `error` is one that gloo or NCCL raises when another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or "gloo" in text.lower() or "NCCL" in text


def inside_a_launcher(*, of_nodes: bool = False) -> bool:
    """Whether torchrun, accelerate launch, srun or `ptp` has started this process as one of several.

    Args:
        of_nodes: whether `--nodes` is given; then srun has started a launcher on each node, not the processes.
    """
    return "WORLD_SIZE" in os.environ or (not of_nodes and _slurm_step_size() > 1)


def _slurm_step_size() -> int:
    # The step's, not the allocation's: in the shell of `salloc`, nothing has been started yet.
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


def _take_over_from_slurm() -> None:
    """Set torchrun's variables from srun's."""
    if "WORLD_SIZE" in os.environ or _slurm_step_size() == 1:
        return
    given = os.environ
    nodes = given.get("SLURM_STEP_NODELIST", given.get("SLURM_JOB_NODELIST", ""))
    given.setdefault("MASTER_ADDR", _first_host(nodes))
    # Jobs that share a node have different numbers; ports below 20000 are often taken.
    given.setdefault("MASTER_PORT", str(20000 + int(given.get("SLURM_JOB_ID", "0")) % 20000))
    given["RANK"], given["LOCAL_RANK"] = given["SLURM_PROCID"], given["SLURM_LOCALID"]
    given["WORLD_SIZE"] = given["SLURM_STEP_NUM_TASKS"]
    # The tasks of each node, as in 4(x2) or 4,2; we need only those of this node.
    each = re.findall(r"(\d+)(?:\(x(\d+)\))?", given.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    counts = [int(tasks) for tasks, times in each for _ in range(int(times or 1))]
    given["LOCAL_WORLD_SIZE"] = str(counts[int(given.get("SLURM_NODEID", "0")) % len(counts)])


def _first_host(nodes: str) -> str:
    """The first of Slurm's list of nodes, such as `gpu[01-04,07]`."""
    if not nodes or not set(nodes) & set("[,"):
        return nodes or "127.0.0.1"
    try:
        done = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise ResourceError(
            f"Slurm's list of nodes, {nodes}, cannot be read without `scontrol` ({error}). Set MASTER_ADDR to the "
            "name of the first node."
        ) from error
    return done.stdout.split()[0]

"""Starting a run's processes: wrong arguments, and two nodes on one machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from prefixtune_cli.errors import ResourceError, UsageError
from prefixtune_cli.parallel import nodes as meeting
from prefixtune_cli.parallel.nodes import Meeting, Nodes, nodes
from tests.cli.conftest import Ptp, ptp  # noqa: F401
from tests.ports import free_port


@pytest.mark.parametrize(
    ("count", "rank", "rendezvous", "said"),
    [
        (0, None, None, "--nodes must be 1 or more, got 0"),
        (None, 0, None, "--node-rank and --rendezvous belong to --nodes N"),
        (None, None, "a:29500", "--node-rank and --rendezvous belong to --nodes N"),
        (1, 1, "a:29500", "--node-rank must lie between 0 and 0, got 1"),
        (2, None, "a:29500", "--nodes 2 needs --node-rank and --rendezvous"),
        (2, 0, None, "--nodes 2 needs --node-rank and --rendezvous"),
        (2, 2, "a:29500", "--node-rank must lie between 0 and 1, got 2"),
        (2, 1, "29500", "--rendezvous must be HOST:PORT"),
        (2, 1, "a:99999", "--rendezvous must be HOST:PORT"),
    ],
)
def test_nodes_that_make_no_sense_are_refused(
    count: int | None, rank: int | None, rendezvous: str | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        nodes(count, rank, rendezvous)


def test_nodes_are_one_or_as_typed() -> None:
    assert nodes(None, None, None) == nodes(1, None, None) == Nodes()
    assert nodes(1, 0, "first:29500") == Nodes()
    assert nodes(3, 2, "first:29500") == Nodes(3, 2, "first", 29500)


def test_a_first_node_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "SECONDS_TO_JOIN", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        with pytest.raises(ResourceError, match=rf"--rendezvous 127.0.0.1:{port} cannot be reach"):
            Meeting(Nodes(2, 1, "127.0.0.1", port))
        taken.listen()
        with pytest.raises(ResourceError, match=rf"--rendezvous 127.0.0.1:{port} cannot be open"):
            Meeting(Nodes(2, 0, "127.0.0.1", port))


def test_the_command_line_reaches_the_launcher_with_a_clear_error(
    ptp: Ptp,  # noqa: F811
    colours: Path,
    tmp_path: Path,
) -> None:
    typed = ["train", "--model", "tiny", "--data", colours, "--out", tmp_path / "run"]
    code, _, said = ptp(*typed, "--nodes", 2)
    assert code == 2
    assert said.count("error: ") == 1
    assert "--nodes 2 --node-rank 0 --rendezvous first-node:29500" in said


def start(base: Path, data: Path, out: Path, *flags: object) -> subprocess.Popen[str]:
    typed = ["train", "--model", base, "--data", data, "--out", out, "--bits", 32]
    typed += ["--device", "cpu", "--steps", 6, "--batch-size", 4, "--max-length", 64, *flags]
    return subprocess.Popen(
        [sys.executable, "-m", "prefixtune_cli", *map(str, typed)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_two_nodes_train_what_one_machine_trains(
    random_base: Path, colours: Path, tmp_path: Path
) -> None:
    where = ["--rendezvous", f"127.0.0.1:{free_port()}", "--nodes", 2]
    two = [
        start(random_base, colours, tmp_path / "two", *where, "--node-rank", rank)
        for rank in (0, 1)
    ]
    (first, said), (second, said_second) = (node.communicate(timeout=240) for node in two)
    assert [node.returncode for node in two] == [0, 0], said + said_second
    assert "in 6 steps" in first
    assert second == ""
    assert "Traceback" not in said + said_second
    from prefixtune_cli.recipe.schema import Recipe
    from prefixtune_cli.train import train

    alone = Recipe.model_validate(
        {
            "model": {"name": str(random_base), "bits": 32, "device": "cpu"},
            "data": {"train": str(colours), "max_length": 64},
            "train": {"max_steps": 6, "batch_size": 8},
            "out": str(tmp_path / "one"),
        }
    )
    train(alone)
    one, two_nodes = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    for name, weight in one.items():
        assert float((weight - two_nodes[name]).abs().max()) < 1e-4 * float(weight.abs().max())

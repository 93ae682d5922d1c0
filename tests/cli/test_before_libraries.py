"""Arguments are checked before the libraries load, so that every command answers a slip at once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import Ptp
from tests.test_pointed import adapter, checkpoint, run

HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "lm_eval", "matplotlib"}
LONG = "a" * 300
# The command line, its exit code, and a part of the message.
SLIPS = {
    "train --model tiny --data nowhere.jsonl": (1, "nowhere.jsonl does not exist"),
    "train --model tiny --data d.jsonl --eval-data nowhere.jsonl": (1, "nowhere.jsonl does not"),
    "train --model ./nowhere --data d.jsonl": (1, "There is no model './nowhere'"),
    "train --model runs/mine --data d.jsonl": (1, "runs/mine is a run of `ptp train`"),
    "train --from nowhere --data d.jsonl": (1, "There is no run or adapter nowhere"),
    "train --from runs/mime --data d.jsonl": (1, "Did you mean runs/mine?"),
    "train --from tiny --data d.jsonl": (1, "There is no run or adapter tiny"),
    "train --from runs/mine --data d.jsonl --method full": (2, "does not go with method full"),
    "train runs/mine": (2, "Type: ptp train --from runs/mine"),
    "inspect-data d.jsonl --from nowhere": (1, "There is no run or adapter nowhere"),
    "train --model tiny --data d.jsonl --chat-template t.jinja": (1, "t.jinja does not exist"),
    "train --model tiny --data d.jsonl --out runs/mine": (1, "runs/mine is not empty"),
    "train --model tiny --data d.jsonl --out r --resume": (1, "There is no run in r to resume"),
    "train --model tiny": (2, "No data is given"),
    "train --data d.jsonl": (2, "No base model is given. Type --model NAME"),
    "train --data d.jsonl --bits 32 --set model.device=cpu": (2, "No base model is given"),
    "plan --method lora": (2, "No base model is given"),
    "compare --data d.jsonl": (2, "No base model is given"),
    "compare --speed": (2, "No base model is given"),
    "train --model tiny --data d.jsonl --batch-size 0": (2, "train.batch_size must be"),
    "plan --model tiny --gpu-memory nan": (2, "--gpu-memory must be above 0, in GiB, got nan"),
    f"merge runs/mine other --out m --seed {10**20}": (2, "less than or equal to 4294967295"),
    "plan --model ./nowhere": (1, "There is no model './nowhere'"),
    "inspect-data nowhere.jsonl": (1, "nowhere.jsonl does not exist"),
    "inspect-data d.jsonl --model ./nowhere": (1, "There is no model './nowhere'"),
    "eval --run runs/mime --bench quickstart": (1, "Did you mean runs/mine?"),
    "eval --adapter nowhere --data d.jsonl": (1, "There is no run or adapter nowhere"),
    "eval --data nowhere.jsonl": (1, "nowhere.jsonl does not exist"),
    "eval --bench forgetting --text nowhere.txt": (1, "The text nowhere.txt does not exist"),
    "eval --bench mmlu --bench-data mmlu=nowhere": (1, "The data of mmlu, nowhere does not exist"),
    "eval --model tiny --bench quickstart --limit 0": (2, "--limit must be at least 1"),
    "eval --model tiny": (2, "There is nothing to evaluate"),
    "eval --model tiny --bits 5 --bench quickstart": (2, "model.bits must be"),
    "generate --run nowhere --prompt x": (1, "There is no run or adapter nowhere"),
    "generate --model ./nowhere --prompt x": (1, "There is no model './nowhere'"),
    "generate --data nowhere.jsonl --out o.jsonl": (1, "nowhere.jsonl does not exist"),
    "generate --prompt x --temperature -1": (2, "--temperature must be 0 or above"),
    "generate --prompt x --temperature nan": (2, "--temperature must be 0 or above"),
    "generate --prompt x --chat-template t.jinja": (1, "t.jinja does not exist"),
    "eval --data d.jsonl --chat-template t.jinja": (1, "t.jinja does not exist"),
    "chat --chat-template t.jinja": (1, "t.jinja does not exist"),
    "chat --adapter nowhere": (1, "There is no run or adapter nowhere"),
    "chat --top-p 2": (2, "--top-p must lie"),
    "merge-info nowhere": (1, "There is no run or adapter nowhere"),
    "merge-info --data nowhere.jsonl": (1, "nowhere.jsonl does not exist"),
    "merge-info --model ./nowhere": (1, "There is no model './nowhere'"),
    "merge nowhere runs/mine --out m": (1, "There is no run or adapter nowhere"),
    "merge runs/mine other --out d.jsonl": (1, "is a file"),
    "merge runs/mine other --out .": (1, "is where you are"),
    f"generate --run {LONG} --prompt x": (1, f"{LONG}/recipe.yaml cannot be used: File name too"),
    f"train --model tiny --data {LONG}": (1, f"{LONG} cannot be used: File name too long"),
    "merge runs/mine other --out m --method mean": (2, "--method must be one of"),
    "compare --model tiny --data nowhere.jsonl": (1, "nowhere.jsonl does not exist"),
    "compare --model tiny --data d.jsonl --ood nowhere.jsonl": (1, "nowhere.jsonl does not"),
    "compare --model tiny --data d.jsonl --text nowhere.txt": (1, "nowhere.txt does not exist"),
    "compare --model ./nowhere --data d.jsonl": (1, "There is no model './nowhere'"),
    "compare --speed --model ./nowhere": (1, "There is no model './nowhere'"),
    "compare runs/mine nowhere": (1, "There is no run or adapter nowhere"),
    "recipes nowhere": (2, "There is no recipe nowhere"),
}


# Runs all commands in one process, and reports exit code, output and imported packages after each.
TYPED = """
import contextlib, io, json, sys
from prefixtune_cli.cli.app import main
for typed in json.loads(sys.argv[1]):
    sys.argv = ["ptp", *typed.split()]
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            main()
            code = 0
        except SystemExit as left:
            code = left.code
    print(json.dumps([typed, code, said.getvalue(), sorted({m.partition(".")[0] for m in sys.modules})]))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a finished run, an adapter folder and a data file."""
    monkeypatch.chdir(tmp_path)
    run(Path("runs/mine"), map={"prompt": "ask", "completion": "say"})
    adapter(Path("other"))
    Path("d.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return tmp_path


def test_a_slip_is_answered_before_the_libraries_load(here: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TYPED, json.dumps(list(SLIPS))],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [typed for typed, *_ in found] == list(SLIPS)
    for typed, code, said, imported in found:
        assert SLIPS[typed][1] in said, typed
        assert code == SLIPS[typed][0], (typed, said)
        assert HEAVY.isdisjoint(imported), typed


def test_runs_are_listed_and_as_json(ptp: Ptp, here: Path) -> None:
    going = run(Path("runs/going"), finished=False)
    checkpoint(going, 5)
    code, printed, _ = ptp("runs")
    assert code == 0
    head, *lines = [line.split() for line in printed.splitlines()]
    assert head == ["run", "model", "method", "state", "loss", "date"]
    assert {line[0]: line[-3] for line in lines} == {"runs/mine": "0.2500", "runs/going": "-"}
    found = json.loads(ptp("runs", "--json")[1])
    assert {one["run"]: one["state"] for one in found} == {
        "runs/mine": "finished",
        "runs/going": "unfinished, saved at step 5",
    }
    assert "There is no run below elsewhere" in ptp("runs", "elsewhere")[2]

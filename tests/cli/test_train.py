"""`ptp train` on the command line: what it prints, and one clear error for each kind of bad input."""

import json
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Ptp

GOOD = '{"prompt": "a", "completion": "b"}\n'


def test_a_run_prints_parameters_scores_and_what_to_type_next(
    ptp: Ptp, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    typed = ["train", "--model", random_base, "--data", colours, "--out", out, "--steps", 4]
    code, printed, said = ptp(*typed, "--bits", 32, "--max-length", 64)
    assert code == 0, said
    assert "Trained 4,096 of 209,216 parameters (1.96 %) in 4 steps" in printed
    assert "MiB" in printed
    for row in ("base", "adapter"):
        line = next(line for line in printed.splitlines() if line.startswith(row))
        assert line.count(".") == 2
        assert "%" in line
    commands = [line.strip() for line in printed.splitlines() if line.startswith("  ptp ")]
    asked = [json.loads(line)["prompt"] for line in colours.read_text().splitlines()]
    chat, *generate = [shlex.split(command) for command in commands]
    assert chat == ["ptp", "chat", "--run", str(out)]
    assert [command[:5] for command in generate] == [["ptp", "generate", *chat[2:], "--prompt"]] * 2
    assert [command[5] in asked for command in generate] == [True, True]
    assert generate[1][6:] == ["--no-adapter"]
    assert f"With test data of your own: ptp eval --run {out} --data FILE" in printed
    assert "training 4/4" in said
    assert "Traceback" not in said
    code, printed, said = ptp(*typed, "--bits", 32, "--max-length", 64, "--overwrite", "--json")
    assert json.loads(printed)["steps"] == 4


def test_an_adapter_worse_than_its_base_has_an_exit_code_of_its_own(
    ptp: Ptp, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    out, other = tmp_path / "my run", tmp_path / "other.jsonl"
    asked = json.loads(colours.read_text().splitlines()[0])["prompt"]
    other.write_text(json.dumps({"prompt": asked, "completion": "a b c d e f g h i j k"}) + "\n")
    typed = ["train", "--model", random_base, "--data", colours, "--eval-data", other, "--out", out]
    more = [
        "--bits",
        32,
        "--steps",
        12,
        "--learning-rate",
        0.3,
        "--set",
        "evaluate.max_new_tokens=2",
    ]
    code, printed, said = ptp(*typed, *more)
    assert code == 4, said
    assert "warning: The adapter is no better than its base" in said
    assert json.loads((out / "summary.json").read_text())["verdict"] == "worse"
    assert "No exact match: more than one answer in twenty has more tokens than" in printed
    commands = [shlex.split(line) for line in printed.splitlines() if line.startswith("  ptp ")]
    assert commands[-1] == ["ptp", "eval", "--run", str(out), "--data", str(other)]
    again = ptp(*typed, *more, "--resume", "auto")
    assert again[0] == 4  # a finished run gives the same exit code every time


def test_a_flag_wins_over_set_and_set_over_the_recipe(
    ptp: Ptp, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(
        f"model: {{name: {random_base}, bits: 32}}\ndata: {{train: {colours}, max_length: 64}}\n"
        "train: {max_steps: 9, batch_size: 7, seed: 5}\n"
    )
    out = tmp_path / "run"
    sets = ["--set", "train.max_steps=8", "--set", "train.batch_size=6"]
    code, _, said = ptp("train", "--recipe", recipe, *sets, "--steps", 2, "--out", out)
    assert code == 0, said
    from prefixtune_cli.recipe.load import resolve

    train = resolve(str(out / "recipe.yaml")).train
    assert (train.max_steps, train.batch_size, train.seed) == (2, 6, 5)


def write(name: str, content: str | bytes) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        file = folder / name
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return ["--data", file]

    return make


def giant_line(folder: Path) -> list[object]:
    file = folder / "giant.jsonl"
    with open(file, "wb") as handle:
        handle.write(b'{"prompt": "')
        handle.truncate(2**30)  # a sparse file, which takes no space
    return ["--data", file]


def recipe(text: str) -> Callable[[Path], list[object]]:
    def make(folder: Path) -> list[object]:
        (folder / "r.yaml").write_text(text)
        return ["--recipe", folder / "r.yaml"]

    return make


def typed(*arguments: object) -> Callable[[Path], list[object]]:
    return lambda folder: list(arguments)


def taken(folder: Path) -> list[object]:
    (folder / "out").mkdir()
    (folder / "out" / "recipe.yaml").write_text("model: {}\n")
    return ["--out", folder / "out"]


def bare_model(folder: Path) -> list[object]:
    (folder / "bare").mkdir()
    (folder / "bare" / "config.json").write_text('{"model_type": "llama"}')
    return ["--model", folder / "bare"]


BAD: dict[str, tuple[Callable[[Path], list[object]], list[str]]] = {
    "an empty file": (write("e.jsonl", ""), ["e.jsonl is empty"]),
    "a file that is not UTF-8": (
        write("l.jsonl", GOOD.encode() + b'{"prompt": "\xe9"}\n'),
        ["l.jsonl, line 2: not UTF-8", "iconv"],
    ),
    "broken JSON in line 17": (
        write("j.jsonl", GOOD * 16 + '{"prompt": "a", "completion" "b"}\n' + GOOD),
        ["j.jsonl, line 17", '{"prompt": "a", "completion" "b"}'],
    ),
    "a row without its column": (
        write("c.jsonl", GOOD + '{"prompt": "a"}\n'),
        ["c.jsonl, line 2: the column 'completion' is missing"],
    ),
    "mixed formats": (
        write("m.jsonl", GOOD + '{"text": "a"}\n'),
        ["m.jsonl, line 2: mixed formats"],
    ),
    "a null field": (
        write("n.jsonl", GOOD + '{"prompt": null, "completion": "b"}\n'),
        ["n.jsonl, line 2: the column 'prompt' must be text, got null"],
    ),
    "an answer that is a list": (
        write("n.jsonl", GOOD + '{"prompt": "a", "completion": ["b"]}\n'),
        ["n.jsonl, line 2: the column 'completion' must be text, got a list", "one text"],
    ),
    "a text and its label": (
        write("t.csv", "text,label\nCard lost.,card\n"),
        ["t.csv, line 2", "--map prompt=text,completion=label", "--format text"],
    ),
    "a one-gigabyte line": (giant_line, ["giant.jsonl, line 1: the line is longer than 64 MiB"]),
    "duplicate keys": (
        write("d.jsonl", GOOD + '{"prompt": "a", "prompt": "c", "completion": "b"}\n'),
        ["d.jsonl, line 2", "prompt", "twice"],
    ),
    "a missing file": (typed("--data", "no-such.jsonl"), ["no-such.jsonl does not exist"]),
    "nothing to train on": (
        write("b.jsonl", '{"prompt": "a", "completion": " "}\n' * 3),
        ["has a token to train on", "b.jsonl, line"],
    ),
    "a model folder without weights": (bare_model, ["bare has a config.json but no weights"]),
    "an unknown model": (typed("--model", "mistrall-7b"), ["Did you mean mistral-7b"]),
    "a hub model while offline": (
        typed("--model", "mistral-7b"),
        ["HF_HUB_OFFLINE is set", "--model /path/to/Mistral-7B"],
    ),
    "hub data while offline": (
        typed("--data", "somebody/some-data"),
        ["somebody/some-data", "HF_HUB_OFFLINE"],
    ),
    "an out directory that is not empty": (taken, ["is not empty", "--overwrite", "--resume"]),
    "a recipe with tabs": (recipe("model:\n\tname: tiny\n"), ["r.yaml:2", "tab"]),
    "a wrong type": (
        recipe("train:\n  batch_size: eight\n"),
        ["r.yaml:2: train.batch_size must be a whole number, got 'eight'"],
    ),
    "an unknown key": (
        recipe("train:\n  batchsize: 8\n"),
        ["r.yaml:2: train.batchsize is not a setting. Did you mean train.batch_size?"],
    ),
    "five bits": (typed("--bits", 5), ["model.bits must be 4, 8, 16 or 32, got 5"]),
    "a feature map that does not exist": (
        typed("--feature-map", "relu"),
        ["adapter.feature_map must be elu, gelu or mlp, got 'relu'. Did you mean 'elu'?"],
    ),
    "a pattern that is no regular expression": (
        typed("--answer-pattern", "#### (.*"),
        ["evaluate.answer_pattern must be a regular expression of Python's re, got '#### (.*'"],
    ),
    "a pattern with two groups": (
        typed("--answer-pattern", "(a)|(b)"),
        ["evaluate.answer_pattern must have one group, got 2 in '(a)|(b)'"],
    ),
    "a pattern that a held-out answer lacks": (
        lambda folder: [
            *write("p.jsonl", GOOD.replace("b", "It is #### b"))(folder),
            *("--eval-data", write("q.jsonl", GOOD.replace("b", "#### b") + GOOD)(folder)[1]),
            *("--answer-pattern", "#### (.*)"),
        ],
        ["q.jsonl, line 2: --answer-pattern '#### (.*)' finds nothing in the answer 'b'"],
    ),
    "GPUs that are not there": (
        typed("--gpus", 4000),
        ["train.gpus is 4000, but this machine has"],
    ),
}


TYPED_WRONG = {
    "a recipe with tabs",
    "a wrong type",
    "an unknown key",
    "five bits",
    "a feature map that does not exist",
    "a pattern that is no regular expression",
    "a pattern with two groups",
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_the_base_loads(
    case: str, ptp: Ptp, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    make, expected = BAD[case]
    given = make(tmp_path)
    defaults = {"--model": random_base, "--data": colours, "--out": tmp_path / "run"}
    rest = [part for pair in defaults.items() if pair[0] not in given for part in pair]
    code, printed, said = ptp("train", *rest, *given)
    assert code == (2 if case in TYPED_WRONG else 1)
    assert printed == ""
    assert said.count("error: ") == 1
    for text in expected:
        assert text in said
    assert "Loading " not in said
    assert "Traceback" not in said
    assert not (tmp_path / "run" / "summary.json").exists()


def test_a_flag_that_does_not_exist_is_a_usage_error(ptp: Ptp) -> None:
    code, _, said = ptp("train", "--lerning-rate", "1")
    assert code == 2
    assert "--learning-rate" in said


@pytest.fixture(params=["64k", "160k"])
def full_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that has too little room at the start of a run, and one that fills up in the middle."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={request.param}", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_loses_no_checkpoint(
    ptp: Ptp, random_base: Path, colours: Path, full_disk: Path
) -> None:
    flags = ["--bits", 32, "--max-length", 64, "--steps", 20, "--set", "train.save_steps=2"]
    out = full_disk / "run"
    code, _, said = ptp("train", "--model", random_base, "--data", colours, "--out", out, *flags)
    assert code == 1
    assert said.count("error: ") == 1
    assert "MiB for checkpoints" in said or "No space is left" in said
    assert "Traceback" not in said

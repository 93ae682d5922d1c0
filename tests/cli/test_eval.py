"""`ptp eval` on the command line: what it prints and writes, and one clear error for each kind of bad input."""

import csv
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Ptp

REAL_MMLU = Path(__file__).parents[2].parent / "shared" / "data" / "mmlu"
SUBJECTS = ("anatomy", "astronomy")
CELL = "mmlu_anatomy"  # most tests use this benchmark


def write_mmlu(folder: Path, subjects: Iterable[str], items: int) -> Path:
    """MMLU as its authors published it: dev and test, CSV without a header; no two rows are alike."""
    for split, count in (("dev", 5), ("test", items)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for subject in subjects:
            with open(folder / split / f"{subject}_{split}.csv", "w", newline="") as file:
                rows = csv.writer(file)
                for i in range(count):
                    question = f"What is {i} plus {i * i} in {subject} ({split})?"
                    choices = [i + i * i + step for step in range(4)]
                    rows.writerow([question, *choices, "ABACADAB"[i % 8]])
    return folder


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def write_gsm8k(folder: Path) -> Path:
    for split in ("train", "test"):
        write_rows(
            folder / f"{split}.jsonl",
            (
                {"question": f"What is {i} + {i}?", "answer": f"It is {2 * i}.\n#### {2 * i}"}
                for i in range(8)
            ),
        )
    return folder


def save_base(folder: Path, like: Path, **changed: Any) -> Path:
    """A base with random weights, and the configuration and tokenizer of another base."""
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM

    config = AutoConfig.from_pretrained(like, **changed)
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, section: Any, seed: int | None = None) -> Path:
    """A fresh adapter; with a seed, one with random weights, so that it differs from its base."""
    import torch

    from prefixtune_cli import model as models
    from prefixtune_cli.recipe.schema import ModelSection

    model = models.attach(models.load_base(ModelSection(name=str(base), bits=32)), section)
    if seed is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.normal_(std=3)
    model.save_pretrained(folder)
    return folder


def save_run(folder: Path, base: Path, weights: Path | None, **sections: Any) -> Path:
    """A run as `ptp train` leaves it, which `ptp eval` reads."""
    from prefixtune_cli.recipe.load import dump
    from prefixtune_cli.recipe.schema import Recipe

    model = {"name": str(base), "bits": 32}
    folder.mkdir()
    recipe = Recipe.model_validate({"model": model, **sections})
    (folder / "recipe.yaml").write_text(dump(recipe), encoding="utf-8")
    if weights is not None:
        shutil.copytree(weights, folder / "adapter")
    return folder


@dataclass(frozen=True)
class Things:
    """The models and the data of the tests.

    Attributes:
        base: two layers of random weights; `wide` has another width, `short` takes 64 tokens, `mute` has no chat
            template.
        fresh: an adapter with M = 0; `one`, `other` and `lora` have random weights.
        mmlu, gsm8k: small copies of the data sets.
        book: a plain text.
    """

    base: Path
    wide: Path
    short: Path
    mute: Path
    fresh: Path
    one: Path
    other: Path
    lora: Path
    mmlu: Path
    gsm8k: Path
    book: Path

    def who(self, *adapters: Path) -> list[object]:
        given = [part for adapter in adapters for part in ("--adapter", adapter)]
        return ["--model", self.base, "--bits", 32, *given]

    @property
    def what(self) -> list[object]:
        return ["--bench", CELL, "--bench-data", f"mmlu={self.mmlu}"]


@pytest.fixture(scope="module")
def things(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Things:
    from prefixtune_cli.recipe.schema import Lora, PrefixTuningPlus

    folder = tmp_path_factory.mktemp("eval")
    mute = Path(shutil.copytree(random_base, folder / "mute"))
    (mute / "chat_template.jinja").unlink()
    book = folder / "book.txt"
    book.write_text("It was a bright cold day in April. " * 60, encoding="utf-8")
    return Things(
        base=random_base,
        wide=save_base(folder / "wide", random_base, hidden_size=128, num_attention_heads=8),
        short=save_base(folder / "short", random_base, max_position_embeddings=64),
        mute=mute,
        fresh=save_adapter(folder / "fresh", random_base, PrefixTuningPlus()),
        one=save_adapter(folder / "one", random_base, PrefixTuningPlus(), seed=1),
        other=save_adapter(folder / "other", random_base, PrefixTuningPlus(), seed=2),
        lora=save_adapter(folder / "lora", random_base, Lora(method="lora", r=2), seed=3),
        mmlu=write_mmlu(folder / "mmlu", SUBJECTS, 24),
        gsm8k=write_gsm8k(folder / "gsm8k"),
        book=book,
    )


# Bad input: the command, the exit code, and words that the error must have.

Make = Callable[[Things, Path], list[object]]


def typed(*arguments: object) -> Make:
    return lambda things, folder: list(arguments)


def asked(*more: object) -> Make:
    """A whole command line with further arguments."""
    return lambda things, folder: [*things.who(), *things.what, *more]


def asked_of(adapter: str, base: str = "base") -> Make:
    return lambda things, folder: [
        "--model", getattr(things, base), "--bits", 32, "--adapter", getattr(things, adapter), *things.what,
    ]  # fmt: skip


def asked_on(*what: object) -> Make:
    return lambda things, folder: [*things.who(), *what]


def of_run(adapter: bool, *more: object) -> Make:
    def make(things: Things, folder: Path) -> list[object]:
        run = save_run(folder / "run", things.base, things.fresh if adapter else None)
        return ["--run", run, *things.what, *(getattr(things, str(m), m) for m in more)]

    return make


def pickled(things: Things, folder: Path) -> list[object]:
    adapter = Path(shutil.copytree(things.fresh, folder / "pickled"))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    return [*things.who(adapter), *things.what]


def copy_of_data(change: Callable[[Path], object], bench: str = CELL) -> Make:
    """The benchmark, on a changed copy of its data."""

    def make(things: Things, folder: Path) -> list[object]:
        name = "gsm8k" if bench == "gsm8k" else "mmlu"
        copy = Path(shutil.copytree(getattr(things, name), folder / name))
        change(copy)
        return [*things.who(), "--bench", bench, "--bench-data", f"{name}={copy}"]

    return make


def replace_line(file: str, number: int, line: str) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        lines = (folder / file).read_text(encoding="utf-8").splitlines()
        lines[number - 1] = line
        (folder / file).write_text("\n".join(lines) + "\n", encoding="utf-8")

    return change


def in_a_file(folder: Path) -> Path:
    file = folder / "file"
    file.touch()
    return file


def same_name(things: Things, folder: Path) -> list[object]:
    rows = [{"prompt": "a", "completion": "b"}]
    files = [write_rows(folder / part / "test.jsonl", rows) for part in ("a", "b")]
    return [*things.who(), *(part for file in files for part in ("--data", file))]


def empty_text(things: Things, folder: Path) -> list[object]:
    (folder / "empty.txt").write_text(" \n", encoding="utf-8")
    return [*things.who(), "--bench", "forgetting", "--text", folder / "empty.txt"]


BAD: dict[str, tuple[Make, int, list[str]]] = {
    "nothing to evaluate on": (
        lambda things, folder: things.who(),
        2,
        ["There is nothing to evaluate", "--bench NAME", "--data FILE"],
    ),
    "nobody to evaluate": (
        lambda things, folder: things.what,
        2,
        ["either --run FOLDER, or --model NAME"],
    ),
    "a run, and an adapter as its base": (
        lambda things, folder: ["--run", things.one, "--model", things.other, *things.what],
        2,
        ["is a run or an adapter, and so is", "Leave one out"],
    ),
    "a run and an adapter": (
        of_run(True, "--adapter", "fresh"),
        2,
        ["--run has its own adapter", "Leave --adapter out"],
    ),
    "no base, and no adapter": (
        asked("--no-base"),
        2,
        ["--no-base leaves nothing to evaluate", "--adapter"],
    ),
    "a pattern without --list": (typed("mmlu_an"), 2, ["'mmlu_an'", "ptp eval --list mmlu_an"]),
    "an unknown benchmark": (
        asked_on("--bench", "mmlu_anatomi"),
        2,
        ["no benchmark 'mmlu_anatomi'", "Did you mean mmlu_anatomy", "ptp eval --list"],
    ),
    "an unknown benchmark after a known one": (
        asked("--bench", "gsm9k"),
        2,
        ["no benchmark 'gsm9k'", "Did you mean gsm8k"],
    ),
    "an unknown name in --bench-data": (
        asked("--bench-data", "mmul=."),
        2,
        ["no benchmark 'mmul'", "Did you mean mmlu"],
    ),
    "--bench-data without =": (
        asked("--bench-data", "/data/mmlu"),
        2,
        ["--bench-data takes NAME=PATH", "mmlu=/data/mmlu", "got '/data/mmlu'"],
    ),
    "--bench-data of several data sets": (
        asked("--bench-data", "openllm=."),
        2,
        ["--bench-data openllm=.", "data sets", "--bench-data openai/gsm8k=…"],
    ),
    "a data folder that does not exist": (
        asked_on("--bench", CELL, "--bench-data", "mmlu=/no/such/mmlu"),
        1,
        ["The data of mmlu, /no/such/mmlu does not exist"],
    ),
    "a data folder without a split": (
        copy_of_data(lambda folder: shutil.rmtree(folder / "test")),
        1,
        [f"{CELL}: ", "no file of the split 'test'", "test/anatomy_test", "anatomy_dev.csv"],
    ),
    "a data folder without examples": (
        copy_of_data(lambda folder: shutil.rmtree(folder / "dev")),
        1,
        [f"{CELL}: ", "no file of the split 'dev'"],
    ),
    "a data folder of another subject": (
        copy_of_data(lambda folder: None, "mmlu_virology"),
        1,
        ["There is no subset 'virology'", "anatomy, astronomy"],
    ),
    "a row of MMLU that lacks a cell": (
        copy_of_data(replace_line("test/anatomy_test.csv", 3, "Which?,a,b,c,D")),
        1,
        ["test/anatomy_test.csv, line 3: 5 cells", "Which?,a,b,c,D"],
    ),
    "a row of MMLU with a wrong answer": (
        copy_of_data(replace_line("dev/anatomy_dev.csv", 2, "Which?,a,b,c,d,E")),
        1,
        ["dev/anatomy_dev.csv, line 2: 'answer' must be A, B, C or D", "'E'"],
    ),
    "a row of gsm8k that is no JSON": (
        copy_of_data(replace_line("test.jsonl", 4, '{"question": "How'), "gsm8k"),
        1,
        ["test.jsonl, line 4", '{"question": "How'],
    ),
    "a row of gsm8k without an answer": (
        copy_of_data(replace_line("train.jsonl", 5, '{"question": "How many?"}'), "gsm8k"),
        1,
        ["train.jsonl, line 5", "no column 'answer'"],
    ),
    "no data while offline": (
        asked_on("--bench", CELL),
        1,
        [f"{CELL} reads the data set cais/mmlu (anatomy)", f"--bench-data {CELL}=PATH"],
    ),
    "an adapter of another base": (
        asked_of("one", "wide"),
        1,
        ["does not fit the base", "2 layers with 4 heads", "2 layers with 8 heads", "--model"],
    ),
    "a LoRA of another base": (
        asked_of("lora", "wide"),
        1,
        ["The adapter in", "does not fit the base", "size mismatch", "--model"],
    ),
    "an adapter as a pickle": (
        pickled,
        1,
        ["pickled has no adapter_model.safetensors", "adapter_model.bin", "never read"],
    ),
    "an adapter folder without an adapter": (
        asked_of("mmlu"),
        1,
        ["holds no adapter (no adapter_config.json)"],
    ),
    "a run without an adapter": (of_run(False), 1, ["has no adapter yet", "--resume"]),
    "a folder that is no run": (
        lambda things, folder: ["--run", things.mmlu, *things.what],
        1,
        ["is not a run directory (it has no recipe.yaml)"],
    ),
    "an adapter that is named twice": (
        lambda things, folder: [*things.who(things.one, things.one), *things.what],
        2,
        ["An adapter is given twice", "Give each once"],
    ),
    "a limit of 0": (asked("--limit", 0), 2, ["--limit must be at least 1, got 0"]),
    "a negative limit": (asked("--limit", -3), 2, ["--limit must be at least 1, got -3"]),
    "more examples than there are": (
        asked("--num-fewshot", 6),
        2,
        [f"--num-fewshot 6 is more than the 5 examples that {CELL} has", "--num-fewshot 5 or less"],
    ),
    "a negative number of examples": (
        asked("--num-fewshot", -1),
        2,
        ["--num-fewshot must be 0 or more, got -1"],
    ),
    "a batch of nothing": (
        asked("--batch-size", 0),
        2,
        ["--batch-size must be auto, or a number of at least 1, got '0'"],
    ),
    "a batch size in letters": (
        asked("--batch-size", "abc"),
        2,
        ["--batch-size must be auto, or a number of at least 1, got 'abc'"],
    ),
    "five bits": (asked("--bits", 5), 2, ["model.bits must be 4, 8, 16 or 32, got 5"]),
    "a cache that is a file": (
        lambda things, folder: [*asked("--cache", in_a_file(folder))(things, folder)],
        1,
        ["Finished requests cannot be kept in", "--cache FOLDER", "--no-cache"],
    ),
    "a cache below a file": (
        lambda things, folder: [*asked("--cache", in_a_file(folder) / "cache")(things, folder)],
        1,
        ["Finished requests cannot be kept in", "--cache FOLDER", "--no-cache"],
    ),
    "a cache and none": (
        asked("--cache", "somewhere", "--no-cache"),
        2,
        ["--cache and --no-cache contradict each other"],
    ),
    "forgetting without a text": (
        asked_on("--bench", "forgetting"),
        2,
        ["--bench forgetting and --text FILE belong together"],
    ),
    "a text without forgetting": (
        lambda things, folder: [*asked("--text", things.book)(things, folder)],
        2,
        ["--bench forgetting and --text FILE belong together"],
    ),
    "an empty text": (empty_text, 1, ["empty.txt is empty"]),
    "a text that does not exist": (
        asked_on("--bench", "forgetting", "--text", "no-such.txt"),
        1,
        ["no-such.txt does not exist"],
    ),
    "a task that runs code": (
        asked_on("--bench", "humaneval"),
        2,
        ["humaneval runs code that the model writes", "--confirm-run-unsafe-code"],
    ),
    "a chat without a template": (
        lambda things, folder: ["--model", things.mute, *things.what, "--apply-chat-template"],
        2,
        ["mute has no chat template", "Leave --apply-chat-template out"],
    ),
    "two data sets of one name": (
        same_name,
        2,
        ["would both be written to data-test.json", "--out"],
    ),
    "own data that does not exist": (
        asked_on("--data", "no-such.jsonl"),
        1,
        ["no-such.jsonl does not exist"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error_before_the_base_loads(
    case: str, ptp: Ptp, things: Things, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # which has no runs
    make, expected_code, expected = BAD[case]
    given = make(things, tmp_path)
    out = tmp_path / "out"
    code, printed, said = ptp("eval", *given, "--out", out)
    assert code == expected_code, said
    assert printed == ""
    assert said.count("error: ") == 1, said
    for text in expected:
        assert text in said
    assert "Loading " not in said
    assert "Traceback" not in said
    assert not out.exists()


def test_the_command_that_the_bad_ones_are_made_from_is_good(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    code, _, said = ptp("eval", *asked()(things, tmp_path), "--out", tmp_path / "out")
    assert code == 0, said
    assert f"Loading {things.base}." in said.splitlines()


def subprocess_environment(**changed: str) -> dict[str, str]:
    return {**os.environ, **changed}


def test_without_a_network_the_hub_is_asked_once_and_the_error_shows_the_way(
    things: Things, tmp_path: Path
) -> None:
    typed = ["eval", *map(str, things.who()), "--bench", CELL, "--out", str(tmp_path / "out")]
    ended = subprocess.run(
        [sys.executable, "-m", "prefixtune_cli", *typed],
        env=subprocess_environment(HF_HUB_OFFLINE="0", HF_ENDPOINT="http://127.0.0.1:9"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 1
    assert "Retry" not in ended.stderr
    assert "cais/mmlu cannot be fetched: no network" in ended.stderr
    assert f"--bench-data {CELL}=PATH" in ended.stderr
    assert "Loading " not in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_refused_before_the_base_loads(
    ptp: Ptp, things: Things, full_disk: Path, tmp_path: Path
) -> None:
    code, _, said = ptp("eval", *asked("--cache", full_disk)(things, tmp_path))
    assert code == 1
    assert "Finished requests need" in said
    assert "MiB free" in said
    assert "--no-cache" in said
    assert "Loading " not in said


# --list

LISTS = """
import sys
sys.argv = ["ptp", "eval", "--list", "mmlu_an"]
from prefixtune_cli.cli.app import main
from tests.cli.conftest import Ptp
try:
    main()
except SystemExit as left:
    assert not left.code, left.code
assert "torch" not in sys.modules, "torch was imported"
"""


def test_the_list_of_benchmarks_is_found_without_torch() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", LISTS],
        env=subprocess_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    [row] = [row for row in ended.stdout.splitlines() if row.startswith("mmlu_anatomy ")]
    assert row.split() == ["mmlu_anatomy", "task", "multiple_choice", "cais/mmlu"]
    assert "gsm8k" not in ended.stdout


def test_the_list_takes_a_glob_and_prints_json(ptp: Ptp) -> None:
    code, printed, _ = ptp("eval", "--list", "mmlu_stem*", "--json")
    assert code == 0
    found = {row["name"]: row for row in json.loads(printed)}
    assert found["mmlu_stem"]["kind"] == "group"
    assert all(name.startswith("mmlu_stem") for name in found)


def test_the_list_has_our_own_benchmarks_too(ptp: Ptp) -> None:
    from prefixtune_cli.evaluate.settings import OWN_BENCHMARKS

    code, printed, _ = ptp("eval", "--list", "--json")
    assert code == 0
    names = [row["name"] for row in json.loads(printed)]
    assert names == sorted(names)
    assert {*OWN_BENCHMARKS} < {*names}
    for name in OWN_BENCHMARKS:
        code, printed, said = ptp("eval", "--list", name)
        assert code == 0, said
        assert printed.splitlines()[1].startswith(name)


def test_a_list_of_nothing_is_an_error_with_the_nearest_names(ptp: Ptp) -> None:
    code, printed, said = ptp("eval", "--list", "quikstart")
    assert (code, printed) == (2, "")
    assert "no benchmark 'quikstart'" in said
    assert "Did you mean quickstart" in said
    code, printed, said = ptp("eval", "--list", "no-such-*")
    assert (code, printed) == (2, "")
    assert "'no-such-*'" in said
    assert "Traceback" not in said


# What is printed


def results(printed: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(printed)["results"]
    return found


def cells(row: str) -> list[str]:
    """The cells of a table without rules: two or more spaces separate them."""
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


def test_the_table_has_base_adapter_difference_and_interval(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    typed = ["eval", *things.who(things.one), *things.what, "--out", tmp_path / "out"]
    code, printed, said = ptp(*typed)
    assert code == 0, said
    head, row = printed.splitlines()
    assert cells(head) == [
        "benchmark", "metric", "items", "base", "adapter", "difference", "95 % interval", "McNemar p",
    ]  # fmt: skip
    name, metric, items, base, adapter, difference, interval, p = cells(row)
    assert (name, metric, items) == (CELL, "acc", "24")
    shift = float(adapter.removesuffix(" %")) - float(base.removesuffix(" %"))
    assert float(difference) == pytest.approx(shift, abs=0.11)  # three rounded figures
    assert shift
    low, high = map(float, interval.strip("[]").split(", "))
    assert low <= float(difference) <= high
    assert 0 <= float(p) <= 1
    assert f"Written: {tmp_path / 'out' / 'eval' / CELL}.json" in said.replace("\n", "")


def test_a_model_alone_has_an_interval_of_its_own(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    code, printed, _ = ptp("eval", *things.who(), *things.what, "--out", tmp_path / "out")
    assert code == 0
    assert cells(printed.splitlines()[0])[3:] == ["base", "95 % interval"]
    typed = ["eval", *things.who(things.one), *things.what, "--out", tmp_path / "out"]
    code, printed, _ = ptp(*typed, "--no-base")
    assert code == 0
    assert cells(printed.splitlines()[0])[3:] == ["adapter", "95 % interval"]


def test_json_is_all_that_stands_on_stdout(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    typed = ["eval", *things.who(things.one), *things.what, "--out", tmp_path / "out"]
    code, printed, said = ptp(*typed, "--json")
    assert code == 0, said
    whole = json.loads(printed)
    assert whole["failures"] == {}
    assert whole["written"] == [str(tmp_path / "out" / "eval" / f"{CELL}.json")]
    [found] = whole["results"]
    assert found["bench"] == CELL
    [line] = found["lines"]
    assert set(line["values"]) == {"base", "adapter"}
    difference = line["differences"]["adapter"]
    assert difference["value"] == pytest.approx(line["values"]["adapter"] - line["values"]["base"])
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert difference["low"] < difference["high"]
    assert {"lm_eval", "torch", "prefixtune-cli"} <= set(found["versions"])
    assert "items" not in found  # only the file has them


def test_markdown_is_a_table_of_rows_with_as_many_cells_as_the_head(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    data = write_rows(tmp_path / "a|b.jsonl", [{"prompt": "a", "completion": "b"}] * 3)
    typed = ["eval", *things.who(things.one, things.lora), *things.what, "--data", data]
    code, printed, said = ptp(*typed, "--out", tmp_path / "out", "--markdown")
    assert code == 0, said
    rows = [line.replace(r"\|", "/") for line in printed.splitlines()]
    assert all(row.startswith("| ") and row.endswith(" |") for row in rows)
    table = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert {len(row) for row in table} == {len(table[0])}
    head, rule, *body = table
    assert head[:6] == ["benchmark", "metric", "items", "base", "one", "difference"]
    assert "lora" in head
    assert {*rule} == {"---", "---:"}
    assert [row[0] for row in body][-1] == CELL
    assert body[0][0] == "data-a/b"


def test_a_group_folds_its_tasks_unless_all_are_wanted(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    from prefixtune_cli.evaluate.catalogue import load_catalogue

    tasks = load_catalogue().tasks("mmlu_stem")
    assert len(tasks) == 19
    data = write_mmlu(tmp_path / "stem", [str(task.subset) for task in tasks], 3)
    typed = ["eval", *things.who(things.one), "--bench", "mmlu_stem", "--num-fewshot", 1]
    typed += ["--bench-data", f"mmlu={data}", "--out", tmp_path / "out", "--limit", 2]
    code, printed, said = ptp(*typed)
    assert code == 0, said
    assert [cells(row)[:3] for row in printed.splitlines()[1:]] == [["mmlu_stem", "acc", "38"]]
    assert "19 lines of single tasks are folded; --all shows them." in said
    code, printed, said = ptp(*typed, "--all")
    assert code == 0
    assert "folded" not in said
    rows = printed.splitlines()[1:]
    assert {cells(row)[0] for row in rows} == {"mmlu_stem", *(task.name for task in tasks)}
    assert all(row.startswith("  mmlu_") for row in rows[1:])
    code, printed, _ = ptp(*typed, "--json")
    group, *its = results(printed)[0]["lines"]
    for who in ("base", "adapter"):
        mean = sum(line["values"][who] for line in its) / len(its)
        assert group["values"][who] == pytest.approx(mean)


def test_a_fresh_adapter_differs_by_nothing(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    data = write_rows(
        tmp_path / "own.jsonl",
        ({"prompt": f"Number {i}?", "completion": f"It is {i}."} for i in range(6)),
    )
    what = [*things.what, "--data", data, "--bench", "forgetting", "--text", things.book]
    typed = ["eval", *things.who(things.fresh), *what, "--out", tmp_path / "out"]
    code, printed, said = ptp(*typed, "--no-cache", "--json")
    assert code == 0, said
    found = results(printed)
    assert [result["bench"] for result in found] == ["data-own", CELL, "forgetting"]
    for result in found:
        for line in result["lines"]:
            assert line["values"]["adapter"] == line["values"]["base"]
            difference = line["differences"]["adapter"]
            assert [difference[name] for name in ("value", "low", "high")] == [0, 0, 0]


def test_several_adapters_make_several_columns_and_each_is_as_it_is_alone(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    adapters = (things.one, things.lora, things.other)
    data = write_rows(
        tmp_path / "own.jsonl",
        ({"text": f"Once upon a time there were {i} bears."} for i in range(5)),
    )
    rest = ["--data", data, "--no-cache", "--out", tmp_path / "out"]
    code, printed, said = ptp("eval", *things.who(*adapters), *rest)
    assert code == 0, said
    columns = [part for a in adapters for part in (a.name, "difference", "95 % interval")]
    assert cells(printed.splitlines()[0]) == ["benchmark", "metric", "items", "base", *columns]
    _, printed, _ = ptp("eval", *things.who(*adapters), *rest, "--json")
    together = results(printed)[0]["lines"][0]["values"]
    assert len({*together.values()}) == 4
    for adapter in adapters:
        _, printed, _ = ptp("eval", *things.who(adapter), *rest, "--json")
        alone = results(printed)[0]["lines"][0]["values"]
        assert alone == {"base": together["base"], "adapter": together[adapter.name]}


def test_a_benchmark_that_fails_leaves_the_others_alone(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    # gsm8k asks for 256 tokens, but this model takes only 64.
    typed = ["eval", "--model", things.short, "--bits", 32, "--bench", f"gsm8k,{CELL}"]
    typed += ["--bench-data", f"mmlu={things.mmlu}", "--bench-data", f"gsm8k={things.gsm8k}"]
    typed += ["--num-fewshot", 0, "--limit", 2, "--out", tmp_path / "out"]
    code, printed, said = ptp(*typed)
    assert code == 1
    assert "gsm8k failed: " in said
    assert "Traceback" not in said
    assert [cells(row)[0] for row in printed.splitlines()] == ["benchmark", CELL]
    assert [file.name for file in (tmp_path / "out" / "eval").iterdir()] == [f"{CELL}.json"]
    code, printed, _ = ptp(*typed, "--json")
    assert code == 1
    assert list(json.loads(printed)["failures"]) == ["gsm8k"]
    assert [result["bench"] for result in results(printed)] == [CELL]


# What is written


def test_the_result_holds_settings_versions_hashes_and_every_item(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    from prefixtune_cli.evaluate.subjects import hash_of_folder

    typed = ["eval", *things.who(things.one), *things.what, "--limit", 7, "--num-fewshot", 2]
    code, _, said = ptp(*typed, "--batch-size", 3, "--out", tmp_path / "out")
    assert code == 0, said
    record = json.loads((tmp_path / "out" / "eval" / f"{CELL}.json").read_text(encoding="utf-8"))
    settings = record["settings"]
    assert (settings["limit"], settings["num_fewshot"], settings["batch_size"]) == (7, 2, 3)
    assert settings["bench_data"] == {"mmlu": str(things.mmlu)}
    assert record["model"]["name"] == str(things.base)
    assert record["model"]["bits"] == 32
    assert all(record["versions"].values())
    assert record["model"]["sha256"] == hash_of_folder(things.base)
    assert record["subjects"] == [
        {"name": "base", "folder": None, "sha256": hash_of_folder(things.base)},
        {"name": "adapter", "folder": str(things.one), "sha256": hash_of_folder(things.one)},
    ]
    task = record["tasks"][CELL]
    assert (task["dataset"], task["subset"]) == ("cais/mmlu", "anatomy")
    assert (task["num_fewshot"], task["items"], task["of"]) == (2, 7, 24)
    items = record["items"][CELL]["acc,none"]
    assert items["document"] == list(range(7))
    for who in ("base", "adapter"):
        assert {*items[who]} <= {0, 1}
        assert sum(items[who]) / 7 == pytest.approx(record["lines"][0]["values"][who])


def test_own_data_is_mapped_and_its_answers_lie_beside_the_result_of_the_run(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    run = save_run(tmp_path / "run", things.base, things.one)
    colours = ("red", "blue")
    data = write_rows(
        tmp_path / "mine.jsonl", ({"q": f"Say {c}.", "a": c} for c in colours for _ in range(4))
    )
    typed = ["eval", "--run", run, "--data", data, "--map", "prompt=q,completion=a"]
    code, printed, said = ptp(*typed)
    assert code == 0, said
    metrics = [cells(row)[1] for row in printed.splitlines()[1:]]
    assert metrics == ["loss", "perplexity", "accuracy", "macro-F1"]
    assert "An answer is right if" in said  # the rule
    written = {file.name for file in (run / "eval").iterdir()}
    stem = "data-mine"
    assert written == {f"{stem}.json", f"{stem}.answers.jsonl", f"{stem}.confusion.png"}
    lines = (run / "eval" / f"{stem}.answers.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line) for line in lines]
    assert [row["prompt"] for row in answers] == [f"Say {c}." for c in colours for _ in range(4)]
    assert all(set(row["answers"]) == {"base", "adapter"} for row in answers)
    record = json.loads((run / "eval" / f"{stem}.json").read_text(encoding="utf-8"))
    assert record["data"]["rows"] == record["data"]["evaluated"] == 8
    assert len(record["data"]["sha256"]) == 64
    assert all(set(item["right"]) == {"base", "adapter"} for item in record["items"])


def test_the_quickstart_is_on_the_sample_tasks(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    typed = ["eval", *things.who(things.one), "--bench", "quickstart", "--limit", 3]
    code, printed, said = ptp(*typed, "--out", tmp_path / "out", "--json")
    assert code == 0, said
    lines = results(printed)[0]["lines"]
    assert {line["name"] for line in lines} == {"intents", "records"}
    written = {file.name for file in (tmp_path / "out" / "eval").iterdir()}
    assert "quickstart.json" in written
    assert "quickstart.intents.answers.jsonl" in written


def test_forgetting_writes_its_change_of_loss(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    typed = ["eval", *things.who(things.one), "--bench", "forgetting", "--text", things.book]
    code, printed, said = ptp(*typed, "--out", tmp_path / "out", "--json")
    assert code == 0, said
    metrics = {line["metric"]: line for line in results(printed)[0]["lines"]}
    assert set(metrics) == {"loss", "perplexity", "bits per byte"}
    assert metrics["loss"]["differences"]["adapter"]["value"] != 0
    assert (tmp_path / "out" / "eval" / "forgetting.json").exists()


def test_a_run_names_its_benchmark_data_in_its_recipe(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    evaluate = {"bench_data": {"mmlu": str(things.mmlu)}}
    run = save_run(tmp_path / "run", things.base, things.one, evaluate=evaluate)
    code, _, said = ptp("eval", "--run", run, "--bench", CELL, "--limit", 2)
    assert code == 0, said
    assert (run / "eval" / f"{CELL}.json").exists()
    # A flag wins over the recipe.
    typed = ["eval", "--run", run, "--bench", CELL, "--bench-data", "mmlu=/no/such/mmlu"]
    code, _, said = ptp(*typed)
    assert code == 1
    assert "/no/such/mmlu does not exist" in said


def test_a_run_of_whole_weights_is_compared_with_its_base(
    ptp: Ptp, things: Things, tmp_path: Path
) -> None:
    whole = save_base(tmp_path / "whole", things.base, initializer_range=0.2)
    run = save_run(tmp_path / "run", things.base, whole, adapter={"method": "full"})
    rest = ["--bench", "forgetting", "--text", things.book, "--no-cache", "--json"]
    code, printed, said = ptp("eval", "--run", run, *rest)
    assert code == 0, said
    together = results(printed)[0]["lines"][0]["values"]
    assert together["base"] != together["adapter"]
    rest += ["--out", tmp_path / "out"]
    for who, model in (("base", things.base), ("adapter", whole)):
        _, printed, _ = ptp("eval", "--model", model, "--bits", 32, *rest)
        assert results(printed)[0]["lines"][0]["values"] == {"base": together[who]}


def test_the_chat_template_changes_the_prompts(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    prompts = []
    for how in ([], ["--apply-chat-template"]):
        typed = ["eval", *things.who(), *things.what, "--limit", 2, "--out", tmp_path / "out"]
        code, printed, said = ptp(*typed, *how, "--json")
        assert code == 0, said
        task = results(printed)[0]["tasks"][CELL]
        prompts.append((task["rows_sha256"], task["prompts_sha256"]))
    assert prompts[0][0] == prompts[1][0]
    assert prompts[0][1] != prompts[1][1]


def test_a_base_of_four_bits_is_evaluated(ptp: Ptp, things: Things, tmp_path: Path) -> None:
    typed = ["eval", *things.who(things.fresh), *things.what, "--out", tmp_path / "out", "--json"]
    code, printed, said = ptp(*typed, "--bits", 4)
    assert code == 0, said
    [found] = results(printed)
    assert found["model"]["bits"] == 4
    [line] = found["lines"]
    assert line["differences"]["adapter"]["value"] == 0


def test_after_a_short_quickstart_its_gain_shows_with_an_interval_that_leaves_out_zero(
    ptp: Ptp, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rows = ["--set", "evaluate.max_rows=20"]
    code, _, said = ptp(
        "train", "--recipe", "quickstart", "--bits", 32, "--steps", 60, *rows, "--out", run
    )
    assert code == 0, said
    code, printed, said = ptp(
        "eval", "--run", run, "--bench", "quickstart", "--limit", 60, "--json"
    )
    assert code == 0, said
    [found] = results(printed)
    intents = next(line for line in found["lines"] if line["name"] == "intents")
    assert intents["metric"] == "loss"
    gain = intents["differences"]["adapter"]
    assert gain["low"] < gain["value"] < gain["high"] < 0
    assert (run / "eval" / "quickstart.json").exists()


@pytest.mark.skipif(not REAL_MMLU.exists(), reason="the real MMLU is not beside the project")
def test_the_real_mmlu_runs_over_57_subjects_without_a_network(ptp: Ptp, tmp_path: Path) -> None:
    code, printed, said = ptp(
        "eval", "--model", "tiny", "--bits", 32, "--bench", "mmlu",
        "--bench-data", f"mmlu={REAL_MMLU}", "--limit", 5, "--no-cache", "--out", tmp_path, "--json",
    )  # fmt: skip
    assert code == 0, said
    [found] = results(printed)
    assert found["lines"][0]["name"] == "mmlu"
    assert found["lines"][0]["items"] == 285
    assert len(found["tasks"]) == 57
    assert [line["depth"] for line in found["lines"]].count(2) == 57

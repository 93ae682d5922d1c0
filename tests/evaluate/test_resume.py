"""Interrupted evaluations ask nothing twice, and changed adapters read no old answers."""

import json
import signal
import sqlite3
import time
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import Preempted
from prefixtune_cli.evaluate.run import Found, _kept_apart, evaluate
from prefixtune_cli.evaluate.settings import Settings
from prefixtune_cli.pointed import Pointed, choose
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import Lora, PrefixTuningPlus
from tests.cli.test_eval import save_adapter, write_mmlu, write_rows
from tests.train.zygote import Command, Start

BENCH = "mmlu_anatomy"
ITEMS = 60
REQUESTS = 4 * ITEMS  # one a choice

Kept = dict[str, dict[str, tuple[int, str]]]  # file → request → (row id, answer)


def read(cache: Path) -> Kept:
    """All finished requests. A rewritten row gets another id, so an equal id was not asked again."""
    found: Kept = {}
    for file in sorted(cache.glob("*.sqlite")):
        with closing(sqlite3.connect(file)) as database:
            rows = database.execute("SELECT key, rowid, answer FROM answers")
            found[file.name] = {key: (row, answer) for key, row, answer in rows}
    return found


def counts(cache: Path) -> list[int]:
    """The number of requests in each file, read while another process writes them."""
    found = []
    for file in cache.glob("*.sqlite"):
        with (
            suppress(sqlite3.OperationalError),  # locked, or still without its table
            closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database,
        ):
            found += database.execute("SELECT count(*) FROM answers").fetchone()
    return sorted(found)


def wait_for(run: Command, cache: Path, files: int, answers: int) -> None:
    """Until `files` have answers, the last one at least so many."""
    deadline = time.monotonic() + 120
    while len(there := counts(cache)) < files or there[0] < answers:
        assert run.poll() is None, run.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def finish(run: Command) -> str:
    """What it says on stderr."""
    _, said = run.communicate(timeout=300)
    assert run.returncode == 0, said
    return said


def result(out: Path) -> dict[str, Any]:
    """The figures, and every item of every model."""
    record = json.loads((out / "eval" / f"{BENCH}.json").read_text(encoding="utf-8"))
    return {name: record[name] for name in ("lines", "tasks", "items", "subjects")}


def answers_of(kept: Kept) -> dict[str, dict[str, str]]:
    return {file: {key: its[1] for key, its in rows.items()} for file, rows in kept.items()}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter with random weights, on `tiny`."""
    return save_adapter(
        tmp_path_factory.mktemp("tiny") / "adapter", Path("tiny"), PrefixTuningPlus(), seed=1
    )


def test_a_killed_evaluation_asks_only_for_what_is_missing(
    start: Start, adapter: Path, tmp_path: Path
) -> None:
    data = write_mmlu(tmp_path / "mmlu", ["anatomy"], ITEMS)
    evaluate(
        Settings(
            who_of("tiny", adapter),
            benches=(BENCH,),
            bench_data={"mmlu": str(data)},
            batch_size=1,
            cache=tmp_path / "cache-whole",
            out=tmp_path / "whole",
        )
    )
    typed = ["eval", "--model", "tiny", "--bits", 32, "--adapter", adapter, "--bench", BENCH]
    typed += ["--bench-data", f"mmlu={data}", "--batch-size", 1]
    typed += ["--cache", tmp_path / "cache-killed", "--out", tmp_path / "killed"]

    cache = tmp_path / "cache-killed"
    run = start(*typed)
    wait_for(run, cache, files=2, answers=40)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    kept = read(cache)
    partial, whole = sorted(map(len, kept.values()))
    assert 40 <= partial < REQUESTS, "killed too late to tell"
    assert whole == REQUESTS
    assert not (tmp_path / "killed" / "eval").exists()

    said = finish(start(*typed))
    assert f"{BENCH}, base" not in said  # nothing was left to do
    assert f"{BENCH}, adapter {REQUESTS}/{REQUESTS}" in said
    after = read(cache)
    for file, rows in kept.items():
        assert {key: after[file][key] for key in rows} == rows
    assert answers_of(after) == answers_of(read(tmp_path / "cache-whole"))
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_ctrl_c_keeps_what_is_done_and_says_that_the_same_command_goes_on(
    start: Start, tmp_path: Path
) -> None:
    data = write_rows(
        tmp_path / "own.jsonl",
        ({"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(400)),
    )
    cache, out = tmp_path / "cache", tmp_path / "out"
    typed = ["eval", "--model", "tiny", "--data", data, "--batch-size", 1]
    typed += ["--cache", cache, "--out", out]
    run = start(*typed)
    wait_for(run, cache, files=1, answers=20)
    run.send_signal(signal.SIGINT)
    printed, said = run.communicate(timeout=60)
    assert run.returncode == 130, said
    assert printed == ""
    assert "error: " not in said
    assert "Finished requests are kept: the same command continues where this one stopped" in said
    assert "Traceback" not in said
    [rows] = read(cache).values()
    assert 20 <= len(rows) < 800  # one loss and one answer for each row
    assert not out.exists()


# An adapter that is trained again into the same folder, and one that was only moved.


@pytest.fixture
def settings(random_base: Path, tmp_path: Path) -> Settings:
    return Settings(
        who_of(random_base),
        benches=(BENCH,),
        bench_data={"mmlu": str(write_mmlu(tmp_path / "mmlu", ["anatomy"], 12))},
        data=(str(write_rows(tmp_path / "own.jsonl", [{"text": "Once upon a time."}] * 3)),),
        cache=tmp_path / "cache",
        out=tmp_path / "out",
    )


def who_of(base: Path | str, *adapters: Path, bits: int = 32) -> tuple[Pointed, ...]:
    given = list(map(str, adapters))
    return tuple(choose(model=str(base), adapters=given, typed={"bits": bits}))


def losses(settings: Settings) -> dict[str, float]:
    """The loss on the user's data, which any change of the weights changes, unlike an accuracy."""
    found = evaluate(settings)
    assert found.failures == {}
    [line] = [line for line in found.outcomes[0].lines if line.metric == "loss"]
    return dict(line.values)


@pytest.mark.parametrize(
    "section",
    [
        pytest.param(PrefixTuningPlus(), id="prefix-tuning-plus"),
        pytest.param(Lora(method="lora", r=2), id="lora"),
    ],
)
def test_a_changed_adapter_reads_no_old_answer_and_the_base_reads_all_of_its(
    section: Any, random_base: Path, tmp_path: Path, settings: Settings
) -> None:
    cache = tmp_path / "cache"
    adapter = save_adapter(tmp_path / "adapter", random_base, section, seed=1)
    settings = replace(settings, who=who_of(random_base, adapter))
    first = losses(settings)
    before = read(cache)
    assert len(before) == 2  # those of the base and of the adapter
    save_adapter(tmp_path / "adapter", random_base, section, seed=2)
    second = losses(settings)
    after = read(cache)
    assert second["base"] == first["base"] != second["adapter"] != first["adapter"]
    # The old files are unchanged, and one new file has an answer to every request.
    assert {file: after[file] for file in before} == before
    [new] = [rows for file, rows in after.items() if file not in before]
    answers = [{key: its[1] for key, its in rows.items()} for rows in (*before.values(), new)]
    assert [set(its) for its in answers] == [set(answers[0])] * 3
    assert all(answers[0] != other for other in answers[1:])
    assert answers[1] != answers[2]
    # The first weights again, at any place, are the first adapter again.
    moved = save_adapter(tmp_path / "moved", random_base, section, seed=1)
    again = losses(replace(settings, who=who_of(random_base, moved)))
    assert again == first
    assert read(cache) == after


def test_another_precision_of_the_base_reads_no_old_answer(
    random_base: Path, tmp_path: Path, settings: Settings
) -> None:
    at_32 = losses(settings)
    at_16 = losses(replace(settings, who=who_of(random_base, bits=16)))
    assert at_32 != at_16
    files = read(tmp_path / "cache")
    assert len({*map(len, files.values())}) == 1
    assert len(files) == 2


def test_without_a_cache_nothing_is_kept(tmp_path: Path, settings: Settings) -> None:
    kept = losses(settings)
    assert losses(replace(settings, cache=None)) == kept
    before = read(tmp_path / "cache")
    assert losses(settings) == kept
    assert read(tmp_path / "cache") == before


def test_a_signal_is_no_failure_of_the_evaluation_that_it_ends() -> None:
    found = Found([], [], {})
    with pytest.raises(Preempted), _kept_apart("mmlu", found, Silent(), True):
        raise Preempted("Stopped by SIGTERM.")
    assert found.failures == {}

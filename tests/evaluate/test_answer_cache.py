"""Finished requests: a request is never asked twice, and another subject never reads its answer."""

import json
import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import ResourceError
from prefixtune_cli.evaluate.answer_cache import AnswerCache, check_room, default_folder, digest

SUBJECT = {"base": "b1", "bits": 16, "adapter": "a1", "task": {"version": 2}}
Answers = Iterator[dict[int, Any]]


class Asked:
    """Answers with the request's index, and remembers what was asked."""

    def __init__(self, value: Callable[[int], Any] = lambda i: i) -> None:
        self.value = value
        self.missing: list[int] = []

    def __call__(self, missing: list[int]) -> Answers:
        self.missing += missing
        for i in missing:
            yield {i: self.value(i)}


def refuse(missing: list[int]) -> Answers:
    raise AssertionError(f"asked again for {missing}")


def script(body: str, *arguments: object, before: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Another process, with all imports of this module."""
    head = (
        "import json, os, signal, sys, time\nfrom pathlib import Path\n"
        "from prefixtune_cli.errors import ResourceError\n"
        "from prefixtune_cli.evaluate.answer_cache import AnswerCache\n"
        "folder = Path(sys.argv[1])\n"
    )
    return subprocess.Popen(
        [*before, sys.executable, "-c", head + body, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_only_missing_requests_are_asked_for(tmp_path: Path) -> None:
    first = Asked(lambda i: f"answer {i}")
    assert AnswerCache(tmp_path, SUBJECT).complete(["a", "b"], first) == ["answer 0", "answer 1"]
    second = Asked(lambda i: f"another {i}")
    found = AnswerCache(tmp_path, SUBJECT).complete(["c", "b", "d", "a"], second)
    assert second.missing == [0, 2]
    assert found == ["another 0", "answer 1", "another 2", "answer 0"]
    assert AnswerCache(tmp_path, SUBJECT).complete([*"abcd"], refuse) == [
        "answer 0", "answer 1", "another 0", "another 2",
    ]  # fmt: skip
    assert AnswerCache(tmp_path, SUBJECT).complete([], refuse) == []


def test_equal_requests_share_a_kept_answer(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    cache.complete([{"a": 1, "b": 2}], Asked())
    assert cache.complete([{"b": 2, "a": 1}, {"a": 1, "b": 2}], refuse) == [0, 0]


def test_an_answer_that_is_null_is_an_answer(tmp_path: Path) -> None:
    AnswerCache(tmp_path, SUBJECT).complete(["a"], Asked(lambda i: None))
    assert AnswerCache(tmp_path, SUBJECT).complete(["a"], refuse) == [None]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError, MemoryError])
def test_what_was_kept_before_an_exception_is_there_after_it(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def answer(missing: list[int]) -> Answers:
        yield {3: "three", 0: "zero"}
        yield {1: "one"}
        raise error

    cache = AnswerCache(tmp_path, SUBJECT)
    with pytest.raises(error):
        cache.complete([*"abcde"], answer)
    rest = Asked(lambda i: f"late {i}")
    found = cache.complete([*"abcde"], rest)
    assert rest.missing == [2, 4]
    assert found == ["zero", "one", "late 2", "three", "late 4"]


def test_an_answer_that_cannot_be_written_down_takes_no_other_with_it(tmp_path: Path) -> None:
    def answer(missing: list[int]) -> Answers:
        yield {0: "kept"}
        yield {1: "half of a batch", 2: object()}

    with pytest.raises(TypeError):
        AnswerCache(tmp_path, SUBJECT).complete([*"abc"], answer)
    rest = Asked()
    assert AnswerCache(tmp_path, SUBJECT).complete([*"abc"], rest) == ["kept", 1, 2]
    assert rest.missing == [1, 2]


def test_what_was_kept_survives_a_killed_process(tmp_path: Path) -> None:
    killed = script(
        "def answer(missing):\n"
        "    yield {0: 'zero', 1: 'one'}\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "AnswerCache(folder, {'adapter': 'a'}).complete([*'abc'], answer)\n",
        tmp_path,
    )
    _, said = killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL, said
    rest = Asked()
    assert AnswerCache(tmp_path, {"adapter": "a"}).complete([*"abc"], rest) == ["zero", "one", 2]
    assert rest.missing == [2]


@pytest.mark.parametrize(
    "change",
    [
        {"adapter": "a2"},
        {"adapter": None},
        {"base": "b2"},
        {"bits": 4},
        {"bits": "16"},
        {"task": {"version": 3}},
        {"limit": None},
    ],
)
def test_another_subject_never_reads_old_answers(tmp_path: Path, change: Mapping[str, Any]) -> None:
    AnswerCache(tmp_path, SUBJECT).complete(["a"], Asked(lambda i: "old"))
    asked = Asked(lambda i: "new")
    assert AnswerCache(tmp_path, {**SUBJECT, **change}).complete(["a"], asked) == ["new"]
    assert asked.missing == [0]
    assert AnswerCache(tmp_path, SUBJECT).complete(["a"], refuse) == ["old"]
    assert len([*tmp_path.iterdir()]) == 2


def test_a_subject_does_not_depend_on_the_order_of_its_settings(tmp_path: Path) -> None:
    AnswerCache(tmp_path, SUBJECT).complete(["a"], Asked())
    turned = dict(reversed(SUBJECT.items()))
    assert AnswerCache(tmp_path, turned).complete(["a"], refuse) == [0]


def test_floats_and_texts_survive_exactly(tmp_path: Path) -> None:
    floats = [0.1 + 0.2, -1 / 3, -0.0, 5e-324, 1.7976931348623157e308, -math.inf, math.nan]
    texts = ["", "Tromsø 日本語 🙂", "a\x00b\r\n\u2028\t", "alone \ud800", '"\\', "x" * 10**6]
    answers = [*floats, *texts, [-12.5, True], {"ø": [None, 2**70]}]
    requests = [*range(len(answers))]
    fresh = AnswerCache(tmp_path, SUBJECT).complete(requests, Asked(lambda i: answers[i]))
    kept = AnswerCache(tmp_path, SUBJECT).complete(requests, refuse)
    assert [*map(repr, kept)] == [*map(repr, fresh)] == [*map(repr, answers)]


def test_requests_of_any_text_are_told_apart(tmp_path: Path) -> None:
    requests = [
        "\ud800", "\udc00", "\\ud800", "?", "é", "e\u0301", "", " ", "1", 1, 1.0, True, None,
        ["a", "b"], ["ab"], ["a", ["b"]], {"a": "b"}, "日" * 10_000, "日" * 9_999,
    ]  # fmt: skip
    assert len({digest(request) for request in requests}) == len(requests)
    AnswerCache(tmp_path, SUBJECT).complete(requests, Asked())
    assert AnswerCache(tmp_path, SUBJECT).complete(requests, refuse) == [*range(len(requests))]


def test_without_a_folder_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        asked = Asked(lambda i: f"answer {i}")
        assert AnswerCache(None, SUBJECT).complete(["a", "a"], asked) == ["answer 0", "answer 1"]
        assert asked.missing == [0, 1]
    assert [*tmp_path.iterdir()] == []


def test_finished_requests_lie_beside_the_hubs_own_files() -> None:
    assert default_folder().is_relative_to(os.environ["HF_HOME"])


# A disk that is full

FILLS = """
import resource
how, asked = sys.argv[2], []

def full():
    if how == "limit":  # no file may grow: a genuine error of the disk, without a disk of its own
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        return
    with open(folder / "filler", "wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(512))
        except OSError:
            pass

def empty():
    if how == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        (folder / "filler").unlink()

def answer(missing):
    yield {i: f"early {i}" for i in missing[:20]}
    full()
    for i in missing[20:]:
        yield {i: "late" * 200}

def attempt(subject, requests, answer):
    try:
        return AnswerCache(folder, subject).complete(requests, answer)
    except ResourceError as error:
        return str(error)

requests = [f"request {i}" for i in range(200)]
told = attempt({"adapter": "a"}, requests, answer)
other = attempt({"adapter": "b"}, requests, answer)
read = attempt({"adapter": "a"}, requests[:20], lambda missing: asked.append("again"))
empty()
def rest(missing):
    asked.append(missing)
    yield {i: f"rest {i}" for i in missing}
whole = attempt({"adapter": "a"}, requests, rest)
print(json.dumps({"told": told, "other": other, "read": read, "asked": asked, "whole": whole}))
"""
TINY_DISK = (
    "unshare", "--map-root-user", "--mount", "sh", "-c",
    'mount -t tmpfs -o size=128k tmpfs "$4" && exec "$@"', "sh",
)  # fmt: skip


def can_mount(folder: Path) -> bool:
    """Whether a user may mount a file system that only their own process sees."""
    if shutil.which("unshare") is None:
        return False
    arguments = [*TINY_DISK, "true", "-c", "", str(folder)]
    return subprocess.run(arguments, capture_output=True).returncode == 0


@pytest.mark.parametrize("how", ["limit", "tmpfs"])
def test_a_full_disk_is_told_and_what_was_kept_stays_readable(tmp_path: Path, how: str) -> None:
    if how == "tmpfs" and not can_mount(tmp_path):
        pytest.skip("a tmpfs cannot be mounted here")
    process = script(FILLS, tmp_path, how, before=TINY_DISK if how == "tmpfs" else ())
    out, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    found = json.loads(out)
    reason = {"limit": "disk I/O error", "tmpfs": "database or disk is full"}[how]
    for told in (found["told"], found["other"]):
        assert reason in told
        assert str(tmp_path) in told
        assert "Free space" in told and "--cache FOLDER" in told and "--no-cache" in told
    assert found["read"] == [f"early {i}" for i in range(20)]  # while the disk is full
    [missing] = found["asked"]
    assert set(missing) <= set(range(20, 200))
    assert missing
    late = {i: f"rest {i}" if i in missing else "late" * 200 for i in range(20, 200)}
    assert found["whole"] == found["read"] + [*late.values()]


# Files and folders that cannot be used


def test_a_file_that_is_no_database_is_refused_and_left_alone(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    assert cache.file is not None
    for content in (b"not a database, but a text that somebody put there\n" * 50, b"SQLite"):
        cache.file.write_bytes(content)
        with pytest.raises(ResourceError, match="file is not a database") as caught:
            cache.complete(["a"], refuse)
        assert str(cache.file) in str(caught.value)
        assert "Remove it" in str(caught.value) and "--no-cache" in str(caught.value)
        assert cache.file.read_bytes() == content


def test_a_database_that_is_damaged_in_its_middle_is_refused(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    requests = [*range(500)]
    cache.complete(requests, lambda missing: [{i: f"answer {i}" * 20 for i in missing}])
    assert cache.file is not None
    content = cache.file.read_bytes()
    cache.file.write_bytes(content[:8192] + b"\xa5" * (len(content) - 8192))
    with pytest.raises(ResourceError, match="malformed"):
        cache.complete(requests, refuse)


def test_a_database_of_another_program_is_refused(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    assert cache.file is not None
    with sqlite3.connect(cache.file) as database:
        database.execute("CREATE TABLE answers (question TEXT)")
    database.close()
    with pytest.raises(ResourceError, match="no such column"):
        cache.complete(["a"], refuse)


def test_a_folder_in_place_of_the_file_is_refused(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    assert cache.file is not None
    cache.file.mkdir()
    with pytest.raises(ResourceError, match="unable to open database file"):
        cache.complete(["a"], refuse)


def test_there_is_room_for_a_usual_evaluation_and_nothing_is_left_behind(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "finished"
    for _ in range(2):
        check_room(folder, 1000)
    assert [*folder.iterdir()] == []


def test_more_requests_than_the_disk_holds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"need [\d,]+\.\d MiB in .*, which has [\d,]+") as told:
        check_room(tmp_path, 10**15)
    assert "--cache FOLDER" in str(told.value) and "--no-cache" in str(told.value)


@pytest.mark.parametrize("place", ["file", "file/below", "file/below/further"])
def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("here")
    folder = tmp_path / place
    reason = "File exists" if place == "file" else "Not a directory"
    with pytest.raises(ResourceError, match=reason) as caught:
        check_room(folder, 1)
    assert f"cannot be kept in {folder}" in str(caught.value)
    assert "--cache FOLDER" in str(caught.value) and "--no-cache" in str(caught.value)
    with pytest.raises(ResourceError, match=reason):
        AnswerCache(folder, SUBJECT).complete(["a"], refuse)
    assert (tmp_path / "file").read_text() == "here"


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a place where even root may not")
def test_a_folder_that_may_not_be_written_to_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"cannot be kept in /proc/self: ") as caught:
        check_room(Path("/proc/self"), 1)
    assert "--no-cache" in str(caught.value)


# Several at once


def test_a_file_that_another_process_writes_to_is_waited_for(tmp_path: Path) -> None:
    cache = AnswerCache(tmp_path, SUBJECT)
    cache.complete(["a"], Asked())
    assert cache.file is not None
    other = sqlite3.connect(cache.file, check_same_thread=False, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    other.execute("INSERT INTO answers VALUES ('key', '1')")
    release = threading.Timer(0.5, other.commit)
    release.start()
    asked = Asked()
    assert cache.complete(["a", "b"], asked) == [0, 1]
    assert asked.missing == [1]
    release.join()
    other.close()


WRITES = """
name, together = sys.argv[2], Path(sys.argv[3])
requests = [f"shared {i}" for i in range(60)] + [f"{name} {i}" for i in range(60)]
(together / name).touch()
while len(list(together.iterdir())) < 3:
    time.sleep(0.001)
def answer(missing):
    for i in missing:
        yield {i: requests[i].upper()}
assert AnswerCache(folder, {"adapter": "a"}).complete(requests, answer) == [r.upper() for r in requests]
"""


def test_several_processes_fill_one_file_and_none_loses_an_answer(tmp_path: Path) -> None:
    together = tmp_path / "together"
    together.mkdir()
    names = ["one", "two", "three"]
    processes = [script(WRITES, tmp_path / "kept", name, together) for name in names]
    for process in processes:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 0, said
    requests = [f"{name} {i}" for name in ("shared", *names) for i in range(60)]
    found = AnswerCache(tmp_path / "kept", {"adapter": "a"}).complete(requests, refuse)
    assert found == [request.upper() for request in requests]


def test_several_threads_fill_one_file_and_none_loses_an_answer(tmp_path: Path) -> None:
    start = threading.Barrier(4)
    results: dict[int, list[Any]] = {}

    def evaluate(name: int) -> None:
        start.wait()
        requests = [*range(30), *(f"{name} {i}" for i in range(30))]
        results[name] = AnswerCache(tmp_path, SUBJECT).complete(requests, Asked())

    threads = [threading.Thread(target=evaluate, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert results == {name: [*range(60)] for name in range(4)}
    requests = [f"{name} {i}" for name in range(4) for i in range(30)]
    assert AnswerCache(tmp_path, SUBJECT).complete(requests, refuse) == [*range(30, 60)] * 4

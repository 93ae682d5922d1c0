"""lm-eval's names: read once, kept in a file, and found with the folders that define them."""

import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.errors import UsageError
from prefixtune_cli.evaluate import catalogue as module
from prefixtune_cli.evaluate.catalogue import Catalogue, Listed, load_catalogue

OWN = ("quickstart", "forgetting")
HEAVY = ("torch", "transformers", "peft", "accelerate", "datasets", "lm_eval")
LOAD = f"""
import hashlib, json, sys
from prefixtune_cli.evaluate.catalogue import load_catalogue
entries = load_catalogue().entries
print(json.dumps({{
    "count": len(entries),
    "sha256": hashlib.sha256(repr(list(entries.items())).encode()).hexdigest(),
    "imported": [name for name in {HEAVY} if name in sys.modules],
}}))
"""


def in_another_process() -> dict[str, Any]:
    """The result of `load_catalogue` in a new process, and the heavy packages that it imports."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD], capture_output=True, text=True, env=os.environ, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def kept_files(home: str | Path) -> list[Path]:
    return [*Path(home).glob("prefixtune/lm-eval-*-tasks.json")]


@pytest.fixture(scope="module")
def first() -> dict[str, Any]:
    """The first reading on a machine, which takes seconds; all other tests find its file."""
    for file in kept_files(os.environ["HF_HOME"]):
        file.unlink()
    return in_another_process()


@pytest.fixture(scope="module")
def catalogue(first: dict[str, Any]) -> Catalogue:
    return load_catalogue()


class Reading:
    """Replaces lm-eval's fourteen thousand files, and counts how often they are read."""

    ENTRIES = {
        "a": Listed("a", "task", "x/a", output_type="generate_until", splits=("test",)),
        "b": Listed("b", "group", "x", members=("a",)),
    }

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, root: Path) -> dict[str, Listed]:
        assert (root / "mmlu").is_dir()
        self.times += 1
        return self.ENTRIES


@pytest.fixture
def reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reading:
    """A small catalogue, with a home folder of its own."""
    found = Reading()
    monkeypatch.setattr(module, "_read", found)
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path))
    return found


# Reading and keeping


def test_the_first_reading_imports_no_torch(first: dict[str, Any]) -> None:
    assert first["count"] > 10_000
    assert not {"torch", "transformers", "peft", "accelerate"} & {*first["imported"]}


def test_the_kept_file_gives_the_same_and_imports_nothing_heavy(first: dict[str, Any]) -> None:
    assert len(kept_files(os.environ["HF_HOME"])) == 1
    assert in_another_process() == {**first, "imported": []}


def test_every_field_survives_in_the_file(
    first: dict[str, Any], catalogue: Catalogue, reading: Reading
) -> None:
    again = hashlib.sha256(repr(list(catalogue.entries.items())).encode()).hexdigest()
    assert again == first["sha256"]
    full = Listed("c", "task", "f", ("m", "n"), "t", "me/d", "s", ("x", "y"), ("z",), True)
    reading.ENTRIES = {**Reading.ENTRIES, "c": full}
    assert load_catalogue().entries == load_catalogue().entries == reading.ENTRIES
    assert reading.times == 1


def another(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda content: json.dumps({**json.loads(content), **changes}).encode()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: b"\xff" + content,
        lambda content: b"[]",
        lambda content: b"null",
        lambda content: b"{}",
        another(entries=None),
        another(entries=["a"]),
        another(entries=[{"kind": "task"}]),
        another(entries=[{"name": "a"}]),
        another(entries=[{"name": "a", "kind": "task", "unknown": 1}]),
        another(key=[module.VERSION + 1, "/elsewhere", 0]),
        another(key=None),
    ],
)
def test_a_damaged_or_old_file_is_read_anew_and_replaced(
    tmp_path: Path, reading: Reading, damage: Callable[[bytes], bytes]
) -> None:
    load_catalogue()
    [file] = kept_files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert load_catalogue().entries == Reading.ENTRIES
    assert reading.times == 2
    assert file.read_bytes() == whole
    assert load_catalogue().entries == Reading.ENTRIES
    assert reading.times == 2
    assert kept_files(tmp_path) == [file]  # no half-written file beside it


@pytest.mark.parametrize("home", ["file", "file/below", "/proc/self"])
def test_a_home_that_cannot_be_written_to_still_works(
    home: str, tmp_path: Path, reading: Reading, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("here")
    monkeypatch.setattr(module, "HF_HOME", str(tmp_path / home))
    for times in (1, 2):
        assert load_catalogue().entries == Reading.ENTRIES
        assert reading.times == times
    assert (tmp_path / "file").read_text() == "here"


# Names


@pytest.mark.parametrize(
    ("typed", "near"),
    [
        ("mmlu_anatmy", "mmlu_anatomy"),
        ("helaswag", "hellaswag"),
        ("gsm8", "gsm8k"),
        ("MMLU", "mmlu"),
        ("GSM8K", "gsm8k"),
        ("quikstart", "quickstart"),
        ("Forgetting", "forgetting"),
        ("aradice", "AraDiCE"),
    ],
)
def test_a_misspelt_name_gives_the_nearest(catalogue: Catalogue, typed: str, near: str) -> None:
    with pytest.raises(UsageError) as caught:
        catalogue.check(["mmlu", typed], OWN)
    told = str(caught.value)
    assert told.startswith(f"There is no benchmark {typed!r}. Did you mean {near}")
    assert told.count(", ") < 8
    assert "`ptp eval --list`" in told


def test_a_part_of_a_name_gives_those_that_contain_it(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match=r"Did you mean .*minerva_math_counting_and_prob"):
        catalogue.check(["counting_and"], OWN)


def test_a_name_near_to_none_is_told_without_a_guess(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match=r"There is no benchmark 'qqzzxxyyw'\. `ptp eval --list`"):
        catalogue.check(["qqzzxxyyw"], OWN)


def test_names_that_are_known_pass(catalogue: Catalogue) -> None:
    catalogue.check(["mmlu", "ai2_arc", "gsm8k", *OWN], OWN)
    with pytest.raises(UsageError, match="'forgetting'"):
        catalogue.check(["forgetting"], ())


def test_a_glob_and_a_part_of_a_name_are_found(catalogue: Catalogue) -> None:
    def names(pattern: str) -> list[str]:
        return [listed.name for listed in catalogue.find(pattern)]

    assert names("arc_e[a-f]*") == ["arc_easy"]
    assert names("mmlu_s[ot]*_tasks") == ["mmlu_social_sciences_tasks", "mmlu_stem_tasks"]
    assert names("mmlu_anatom?") == ["mmlu_anatomy"]
    assert {"mmlu_anatomy", "cmmlu_anatomy"} <= {*names("anatomy")}
    assert names("ANATOMY") == names("anatomy") == names("*anatomy*")
    assert {"AraDiCE", "AraDiCE_boolq_egy"} <= {*names("aradice")}
    assert names("no such name") == []
    assert names("*") == names("") == sorted(catalogue.entries)


def test_the_names_nearest_to_what_was_typed_come_first(catalogue: Catalogue) -> None:
    found = [listed.name for listed in catalogue.find("mmlu")]
    assert found[0] == "mmlu"
    begins = [name.startswith("mmlu") for name in found]
    assert begins == sorted(begins, reverse=True)
    as_a_word = found.index("AraDiCE_ArabicMMLU_lev"), found.index("global_mmlu_en")
    assert begins.count(True) <= as_a_word[1] < as_a_word[0]
    assert found == [listed.name for listed in catalogue.find("*MMLU*")]


def test_what_a_listed_group_holds_is_folded(catalogue: Catalogue) -> None:
    found = catalogue.find("mmlu")
    shown = [listed.name for listed in catalogue.outermost(found, "mmlu")]
    assert shown[0] == "mmlu"
    assert not {"mmlu_stem", "mmlu_anatomy"} & {*shown}
    assert len(shown) < len(found) / 4
    by_itself = catalogue.outermost(catalogue.find("mmlu_anatomy"), "mmlu_anatomy")
    assert by_itself[0].name == "mmlu_anatomy"


# Members


def test_mmlu_has_57_tasks_in_four_groups(catalogue: Catalogue) -> None:
    mmlu = catalogue.entries["mmlu"]
    assert mmlu.kind == "group"
    assert {*mmlu.members} == {
        f"mmlu_{x}" for x in ("stem", "other", "social_sciences", "humanities")
    }
    assert {catalogue.entries[name].kind for name in mmlu.members} == {"group"}
    tasks = catalogue.tasks("mmlu")
    assert len(tasks) == len({task.name for task in tasks}) == 57
    assert {task.dataset for task in tasks} == {"cais/mmlu"}
    assert {f"mmlu_{task.subset}" for task in tasks} == {task.name for task in tasks}
    by_group = [len(catalogue.tasks(name)) for name in mmlu.members]
    assert sum(by_group) == 57
    assert min(by_group) > 10


def test_a_task_is_its_own_only_task(catalogue: Catalogue) -> None:
    assert catalogue.tasks("gsm8k") == [catalogue.entries["gsm8k"]]


def test_tags_expand_to_the_tasks_that_bear_them(catalogue: Catalogue) -> None:
    assert catalogue.entries["ai2_arc"].kind == "tag"
    assert [task.name for task in catalogue.tasks("ai2_arc")] == ["arc_challenge", "arc_easy"]
    glue = [task.name for task in catalogue.tasks("glue")]
    assert {"cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "wnli"} <= {*glue}


def test_groups_expand_whatever_way_their_members_are_written(catalogue: Catalogue) -> None:
    def names(name: str) -> set[str]:
        return {task.name for task in catalogue.tasks(name)}

    assert len(names("bbh")) == 27
    assert all(name.startswith("bbh_cot_fewshot_") for name in names("bbh"))
    assert len(names("leaderboard")) == 39  # groups of groups
    assert {"leaderboard_mmlu_pro", "leaderboard_ifeval"} <= names("leaderboard")
    # with settings of their own; one of them is a tag, and one a group
    others = {"arc_challenge", "hellaswag", "winogrande", "gsm8k", *names("truthfulqa")}
    assert names("openllm") == names("mmlu") | others
    # in groups defined within the group
    assert "stem" in catalogue.entries["mmlu_generative"].members
    assert "stem" not in catalogue.entries
    assert len(names("mmlu_generative")) == 57


def test_a_task_that_several_members_share_is_listed_once() -> None:
    task = Listed("c", "task")
    found = Catalogue(
        {
            "a": Listed("a", "group", members=("b", "c", "unknown")),
            "b": Listed("b", "group", members=("c", "a")),
            "c": task,
        }
    )
    assert found.tasks("a") == found.tasks("b") == [task]
    assert found.tasks("unknown") == []


def test_every_name_has_tasks(catalogue: Catalogue) -> None:
    """All but a group that defines its tasks within its own file."""
    assert {name for name in catalogue.entries if not catalogue.tasks(name)} <= {"flan_held_in"}


@pytest.mark.parametrize(
    "name",
    [
        "mmlu", "mmlu_stem", "mmlu_stem_tasks", "mmlu_generative", "mmlu_anatomy", "bbh", "leaderboard",
        "openllm", "ai2_arc", "super-glue-lm-eval-v1", "minerva_math", "blimp", "lambada", "agieval",
        "wikitext", "humaneval",
    ],
)  # fmt: skip
def test_its_folders_alone_hold_all_of_an_entry(
    catalogue: Catalogue, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    from lm_eval.tasks import TaskManager

    folders = catalogue.folders(name)
    with caplog.at_level(logging.WARNING):
        manager = TaskManager(include_defaults=False, include_path=list(folders))
    assert caplog.messages == []  # about a name that occurs in two folders
    found = manager.task_index
    assert name in found
    assert {task.name for task in catalogue.tasks(name)} <= {*manager.all_subtasks}
    for listed in catalogue._below(name, set()):
        assert found[listed.name].kind.name.lower() == listed.kind
        if listed.kind == "tag":
            assert tuple(sorted(found[listed.name].tags)) == listed.members
    assert len(found) < 1000 < len(catalogue.entries)


def test_no_folder_lies_within_another(catalogue: Catalogue) -> None:
    for name in ("mmlu", "openllm", "multiple_choice", "afrobench"):
        folders = catalogue.folders(name)
        assert folders
        assert not any(a in b.parents for a in folders for b in folders)
        assert all(folder.is_dir() for folder in folders)


# What is known of a task


@pytest.mark.parametrize(
    "listed",
    [
        Listed(
            "mmlu_anatomy", "task", "mmlu/default", (), "multiple_choice", "cais/mmlu", "anatomy",
            ("test", "dev"), ("choices", "question", "answer"),
        ),
        Listed(
            "gsm8k", "task", "gsm8k", (), "generate_until", "openai/gsm8k", "main",
            ("test", "train"), ("question", "answer"),
        ),
        # its YAML has no test split; code prepares its rows, so we know nothing of its columns
        Listed(
            "hellaswag", "task", "hellaswag", (), "multiple_choice", "Rowan/hellaswag", None,
            ("validation", "train"), (),
        ),
        Listed(
            "boolq", "task", "super_glue/boolq", (), "multiple_choice", "aps/super_glue", "boolq",
            ("validation", "train"), ("passage", "question", "label"),
        ),
        Listed(
            "humaneval", "task", "humaneval", (), "generate_until", "openai/openai_humaneval", None,
            ("test",), ("prompt", "entry_point", "test"), runs_code=True,
        ),
    ],
    ids=lambda listed: listed.name,
)  # fmt: skip
def test_a_task_is_listed_as_its_yaml_has_it(catalogue: Catalogue, listed: Listed) -> None:
    assert catalogue.entries[listed.name] == listed


def test_only_tasks_that_run_code_say_so(catalogue: Catalogue) -> None:
    unsafe = {name for name, listed in catalogue.entries.items() if listed.runs_code}
    assert {"humaneval", "humaneval_instruct", "mbpp"} <= unsafe
    assert not unsafe & {"gsm8k", "mmlu_anatomy", "hellaswag", "boolq"}
    assert len(unsafe) < 200

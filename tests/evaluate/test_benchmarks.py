"""Benchmarks are lm-eval's own: the same prompts to the character, and the same scores to the last digit."""

import csv
import json
import math
import random
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from lm_eval.models.huggingface import HFLM

from prefixtune_cli import model as models
from prefixtune_cli.errors import DataError, ModelError, UsageError
from prefixtune_cli.evaluate import benchmarks
from prefixtune_cli.evaluate.answer_cache import AnswerCache
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.catalogue import Catalogue, load_catalogue
from prefixtune_cli.evaluate.language_model import BenchmarkLM
from prefixtune_cli.evaluate.outcome import BASE
from prefixtune_cli.evaluate.tasks import (
    Benchmark,
    Rendering,
    load_benchmark_tasks,
    local_data,
)
from prefixtune_cli.progress import Silent
from prefixtune_cli.recipe.schema import ModelSection
from prefixtune_cli.tokenizer import load_tokenizer

REAL = Path(__file__).parents[2].parent / "shared" / "data"
needs_mmlu = pytest.mark.skipif(
    not (REAL / "mmlu").exists(), reason="the real MMLU is not beside the project"
)
needs_gsm8k = pytest.mark.skipif(
    not (REAL / "gsm8k").exists(), reason="the real GSM8K is not beside the project"
)


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return load_catalogue()


def load(name: str, catalogue: Catalogue, data: dict[str, Path], **how: Any) -> Benchmark:
    local = local_data({key: str(path) for key, path in data.items()}, catalogue)
    return load_benchmark_tasks(name, catalogue, local, Rendering(**how))


def lm_evals_own(tasks: dict[str, dict[str, Any]], shots: int, limit: int) -> dict[str, Any]:
    """lm-eval's tasks, loaded and built only by lm-eval, from files that `datasets` reads.

    Args:
        tasks: name → the settings that point it to the files.
    """
    from lm_eval.tasks import TaskManager

    built = {}
    folders = {Path(load_catalogue().folders(name)[0]) for name in tasks}
    manager = TaskManager(include_defaults=False, include_path=list(folders))
    for name, settings in tasks.items():
        base = manager.task_index[name].cfg
        assert base is not None
        loaded = manager.load([{**base, "task": name, **settings}])
        [task] = loaded["tasks"].values()
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        built[name] = task
    return built


def mmlu_as_jsonl(subject: str, folder: Path) -> dict[str, str]:
    """The rows of a subject as on the hub, written by code that is independent of the tested code."""
    files = {}
    for split in ("dev", "test"):
        with open(
            REAL / "mmlu" / split / f"{subject}_{split}.csv", newline="", encoding="utf-8"
        ) as f:
            rows = [
                {
                    "question": row[0],
                    "subject": subject,
                    "choices": row[1:5],
                    "answer": "ABCD".index(row[5]),
                }
                for row in csv.reader(f)
            ]
        file = folder / f"{subject}-{split}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        files[split] = str(file)
    return files


SUBJECTS = ("anatomy", "high_school_european_history", "formal_logic", "professional_law")


@needs_mmlu
def test_mmlus_prompts_are_lm_evals_character_by_character(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    ours = load("mmlu", catalogue, {"mmlu": REAL / "mmlu"}, num_fewshot=5, limit=12)
    assert len(ours.tasks) == 57
    theirs = lm_evals_own(
        {
            f"mmlu_{subject}": {
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": mmlu_as_jsonl(subject, tmp_path)},
            }
            for subject in SUBJECTS
        },
        shots=5,
        limit=12,
    )
    for name, task in theirs.items():
        expected = [request.args for request in task.instances]
        assert len(expected) == 48
        assert [request.args for request in ours.tasks[name].instances] == expected
    prompt, answer = ours.tasks["mmlu_anatomy"].instances[0].args
    assert prompt.startswith(
        "The following are multiple choice questions (with answers) about anatomy.\n\n"
        "What is the embryological origin of the hyoid bone?\nA. The first pharyngeal arch\n"
        "B. The first and second pharyngeal arches\nC. The second pharyngeal arch\n"
        "D. The second and third pharyngeal arches\nAnswer: D\n\n"
    )
    assert prompt.count("Answer:") == 6
    assert answer == " A"


@needs_gsm8k
def test_gsm8ks_prompts_are_lm_evals_character_by_character(catalogue: Catalogue) -> None:
    ours = load("gsm8k", catalogue, {"gsm8k": REAL / "gsm8k"}, limit=25)
    files = {split: str(REAL / "gsm8k" / f"{split}.jsonl") for split in ("train", "test")}
    settings = {
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
    }
    [theirs] = lm_evals_own({"gsm8k": settings}, shots=5, limit=25).values()
    expected = [request.args for request in theirs.instances]
    assert [request.args for request in ours.tasks["gsm8k"].instances] == expected
    assert expected[0][0].count("Question:") == 6
    assert expected[0][1]["until"] == ["Question:", "</s>", "<|im_end|>"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects as CSV, in words of `tiny`, and sums with answers in GSM8K's form."""
    folder = tmp_path_factory.mktemp("benchmarks")
    draw = random.Random(5)
    words = "card flight hotel letter money song train garden river kettle lamp table".split()
    for subject in ("anatomy", "astronomy"):
        for split, rows in (("dev", 5), ("test", 14)):
            file = folder / "mmlu" / split / f"{subject}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with open(file, "w", newline="", encoding="utf-8") as out:
                for _ in range(rows):
                    question = " ".join(draw.choices(words, k=draw.randrange(3, 12)))
                    csv.writer(out).writerow(
                        [f"{question}?", *draw.sample(words, 4), draw.choice("ABCD")]
                    )
    (folder / "gsm8k").mkdir()
    for split, rows in (("train", 8), ("test", 6)):
        lines = [
            json.dumps({"question": f"{a} and {b}?", "answer": f"{a} + {b}\n#### {a + b}"})
            for a, b in ((draw.randrange(9), draw.randrange(9)) for _ in range(rows))
        ]
        (folder / "gsm8k" / f"{split}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    section = ModelSection(name="tiny", bits=32)
    return models.load_base(section).eval(), load_tokenizer(section)


@pytest.fixture
def lm(tiny: tuple[Any, Any]) -> BenchmarkLM:
    base, tokenizer = tiny
    return BenchmarkLM(base, tokenizer, BatchLimit(5, 2000, Silent()), Silent())


def theirs(tiny: tuple[Any, Any], benchmark: Benchmark) -> benchmarks.Answered:
    """lm-eval's own model answers the same tasks."""
    base, tokenizer = tiny
    return benchmarks.answer(
        HFLM(pretrained=base, tokenizer=tokenizer, batch_size=3), benchmark, Rendering()
    )


def ours(lm: BenchmarkLM, tiny: tuple[Any, Any], benchmark: Benchmark) -> benchmarks.Answered:
    lm.turn(benchmark.name, BASE, tiny[0], AnswerCache(None, {}), benchmark.versions)
    return benchmarks.answer(lm, benchmark, Rendering())


def answers(benchmark: Benchmark) -> list[Any]:
    return [r.resps[0] for task in benchmark.tasks.values() for r in task.instances]


@pytest.mark.parametrize("name", ["mmlu_anatomy", "mmlu_astronomy", "gsm8k"])
def test_scores_are_lm_evals_to_the_last_digit(
    name: str, catalogue: Catalogue, data: Path, tiny: tuple[Any, Any], lm: BenchmarkLM
) -> None:
    local = {"mmlu": data / "mmlu", "gsm8k": data / "gsm8k"}
    shots = 3 if name != "gsm8k" else 2
    benchmark = load(name, catalogue, local, num_fewshot=shots)
    if name == "gsm8k":
        for request in benchmark.tasks[name].instances:
            request.args[1]["max_gen_toks"] = 12
    expected = theirs(tiny, benchmark)
    said = answers(benchmark)
    found = ours(lm, tiny, benchmark)
    assert found.results["results"] == expected.results["results"]
    assert found.items == expected.items
    if name == "gsm8k":
        assert answers(benchmark) == said
        assert any(said)
    else:
        assert [s for s, _ in answers(benchmark)] == pytest.approx([s for s, _ in said], abs=1e-3)
        assert [greedy for _, greedy in answers(benchmark)] == [greedy for _, greedy in said]


def test_long_texts_are_scored_window_by_window_as_lm_eval_does(
    tiny: tuple[Any, Any], lm: BenchmarkLM
) -> None:
    from lm_eval.api.instance import Instance

    base, tokenizer = tiny
    draw = random.Random(0)
    words = "card flight hotel letter money song train".split()
    texts = [" ".join(draw.choices(words, k=k)) for k in (3, 500, 40)]
    requests = [
        Instance("loglikelihood_rolling", {}, (text,), 0, ("text", i, 1))
        for i, text in enumerate(texts)
    ]
    own = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=2, max_length=128)
    expected = own.loglikelihood_rolling(requests, disable_tqdm=True)
    lm._max_length = 128
    lm.turn("text", BASE, base, AnswerCache(None, {}), {})
    assert lm.loglikelihood_rolling(requests) == pytest.approx(expected, abs=1e-2)


def test_without_a_context_the_start_of_a_text_stands_in(
    tiny: tuple[Any, Any], lm: BenchmarkLM
) -> None:
    from lm_eval.api.instance import Instance

    base, tokenizer = tiny
    pairs = [
        ("", "the card"),
        ("the card ", "is late"),
        ("<|bos|>a letter", " card"),
        ("a\n ", " b"),
    ]
    requests = [
        Instance("loglikelihood", {}, pair, 0, ("text", i, 1)) for i, pair in enumerate(pairs)
    ]
    expected = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=2).loglikelihood(
        requests, disable_tqdm=True
    )
    lm.turn("text", BASE, base, AnswerCache(None, {}), {})
    found = lm.loglikelihood(requests)
    assert [s for s, _ in found] == pytest.approx([s for s, _ in expected], abs=1e-3)


def test_scores_that_are_no_numbers_are_no_result(
    catalogue: Catalogue, data: Path, random_base: Path
) -> None:
    section = ModelSection(name=str(random_base), bits=32)
    broken = models.load_base(section).eval()
    with torch.no_grad():
        broken.get_input_embeddings().weight.fill_(math.nan)
    lm = BenchmarkLM(broken, load_tokenizer(section), BatchLimit(9, 999, Silent()), Silent())
    benchmark = load("mmlu_anatomy", catalogue, {"mmlu": data / "mmlu"})
    with pytest.raises(ModelError, match="mmlu_anatomy, base: 56 of 56 scores are not numbers"):
        ours(lm, (broken, None), benchmark)


def test_data_whose_name_is_also_a_hub_id_is_found_by_its_benchmark(catalogue: Catalogue) -> None:
    assert local_data({"xnli": "/d"}, catalogue) != {"xnli": Path("/d")}


def test_tasks_that_fetch_files_by_their_address_take_no_copy(catalogue: Catalogue) -> None:
    with pytest.raises(UsageError, match="arithmetic_1dc contains its data or downloads files"):
        local_data({"arithmetic_1dc": "/d"}, catalogue)


def test_requests_are_built_and_tokenized_once_for_all_models(
    catalogue: Catalogue, data: Path, tiny: tuple[Any, Any], lm: BenchmarkLM
) -> None:
    benchmark = load("mmlu_anatomy", catalogue, {"mmlu": data / "mmlu"})
    built = benchmark.tasks["mmlu_anatomy"].instances
    first = ours(lm, tiny, benchmark)
    assert lm._tokenized is not None
    pairs = lm._tokenized[1]
    second = ours(lm, tiny, benchmark)
    assert benchmark.tasks["mmlu_anatomy"].instances is built
    assert lm._tokenized[1] is pairs
    assert first.items == second.items


def test_a_group_is_compared_as_a_whole_and_its_tasks_are_folded(
    catalogue: Catalogue, data: Path, tiny: tuple[Any, Any], lm: BenchmarkLM, tmp_path: Path
) -> None:
    """Every subject of a small group, with the rows of one subject; the second model gives other answers."""
    for task in catalogue.tasks("mmlu_stem"):
        for split in ("dev", "test"):
            file = tmp_path / split / f"{task.subset}_{split}.csv"
            file.parent.mkdir(exist_ok=True)
            rows = (data / "mmlu" / split / f"anatomy_{split}.csv").read_text().splitlines()
            file.write_text("\n".join(rows[:4]) + f"\n{task.subset}?,a,b,c,d,A\n")
    benchmark = load("mmlu_stem", catalogue, {"mmlu": tmp_path}, limit=5)
    base = ours(lm, tiny, benchmark)
    other = load("mmlu_stem", catalogue, {"mmlu": tmp_path}, limit=5, num_fewshot=4)
    outcome = benchmarks.compare(benchmark, {BASE: base, "adapter": ours(lm, tiny, other)})
    group, *tasks = outcome.lines
    assert (group.name, group.items, group.depth, group.folded) == ("mmlu_stem", 95, 0, False)
    assert len(tasks) == 19
    assert all(line.depth == 1 and line.folded for line in tasks)
    assert group.values[BASE] == pytest.approx(sum(t.values[BASE] for t in tasks) / 19)
    difference = group.differences["adapter"]
    assert difference.value == pytest.approx(group.values["adapter"] - group.values[BASE])
    assert difference.low <= difference.value <= difference.high
    assert difference.p_value is not None
    assert group.percent
    assert not group.intervals
    items = outcome.record["items"][
        "mmlu_anatomy" if "mmlu_anatomy" in benchmark.tasks else tasks[0].name
    ]
    assert set(items["acc,none"]) == {"document", BASE, "adapter"}
    assert set(items["acc,none"][BASE]) <= {0.0, 1.0}


def test_the_function_that_loads_data_sets_is_given_back_even_after_an_error(
    catalogue: Catalogue, data: Path, tmp_path: Path
) -> None:
    before = datasets.load_dataset
    load("mmlu_anatomy", catalogue, {"mmlu": data / "mmlu"})
    assert datasets.load_dataset is before
    with pytest.raises(DataError):
        load("mmlu_anatomy", catalogue, {"mmlu": tmp_path})
    assert datasets.load_dataset is before


def test_more_examples_than_there_are_is_refused(catalogue: Catalogue, data: Path) -> None:
    with pytest.raises(UsageError, match=r"--num-fewshot 6 is more than the 5 examples"):
        load("mmlu_anatomy", catalogue, {"mmlu": data / "mmlu"}, num_fewshot=6)
    with pytest.raises(UsageError, match=r"--num-fewshot 9 is more than the 8 examples"):
        load("gsm8k", catalogue, {"gsm8k": data / "gsm8k"}, num_fewshot=9)


def test_local_data_is_named_by_benchmark_group_or_hub_id(catalogue: Catalogue) -> None:
    for name in ("mmlu", "mmlu_anatomy", "mmlu_stem_tasks", "cais/mmlu"):
        assert local_data({name: "/d"}, catalogue) == {"cais/mmlu": Path("/d")}
    with pytest.raises(UsageError, match=r"6 data sets.*--bench-data cais/mmlu="):
        local_data({"openllm": "/d"}, catalogue)


def test_subsets_that_one_file_cannot_tell_apart_are_refused(
    catalogue: Catalogue, tmp_path: Path
) -> None:
    row = {"question": "1+1?", "answer": "2", "answer_number": 2, "equation_solution": "1+1=2"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f"{json.dumps(row)}\n" * 9, encoding="utf-8")
    with pytest.raises(DataError, match="cannot be told apart"):
        load("mgsm_direct", catalogue, {"mgsm_direct": tmp_path})

"""`read_runs`: makes a comparison of finished runs without torch, and refuses everything unfair in one message."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Comparison
from prefixtune_cli.compare.runs import read_runs
from prefixtune_cli.compare.standing import standings_on
from prefixtune_cli.compare.table import columns, markdown
from prefixtune_cli.errors import RunDirError, UsageError
from prefixtune_cli.evaluate.matching import match_rule
from prefixtune_cli.evaluate.run import evaluate
from prefixtune_cli.evaluate.settings import Settings
from prefixtune_cli.pointed import point
from prefixtune_cli.recipe.load import dump
from prefixtune_cli.recipe.schema import HELD_OUT_SHARE, Recipe
from prefixtune_cli.run_dir import RunDir, write_atomically, write_json
from prefixtune_cli.train import Summary, train

REFERENCES = ("red", "blue", "green", "white")


def run(
    out: Path,
    method: str = "lora",
    *,
    seed: int = 0,
    right: str = "1100",
    loss: float = 1.5,
    finished: bool = True,
    environment: dict[str, Any] | None = None,
    references: tuple[str, ...] = REFERENCES,
    **sections: dict[str, Any],
) -> str:
    """Write a run directory as `ptp train` does; `right` says which held-out rows have a right answer."""
    recipe = Recipe.model_validate(
        {
            "model": {"name": "tiny", "bits": 32, **sections.get("model", {})},
            "data": {"train": "a.jsonl", "eval": "b.jsonl", **sections.get("data", {})},
            "adapter": {"method": method, **sections.get("adapter", {})},
            "train": {"max_steps": 30, "seed": seed, **sections.get("train", {})},
            "evaluate": sections.get("evaluate", {}),
            "out": str(out),
        }
    ).with_learning_rate(192)
    about = {
        "packages": {"torch": "2.12.0"},
        "gpus": [],
        "cpu_count": 2,
        "processes": 1,
        "data": {
            "train": {"source": "a.jsonl", "rows": 100, "sha256": "a" * 64},
            "eval": {"source": "b.jsonl", "rows": 4, "sha256": "b" * 64},
        },
        **(environment or {}),
    }
    run_dir = RunDir(out)
    run_dir.create(overwrite=False)
    write_json(run_dir.environment, about)
    write_atomically(run_dir.recipe, dump(recipe))
    for step, speed in ((10, 100.0), (20, 900.0), (30, 1000.0)):
        row = {"step": step, "loss": 60 / step, "tokens_per_second": speed, "peak_memory_gib": 0.5}
        run_dir.append_metrics(row)
    if finished:
        rows = [
            {"answer": ref, "base": "?", "adapter": f" {ref}\n" if hit == "1" else "?"}
            for ref, hit in zip(references, right, strict=True)
        ]
        write_atomically(run_dir.answers, "".join(json.dumps(row) + "\n" for row in rows))
        summary = {
            "base": {"loss": 4.0, "exact_match": 0.0},
            "adapter": {"loss": loss, "exact_match": right.count("1") / 4},
            "trainable_parameters": 1000,
            "total_parameters": 9000,
            "adapter_bytes": 4096,
            "steps": recipe.train.max_steps,
            "held_out_rows": len(references),
        }
        write_json(run_dir.summary, summary)
    return str(out)


def refused(*runs: str) -> str:
    with pytest.raises(RunDirError) as caught:
        read_runs(runs)
    return str(caught.value)


def test_runs_that_differ_by_their_seed_are_one_contestant(tmp_path: Path) -> None:
    runs = [run(tmp_path / f"{m}-{s}", m, seed=s) for m in ("lora", "full") for s in (1, 0)]
    made = read_runs(runs)
    assert [c.label for c in made.contestants] == ["lora", "full"]
    assert [cell.seed for cell in made.contestants[0].cells] == [0, 1]
    assert made.contestants[0].cells[1].run == runs[0]
    assert made.protocol["seeds"] == [0, 1]
    assert (made.protocol["steps"], made.protocol["batch"]) == (30, 8)
    assert made.kind == "runs"
    assert not made.failed
    assert made.notices == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"adapter": {"r": 8}}, ["lora r=16", "lora r=8"]),
        ({"adapter": {"config": {"use_dora": True}}}, ["lora", "lora use_dora=true"]),
        ({"train": {"learning_rate": 0.01}}, ["lora lr=0.003", "lora lr=0.01"]),
        (
            {"adapter": {"target_modules": ["q_proj", "v_proj"]}},
            ["lora target_modules=all-linear", "lora target_modules=[q_proj,v_proj]"],
        ),
    ],
)
def test_settings_that_tell_contestants_apart_stand_in_their_labels(
    tmp_path: Path, changes: dict[str, Any], expected: list[str]
) -> None:
    made = read_runs([run(tmp_path / "a"), run(tmp_path / "b", **changes), run(tmp_path / "c", "full")])  # fmt: skip
    assert [c.label for c in made.contestants] == [*expected, "full"]


def test_a_feature_map_is_a_label_by_its_name_alone(tmp_path: Path) -> None:
    method = "prefix-tuning-plus"
    wide = {"feature_map": "mlp", "feature_dim": 64}
    made = read_runs(
        [
            run(tmp_path / "a", method, adapter={"feature_map": "elu"}),
            run(tmp_path / "b", method, adapter=wide),
        ]
    )
    assert [c.label for c in made.contestants] == [
        "prefix-tuning-plus elu", "prefix-tuning-plus mlp feature_dim=64"
    ]  # fmt: skip
    assert made.contestants[1].settings == {f"adapter.{k}": v for k, v in wide.items()}


def test_how_a_run_was_logged_and_where_it_lies_make_no_contestant(tmp_path: Path) -> None:
    one = run(tmp_path / "a", seed=0)
    other = run(tmp_path / "b", seed=1, train={"log_steps": 2, "save_steps": 7})
    made = read_runs([one, other, run(tmp_path / "c", "full")])
    assert [len(c.cells) for c in made.contestants] == [2, 1]


def test_the_same_data_under_another_path_is_the_same(tmp_path: Path) -> None:
    moved = {
        "data": {
            "train": {"source": "./a.jsonl", "rows": 100, "sha256": "a" * 64},
            "eval": {"source": "b.jsonl", "rows": 4, "sha256": "b" * 64},
        }
    }
    one = run(tmp_path / "a", seed=0)
    other = run(tmp_path / "b", seed=1, data={"train": "./a.jsonl"}, environment=moved)
    assert [c.label for c in read_runs([one, other]).contestants] == ["lora"]


def test_results_are_right_row_by_row_and_the_mean_loss(tmp_path: Path) -> None:
    made = read_runs(
        [run(tmp_path / "a", right="1011", loss=1.25), run(tmp_path / "b", "full", right="0001")]
    )
    found = made.contestants[0].cells[0].results[TEST]
    assert found.right == [True, False, True, True]
    assert found.loss == 1.25
    assert made.base[TEST].right == [False] * 4
    assert made.base[TEST].loss == 4.0
    standing = standings_on(made, TEST)
    assert [s.mean for s in standing.each] == [0.75, 0.25]
    assert standing.untested is None
    assert made.model["parameters"] == 8000


def test_costs_are_as_logged_without_the_first_line(tmp_path: Path) -> None:
    made = read_runs([run(tmp_path / "a"), run(tmp_path / "b", "full")])
    cost = made.contestants[0].cost
    assert cost is not None
    assert cost.training_tokens_per_second is not None
    assert (
        cost.training_tokens_per_second.low,
        cost.training_tokens_per_second.median,
        cost.training_tokens_per_second.high,
    ) == (900.0, 950.0, 1000.0)
    assert cost.peak_memory_gib == 0.5
    assert not cost.interleaved
    assert made.contestants[0].cells[0].losses == [(10, 6.0), (20, 3.0), (30, 2.0)]


def test_everything_that_is_unfair_is_said_at_once(tmp_path: Path) -> None:
    fingerprints = {
        "data": {
            "train": {"source": "other.jsonl", "rows": 50, "sha256": "c" * 64},
            "eval": {"source": "test.jsonl", "rows": 4, "sha256": "d" * 64},
        }
    }
    other = run(
        tmp_path / "b",
        "full",
        environment=fingerprints,
        model={"bits": 16},
        train={"max_steps": 60, "batch_size": 4, "gradient_accumulation": 4},
        data={"max_length": 64},
    )
    one = run(tmp_path / "a")
    said = refused(one, other)
    assert f"different bases: tiny with 32 bits in {one}; tiny with 16 bits in {other}." in said
    assert f"training data: a.jsonl (sha256 aaaaaaaa…) in {one}; other.jsonl (sha256 cccccccc…)" in said  # fmt: skip
    assert f"budgets: 30 steps of 8 examples in {one}; 60 steps of 16 examples in {other}." in said
    assert "different ways to read their data" in said
    assert "held-out rows: 4 of b.jsonl (sha256 bbbbbbbb…)" in said
    assert said.endswith("type --anyway.")


def test_runs_that_went_on_from_different_adapters_are_an_unfair_difference(tmp_path: Path) -> None:
    def started(out: str, sha256: str, **settings: Any) -> str:
        about = {"start": {"folder": f"{sha256[0]}/adapter", "sha256": sha256}}
        train = {"start_from": sha256[0]}
        return run(tmp_path / out, environment=about, train=train, **settings)

    fresh, one = run(tmp_path / "fresh", "full"), started("one", "a" * 64)
    other = started("other", "b" * 64, method="prefix-tuning")
    said = refused(fresh, one, other)
    assert f"starts: a fresh adapter in {fresh}; a (sha256 aaaaaaaa…) in {one}; b (sha256" in said
    alike = started("alike", "a" * 64, method="ia3")
    assert len(read_runs([one, alike]).contestants) == 2
    labels = [c.label for c in read_runs([one, started("b", "b" * 64)], anyway=True).contestants]
    assert labels == ["lora start_from=a", "lora start_from=b"]


def test_of_runs_that_match_no_answers_what_differs_is_said_and_the_loss_compared(
    tmp_path: Path,
) -> None:
    """In one run, evaluate.max_new_tokens is too small for some answers, but the rows are the same."""
    one = run(tmp_path / "a")
    other = run(tmp_path / "b", "full", evaluate={"max_new_tokens": 2}, loss=1.25)
    RunDir(other).answers.unlink()
    said = refused(one, other)
    assert re.fullmatch(
        rf"The runs have different answers to match: 4 with evaluate.max_new_tokens 32 \(sha256 \w{{8}}…\) in {one}; "
        rf"none with evaluate.max_new_tokens 2 in {other}\.",
        said.splitlines()[0],
    )
    made = read_runs([one, other], anyway=True)
    head, rows = columns(made)
    assert head[1] == "loss, nats"
    assert [row[1] for row in rows] == ["4.000", "1.500", "1.250 *"]


def test_of_ways_to_read_the_data_those_that_differ_are_told(tmp_path: Path) -> None:
    one = run(tmp_path / "a", data={"max_length": 512})
    other = run(tmp_path / "b", data={"train_on": "all", "max_length": 512})
    said = refused(one, other).splitlines()[0]
    assert said.endswith(
        f"ways to read their data: train_on=completion in {one}; train_on=all in {other}."
    )


def test_anyway_the_differences_are_notices_and_rows_are_not_tested(tmp_path: Path) -> None:
    one = run(tmp_path / "a")
    other = run(tmp_path / "b", "full", references=("red", "blue", "green", "black"))
    said = refused(one, other)
    first, second = said.removeprefix("The runs have different answers to match: ").split("; ")
    assert first.partition(" in ")[0] != second.partition(" in ")[0]  # their hashes differ
    made = read_runs([one, other], anyway=True)
    assert [notice[:41] for notice in made.notices] == ["The runs have different answers to match:"]
    assert made.notices[0] in markdown(made)
    found = standings_on(made, TEST)
    assert found.untested is not None
    assert TEST not in made.base


def test_another_budget_anyway_is_still_tested_on_the_same_rows(tmp_path: Path) -> None:
    made = read_runs(
        [run(tmp_path / "a"), run(tmp_path / "b", "full", train={"max_steps": 60})], anyway=True
    )
    assert standings_on(made, TEST).untested is None
    assert made.protocol["steps"] is None
    assert len(made.notices) == 1


def test_rows_that_a_seed_split_off_are_other_rows(tmp_path: Path) -> None:
    train_alone = {"data": {"train": {"source": "a.jsonl", "rows": 100, "sha256": "a" * 64}}}
    split: dict[str, Any] = {"environment": train_alone, "data": {"eval": None, "eval_split": 0.1}}
    one = run(tmp_path / "a", seed=0, **split)
    other = run(tmp_path / "b", seed=1, **split)
    assert "4 that were split off by seed 1 (give runs the same --eval-data)" in refused(one, other)
    same_seed = run(tmp_path / "c", "full", seed=0, **split)
    assert standings_on(read_runs([one, same_seed]), TEST).untested is None


def test_the_default_share_of_held_out_rows_is_the_same_when_it_is_typed(tmp_path: Path) -> None:
    train_alone = {"data": {"train": {"source": "a.jsonl", "rows": 100, "sha256": "a" * 64}}}
    runs = [
        run(tmp_path / method, method, environment=train_alone, data={"eval": None, "eval_split": share})
        for method, share in (("lora", None), ("full", HELD_OUT_SHARE))
    ]  # fmt: skip
    assert standings_on(read_runs(runs), TEST).untested is None


def test_an_unfinished_run_is_refused_with_how_to_go_on(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", "full", finished=False)
    said = refused(one, other)
    assert f"{other} has not finished." in said
    assert f"ptp train --recipe {other}/recipe.yaml --resume" in said
    made = read_runs([one, other], anyway=True)
    assert made.failed
    assert made.contestants[1].failures[0].startswith("The run has not finished.")
    assert columns(made)[1][2][0] == "full (0 of 1 seeds)"


def test_only_unfinished_runs_are_no_comparison(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a", finished=False), run(tmp_path / "b", "full", finished=False)]
    with pytest.raises(RunDirError, match="has not finished"):
        read_runs(runs, anyway=True)


def test_a_run_given_twice_is_refused(tmp_path: Path) -> None:
    one = run(tmp_path / "a")
    with pytest.raises(UsageError, match="given twice"):
        read_runs([one, f"{tmp_path}/../{tmp_path.name}/a"])


def test_the_same_recipe_and_seed_in_two_folders_count_once(tmp_path: Path) -> None:
    one, again = run(tmp_path / "a"), run(tmp_path / "again")
    rival = run(tmp_path / "b", "full")
    said = refused(one, again, rival)
    assert f"{again} is the same recipe with the same seed as {one}. Leave one out." in said
    made = read_runs([one, again, rival], anyway=True)
    assert [[cell.run for cell in c.cells] for c in made.contestants] == [[one], [rival]]


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_runs_are_refused(tmp_path: Path, count: int) -> None:
    with pytest.raises(UsageError, match="at least two runs"):
        read_runs([str(tmp_path)][:count])


def test_a_folder_that_is_no_run_is_named_with_the_one_that_was_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = run(tmp_path / "runs" / "lora-a")
    run(tmp_path / "runs" / "full-b", "full")
    (tmp_path / "elsewhere").mkdir()
    assert "There is no run or adapter full-b. Did you mean runs/full-b?" in refused(one, "full-b")
    assert "Did you mean runs/full-b?" in refused(one, "runs/fulb-b")
    assert f"Did you mean {tmp_path}/runs/full-b?" in refused(one, "runs/full-b/eval")
    assert "It holds 2: runs/full-b runs/lora-a" in refused(one, "runs")
    assert "elsewhere is not a run directory (it has no recipe.yaml)" in refused(one, "elsewhere")


def test_anyway_does_not_pass_over_what_cannot_be_read(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", "full")
    RunDir(other).environment.write_text("{", encoding="utf-8")
    with pytest.raises(RunDirError, match=r"b cannot be read \(JSONDecodeError"):
        read_runs([one, other], anyway=True)


def test_runs_of_other_machines_or_packages_are_compared_with_a_notice(tmp_path: Path) -> None:
    other = {"cpu_count": 64, "packages": {"torch": "2.13.0"}}
    made = read_runs([run(tmp_path / "a"), run(tmp_path / "b", "full", environment=other)])
    assert len(made.notices) == 2
    assert "their speeds and memory are not comparable" in made.notices[0]


def test_runs_are_matched_by_their_pattern_and_the_rule_is_a_notice(tmp_path: Path) -> None:
    worked = {"references": ("So #### 1", "So #### 2", "#### 3", "#### 4")}
    how = {**worked, "evaluate": {"answer_pattern": "#### (.*)"}}
    mine = run(tmp_path / "a", "lora", right="1111", **how)
    made = read_runs([mine, run(tmp_path / "b", "prefix-tuning", right="1110", **how)])
    assert made.notices == [f"An answer is right if {match_rule('#### (.*)')}."]
    assert made.contestants[0].results(TEST)[0].exact_match == 1
    plain = run(tmp_path / "c", "prefix-tuning", right="1110", **worked)
    assert "answer_pattern" in refused(mine, plain)


def test_runs_whose_answers_were_not_matched_say_why(tmp_path: Path) -> None:
    runs = [run(tmp_path / m, m, right="", references=()) for m in ("lora", "prefix-tuning")]
    for one in runs:
        summary = json.loads(RunDir(one).summary.read_text())
        write_json(RunDir(one).summary, {**summary, "why_no_exact_match": "No exact match: so."})
    assert read_runs(runs).notices == ["No exact match: so."]


def test_an_evaluation_that_not_all_runs_have_is_left_out_with_a_notice(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a"), run(tmp_path / "b", "full")
    judged(one, "data-faq", "f" * 64)
    made = read_runs([one, other])
    assert made.notices == [f"eval/data-faq.json is left out: it is missing in {other}."]
    judged(other, "data-faq", "e" * 64)
    made = read_runs([one, other])
    assert "judged on different rows" in made.notices[0]
    judged(other, "data-faq", "f" * 64)
    made = read_runs([one, other])
    assert made.notices == []
    assert made.contestants[0].cells[0].results["faq"].right == [True, False]
    assert made.data["faq"] == {"source": "faq.jsonl", "rows": 2, "sha256": "f" * 64}


def test_own_data_named_ood_is_the_ood_data(tmp_path: Path) -> None:
    runs = [run(tmp_path / "a"), run(tmp_path / "b", "full")]
    for each in runs:
        judged(each, "data-ood", "f" * 64)
        judged(each, "data-test", "f" * 64)
    made = read_runs(runs)
    assert set(made.contestants[0].cells[0].results) == {TEST, OOD, "data-test"}
    assert len(made.contestants[0].cells[0].results[TEST].right or ()) == 4


def judged(out: str, bench: str, sha256: str) -> None:
    """Write an eval file as `ptp eval` does."""
    right = {"base": False, "adapter": True}
    items = [
        {"origin": f"faq.jsonl, line {i}", "tokens": 2, "nats": {"base": 4.0, "adapter": 2.0},
         "right": right if i == 1 else {**right, "adapter": False}}
        for i in (1, 2)
    ]  # fmt: skip
    found = {
        "bench": bench,
        "subjects": [{"name": "base", "folder": None}, {"name": "adapter", "folder": f"{out}/adapter"}],
        "data": {"source": "faq.jsonl", "sha256": sha256, "rows": 2, "evaluated": 2},
        "items": items,
    }  # fmt: skip
    write_json(RunDir(out).eval_result(bench), found)


@pytest.fixture(scope="module")
def trained(
    random_base: Path, colours: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[list[str], list[Summary]]:
    """Two real runs, both judged on own data and on other text."""
    folder = tmp_path_factory.mktemp("runs")
    rows = colours.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = folder / "held-out.jsonl"
    held_out.write_text("".join(rows[:6]), encoding="utf-8")
    text = folder / "text.txt"
    text.write_text("Rain fell on the old town all day. " * 20, encoding="utf-8")
    summaries = [
        train(
            Recipe.model_validate(
                {
                    "model": {"name": str(random_base), "bits": 32},
                    "data": {"train": str(colours), "eval": str(held_out), "max_length": 64},
                    "adapter": {"method": method},
                    "train": {"max_steps": 2, "log_steps": 1},
                    "evaluate": {"max_new_tokens": 8},
                    "out": str(folder / method),
                }
            )
        )
        for method in ("prefix-tuning-plus", "lora")
    ]
    runs = [summary.run for summary in summaries]
    found = evaluate(
        Settings(
            tuple(map(point, runs)), benches=("forgetting",), data=(str(held_out),), text=str(text)
        )
    )
    assert found.failures == {}
    return runs, summaries


def test_real_runs_are_read_as_they_say_themselves(
    trained: tuple[list[str], list[Summary]],
) -> None:
    runs, summaries = trained
    made = read_runs(runs)
    assert [c.label for c in made.contestants] == ["prefix-tuning-plus", "lora"]
    for contestant, summary in zip(made.contestants, summaries, strict=True):
        (cell,) = contestant.cells
        assert cell.results[TEST].loss == summary.adapter.loss
        assert cell.results[TEST].exact_match == summary.adapter.exact_match
        assert contestant.trainable_parameters == summary.trainable_parameters
        assert contestant.adapter_bytes == summary.adapter_bytes
        # `ptp eval` on the same rows gives the same results, row by row.
        assert cell.results["held-out"].loss == pytest.approx(summary.adapter.loss, rel=1e-4)
        assert len(cell.results["held-out"].nats) == 6
        assert FORGETTING in cell.results
    assert made.base["held-out"].loss == pytest.approx(summaries[0].base.loss, rel=1e-4)
    differs = [c.cells[0].results["held-out"].loss for c in made.contestants]
    assert differs[0] != differs[1]
    assert "held-out: difference from prefix-tuning-plus, points" in columns(made)[0]


def test_what_was_read_survives_results_json(trained: tuple[list[str], list[Summary]]) -> None:
    made = read_runs(trained[0])
    again = Comparison.from_json(json.loads(json.dumps(made.to_json())))
    assert markdown(replace(again, created=made.created)) == markdown(made)


def test_neither_torch_nor_what_needs_it_is_imported(
    trained: tuple[list[str], list[Summary]],
) -> None:
    code = (
        "import sys\n"
        "from prefixtune_cli.compare.runs import read_runs\n"
        "from prefixtune_cli.compare.table import columns, markdown\n"
        "assert 'scipy' not in sys.modules\n"
        "made = read_runs(sys.argv[1:])\n"
        "columns(made), markdown(made)\n"
        "heavy = {'torch', 'transformers', 'peft', 'datasets', 'trl', 'matplotlib', 'scipy.stats'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *trained[0]], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("[]\n", "")

"""On preferences, methods are compared by the objective, by who is ahead, and by the better answers."""

from __future__ import annotations

import json
import math
import random
from dataclasses import replace
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from prefixtune_cli.compare.cells import judge_cell
from prefixtune_cli.compare.comparison import OOD, TEST, Cell, Comparison, Result
from prefixtune_cli.compare.contest import Settings
from prefixtune_cli.compare.costs import compare_costs
from prefixtune_cli.compare.finished_run import BASE, result_of
from prefixtune_cli.compare.legend import legend
from prefixtune_cli.compare.metrics import (
    CHOSEN_AHEAD,
    LOSS_OF_CHOSEN,
    OF_LABELLED,
    OF_PAIRS,
    PREFERENCE_LOSS,
)
from prefixtune_cli.compare.pictures import pictures
from prefixtune_cli.compare.run import compare
from prefixtune_cli.compare.runs import read_runs
from prefixtune_cli.compare.standing import crossed_difference, standings
from prefixtune_cli.compare.table import columns
from prefixtune_cli.errors import RunDirError, UsageError
from prefixtune_cli.recipe.schema import Recipe
from prefixtune_cli.report import publish, tables
from prefixtune_cli.report.verdict import verdict
from prefixtune_cli.run_dir import RunDir
from tests.compare import test_run, test_runs
from tests.compare.made import comparison
from tests.heard import Heard

COLOURS = ("red", "blue", "green", "white")
# Two pairs: nats and tokens of both answers, to a base and to a model.
ITEMS = [
    {
        "tokens": {"chosen": 2, "rejected": 4},
        "nats": {
            "base": {"chosen": 6.0, "rejected": 4.0},
            "model": {"chosen": 4.0, "rejected": 7.0},
        },
    },
    {
        "tokens": {"chosen": 1, "rejected": 1},
        "nats": {
            "base": {"chosen": 1.0, "rejected": 2.0},
            "model": {"chosen": 3.0, "rejected": 1.5},
        },
    },
]


def recipe(**train: Any) -> Recipe:
    return Recipe.model_validate({"train": train})


def by(comparison: Comparison) -> list[tuple[str, str]]:
    """By what the contestants are compared: data set, metric."""
    return [(found.data, found.metric.name) for found in standings(comparison)]


def test_dpo_is_worked_out_against_the_base() -> None:
    of_dpo = recipe(objective="dpo", beta=0.5)
    found = result_of(ITEMS, "model", of_dpo)
    # By 2 nats less than the rejected answer, and then by 3 more: 5 nats. By 1 more, and then by 1.5 less.
    margins = [0.5 * 5, 0.5 * -2.5]
    assert found.losses == pytest.approx([math.log1p(math.exp(-margin)) for margin in margins])
    assert found.ahead == [1, 0]
    assert (found.nats, found.tokens, found.right) == ([4, 3], [2, 1], None)
    assert found.loss == pytest.approx(7 / 3)
    of_base = result_of(ITEMS, BASE, of_dpo)
    assert of_base.losses == pytest.approx([math.log(2)] * 2)
    assert of_base.ahead is None, "the reference rewards nothing"
    alone = [{**item, "nats": {"model": item["nats"]["model"]}} for item in ITEMS]
    assert result_of(alone, "model", of_dpo, ITEMS) == found
    assert result_of(alone, "model", of_dpo).losses is None
    gone_on = recipe(objective="dpo", start_from="runs/sft")
    assert result_of(ITEMS, "model", gone_on).losses is None, "the reference is another adapter"


def test_simpo_is_worked_out_per_token_and_without_a_base() -> None:
    of_simpo = recipe(objective="simpo", beta=2.0, gamma=0.5)
    alone = [{**item, "nats": {"model": item["nats"]["model"]}} for item in ITEMS]
    found = result_of(alone, "model", of_simpo)
    margins = [2.0 * (7 / 4 - 4 / 2), 2.0 * (1.5 - 3.0)]
    assert found.losses == pytest.approx([math.log1p(math.exp(0.5 - m)) for m in margins])
    assert found.ahead == [0, 0]
    of_base = result_of(ITEMS, BASE, of_simpo)
    assert of_base.ahead == [0, 1]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"say {COLOURS[i % 4]} {i}", "chosen": COLOURS[i % 4], "rejected": f"no {i}"}
        for i in range(60)
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_methods_are_trained_and_judged_on_pairs(
    random_base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = test_run.settings(random_base, pairs, tmp_path / "out")
    flags = {**typed.flags, "train": {**typed.flags["train"], "objective": "dpo", "beta": 0.5}}
    methods = ("prefix-tuning-plus", "lora")
    made = replace(typed, flags=flags, methods=methods, speed=True, ood=str(pairs))
    told, folder = compare(made)
    assert not told.failed
    assert {k: told.protocol[k] for k in ("objective", "beta")} == {"objective": "dpo", "beta": 0.5}
    names = [metric.name for metric in (PREFERENCE_LOSS, CHOSEN_AHEAD, LOSS_OF_CHOSEN)]
    assert by(told) == [(data, name) for data in (TEST, OOD) for name in names]
    assert told.base[TEST].preference_loss == pytest.approx(math.log(2))
    for one in told.contestants:
        best = min(one.sweep, key=lambda point: point.loss or math.inf)
        assert one.learning_rate == best.learning_rate
        found = json.loads(RunDir(best.run).summary.read_text())["preferences"]
        assert best.loss == found["loss"]
        assert best.exact_match is None
        for cell in one.cells:
            result = cell.results[TEST]
            assert len(result.losses or ()) == len(result.ahead or ()) == len(result.nats) == 6
            items = json.loads(RunDir(cell.run).eval_result("data-test").read_text())["items"]
            [who] = {*items[0]["nats"]} - {BASE}
            assert result.nats == [item["nats"][who]["chosen"] for item in items]
    first = told.contestants[0]
    assert first.results()[0].losses != first.results()[1].losses
    words = " ".join(legend(told))
    assert "2 steps of 4 pairs, objective dpo with beta 0.5" in words
    assert "What steps on preferences cost is not measured." in words
    assert "on the test data, the test data" not in words
    assert any("At the end (nats a pair)" in picture.text for picture in pictures(told))
    head, rows = columns(told)
    assert [one for one in head if one.startswith(("preference", "chosen", "loss"))] == [
        "preference loss, nats", "chosen ahead, %", "loss of chosen answers, nats",
    ]  # fmt: skip
    assert rows[0][head.index("preference loss, nats")] == "0.693"
    assert rows[0][head.index("chosen ahead, %")] == ""
    publish(told, folder)
    page = (folder / "report.html").read_text()
    assert "nats a pair of preference loss" in page
    assert "Loss (nats a pair)" in page

    heard = Heard()
    again, _ = compare(made, heard)
    assert again.contestants == told.contestants
    assert "4 of 4 cells are finished already." in heard.notices

    lost: list[str] = []

    def judge(run: str, *args: Any, **kwargs: Any) -> str | None:
        if not lost:
            lost.append(run)
            RunDir(run).eval_result("data-test").unlink()
            return "It was lost."
        return judge_cell(run, *args, **kwargs)

    monkeypatch.setattr("prefixtune_cli.compare.stages.judge_cell", judge)
    without, _ = compare(made)
    assert len(lost) == 1
    assert without.base == told.base, "the base is judged beside the next run"
    assert without.contestants[1] == told.contestants[1]
    monkeypatch.undo()
    compare(made)

    runs = [cell.run for one in told.contestants for cell in one.cells]
    of_runs = read_runs(runs)
    assert by(of_runs)[:3] == [(TEST, name) for name in names]
    assert ("data-test", PREFERENCE_LOSS.name) not in by(of_runs), "the base was judged once"
    left_out = [
        notice for notice in of_runs.notices if "the objective's loss and rewards" in notice
    ]
    assert {notice.split()[1] for notice in left_out} == {
        "eval/data-data-test.json",
        "eval/data-ood.json",
    }
    for one in of_runs.contestants:
        for cell in one.cells:
            summary = json.loads(RunDir(cell.run).summary.read_text())["preferences"]
            assert cell.results[TEST].preference_loss == summary["loss"]
            assert cell.results[TEST].chosen_ahead == summary["reward_accuracy"]


def test_methods_are_trained_and_judged_on_labelled_answers(
    random_base: Path, tmp_path: Path
) -> None:
    rows = [
        {
            "prompt": f"say {COLOURS[i % 4]} {i}",
            "completion": COLOURS[i % 4] if i % 2 else f"no {i}",
            "label": bool(i % 2),
        }
        for i in range(60)
    ]
    file = tmp_path / "labelled.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    typed = test_run.settings(random_base, file, tmp_path / "out")
    own = {"objective": "kto", "beta": 0.5, "undesirable_weight": 1.2}
    flags = {**typed.flags, "train": {**typed.flags["train"], **own}}
    told, folder = compare(replace(typed, flags=flags, methods=("prefix-tuning-plus", "lora")))
    assert not told.failed
    assert {key: told.protocol[key] for key in own} == own
    assert by(told) == [(TEST, metric.name) for metric in OF_LABELLED]
    base = told.base[TEST]
    assert base.preference_loss == pytest.approx((0.5 + 1.2 * 0.5) / 2)
    assert base.chosen_ahead is None, "the reference rewards nothing"
    assert len(base.losses or ()) == 6
    assert len(base.nats) == 3, "the desirable answers alone"
    for one in told.contestants:
        best = min(one.sweep, key=lambda point: point.loss or math.inf)
        assert best.loss == json.loads(RunDir(best.run).summary.read_text())["preferences"]["loss"]
        for cell in one.cells:
            result = cell.results[TEST]
            assert len(result.losses or ()) == 6
            assert len(result.ahead or ()) == len(result.nats) == 3
    words = " ".join(legend(told))
    assert "2 steps of 4 examples, objective kto with beta 0.5, desirable weight 1 and" in words
    head, _ = columns(told)
    assert [one for one in head if "KTO" in one or "desirable" in one] == [
        "KTO's loss", "desirable ahead, %", "loss of desirable answers, nats",
    ]  # fmt: skip
    publish(told, folder)
    assert "Loss (KTO's, an answer)" in unescape((folder / "report.html").read_text())


def test_the_losses_of_other_betas_are_not_compared(tmp_path: Path) -> None:
    runs = [of_pairs(tmp_path / f"{beta}", beta=beta) for beta in (0.1, 0.5)]
    made = read_runs(runs)
    assert made.base[TEST].preference_loss == pytest.approx(math.log(2))
    assert made.base[TEST].chosen_ahead is None, "the reference rewards nothing"
    assert by(made) == [(TEST, CHOSEN_AHEAD.name), (TEST, LOSS_OF_CHOSEN.name)]
    assert made.notices == []
    told = str(tables.runs(made))
    assert CHOSEN_AHEAD.name in told
    assert PREFERENCE_LOSS.name not in told
    assert "objective dpo, cosine" in " ".join(legend(made))
    with pytest.raises(RunDirError, match=r"different objectives: dpo in .*; simpo in "):
        read_runs([runs[0], of_pairs(tmp_path / "simpo", objective="simpo")])
    for objective in ("simpo", "orpo"):  # which has DPO's beta
        other = of_pairs(tmp_path / f"as-{objective}", objective=objective)
        anyway = read_runs([runs[0], other], anyway=True)
        assert by(anyway) == [(TEST, LOSS_OF_CHOSEN.name)]


def test_against_different_starts_dpo_is_not_compared(tmp_path: Path) -> None:
    runs = []
    for sha in ("a", "b"):
        start = {"start": {"folder": f"runs/{sha}", "sha256": sha}}
        runs.append(of_pairs(tmp_path / sha, environment=start, start_from=f"runs/{sha}"))
    assert by(read_runs(runs, anyway=True)) == [(TEST, LOSS_OF_CHOSEN.name)]


def test_pairs_that_a_run_does_not_tell_are_an_error(tmp_path: Path) -> None:
    runs = [of_pairs(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    summary = RunDir(runs[1]).summary
    found = json.loads(summary.read_text())
    for broken in (None, {**found["preferences"], "loss": None}):
        summary.write_text(json.dumps(found | {"preferences": broken}))
        with pytest.raises(RunDirError, match=r"The run .*b cannot be read"):
            read_runs(runs)


def test_other_data_of_runs_on_pairs_is_compared_as_it_is(tmp_path: Path) -> None:
    runs = [of_pairs(tmp_path / name, seed=i) for i, name in enumerate("ab")]
    for run in runs:
        folder = str(RunDir(run).adapter)
        subjects = [{"name": "adapter", "folder": folder}]
        qa = {"origin": "qa.jsonl, line 1", "tokens": 2, "nats": {"adapter": 3.0}}
        found = {"data": {"source": "qa.jsonl", "sha256": "c"}, "subjects": subjects}
        for name, items in (("qa", [qa | {"right": {"adapter": True}}]), ("long", [qa])):
            file = RunDir(run).eval_result(f"data-{name}")
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps({**found, "items": items}))
    told = by(read_runs(runs))
    assert [one for one in told if one[0] != TEST] == [("long", "loss"), ("qa", "exact match")]


def test_the_figures_of_a_data_set_are_told_once_how_they_were_tested(tmp_path: Path) -> None:
    runs = [of_pairs(tmp_path / method, method=method) for method in ("lora", "ia3")]
    for run in runs:
        subjects = [{"name": "adapter", "folder": str(RunDir(run).adapter)}]
        row = {"origin": "x", "tokens": 2, "nats": {"adapter": 3.0}, "right": {"adapter": True}}
        found = {"data": {"source": "qa.jsonl", "sha256": "c"}, "subjects": subjects}
        file = RunDir(run).eval_result("data-qa")
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({**found, "items": [row, row]}))
    made = read_runs(runs)
    lines = [line for line in legend(made) if line.startswith("Differences")]
    assert [[name for name in ("the test data", "qa") if f" on {name} " in line] for line in lines] == [
        ["the test data"], ["qa"],
    ]  # fmt: skip
    details = [detail for said in verdict(made) for detail in said.details]
    assert sum("on the test data are not tested" in detail for detail in details) == 1


def test_p_values_are_adjusted_for_all_metrics_of_a_data_set() -> None:
    made = comparison(base={}, protocol={"objective": "dpo", "beta": 0.1, "seeds": [0, 1]})
    draw = random.Random(0)

    def cells(ahead: float) -> list[Cell]:
        noise = [[draw.gauss(0, 1) for _ in range(20)] for _ in range(2)]
        return [
            Cell(i, f"run-{i}", results={TEST: Result(
                [5 + n + ahead for n in of], [4] * 20, kind="pairs",
                losses=[1 + n / 9 + ahead for n in of], ahead=[float(n > 0) for n in of],
            )})
            for i, of in enumerate(noise)
        ]  # fmt: skip

    two = [replace(c, cells=cells(0.1 * i)) for i, c in enumerate(made.contestants[:2])]
    found = standings(replace(made, contestants=two))
    assert [one.metric.name for one in found] == [m.name for m in OF_PAIRS]
    p_values = [one.each[1].difference.p_value for one in found if one.each[1].difference]
    alone = [
        crossed_difference(
            np.array([c.results[TEST].each(m.key) for c in two[1].cells])
            - np.array([c.results[TEST].each(m.key) for c in two[0].cells])
        ).p_value
        for m in OF_PAIRS
    ]
    smallest = min(range(3), key=lambda i: alone[i] or 0)
    assert p_values[smallest] == pytest.approx(min(1.0, 3 * (alone[smallest] or 0)))


def test_runs_on_pairs_are_not_compared_with_runs_on_answers(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match=r"from .*answers, others from .*: they share no figure"):
        read_runs([test_runs.run(tmp_path / "a"), of_pairs(tmp_path / "b")], anyway=True)


def test_costs_alone_are_of_steps_on_answers() -> None:
    flags = {"train": {"objective": "dpo"}}
    with pytest.raises(UsageError, match="--speed measures steps on answers, not on preferences"):
        compare_costs(Settings(flags=flags, methods=("lora",)))


def of_pairs(
    out: Path,
    method: str = "lora",
    *,
    seed: int = 0,
    environment: dict[str, Any] | None = None,
    **train: Any,
) -> str:
    """A finished run on pairs."""
    steps = {"objective": "dpo", **train}
    run = test_runs.run(out, method, seed=seed, environment=environment, train=steps)
    summary = RunDir(out).summary
    ends = {"low": 0.0, "high": 1.0}
    one = {"accuracy": 0.5, "chosen": -3.0, "rejected": -4.0}
    found = {
        "pairs": 4, "beta": 0.1, "base": one, "adapter": one, "start": None, "gamma": None,
        "accuracy_difference": {"value": 0.0, **ends}, "reward_accuracy": 0.75, "reward_interval": ends,
        "margin": 0.1, "margin_interval": ends, "loss": 0.6, "reference_loss": math.log(2),
    }  # fmt: skip
    more = {"preferences": found, "why_no_exact_match": "No answer is matched."}
    summary.write_text(json.dumps(json.loads(summary.read_text()) | more))
    return run

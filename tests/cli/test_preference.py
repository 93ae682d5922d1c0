"""`ptp train --objective dpo` as it is typed, on the sample that comes with `ptp`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from prefixtune_cli.compare.finished_run import result_of
from prefixtune_cli.evaluate.preferences import Preferences
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection, PrefixTuningPlus
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.tokenizer import load_tokenizer
from tests.cli.conftest import Ptp
from tests.cli.test_eval import save_adapter, save_run

ROWS = ("base", "start", "adapter")


def test_the_sample_is_learned_and_both_models_preferences_are_printed(
    ptp: Ptp, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    typed = ["train", "--data", "sample:preferences", "--objective", "dpo", "--out", out]
    code, printed, said = ptp(*typed, "--bits", 32, "--steps", 12, "--eval-split", 0.2)
    assert code == 0, said
    assert "a third of sft's for dpo" in said
    stored = json.loads(RunDir(out).summary.read_text())
    assert stored["verdict"] == "better"
    found = Preferences.of_json(stored["preferences"])
    assert (found.pairs, found.beta) == (60, 0.1)
    assert found.reward_accuracy > 0.9
    assert found.reward_interval.low > 0.5
    assert found.margin_interval.low > 0
    table = printed.split("held-out pairs of answers")[1].splitlines()
    base = next(line for line in table if line.startswith("base"))
    assert base.split()[1:4] == [
        f"{100 * found.base.accuracy:.1f}",
        "%",
        f"{found.base.chosen:.2f}",
    ]
    assert f"by a margin of {found.margin:+.3f}" in printed
    moved = stored["divergence"]["value"]
    assert f"On these answers the adapter is {moved:.3f} nats a token away from the base" in printed


def test_by_simpo_the_figures_are_per_token_and_each_model_has_a_loss(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    typed = ["train", "--model", random_base, "--bits", 32, "--data", "sample:preferences"]
    short = ["--steps", 4, "--batch-size", 8, "--eval-split", 0.2, "--max-length", 256]
    chosen = ["--objective", "simpo", "--gamma", 0.75]
    code, printed, said = ptp(*typed, *short, *chosen, "--out", tmp_path / "run")
    assert code == 0, said
    assert "a tenth of sft's for simpo" in said
    found = Preferences.of_json(
        json.loads(RunDir(tmp_path / "run").summary.read_text())["preferences"]
    )
    assert (found.beta, found.gamma) == (2.0, 0.75)
    words = " ".join(printed.split())
    assert "(mean log-probabilities in nats per token)" in words
    assert f"SimPO's loss is {found.loss:.4f}, the base's {found.reference_loss:.4f}." in words
    assert f"ahead in {100 * found.adapter.accuracy:.1f} % of the pairs" in words


def test_eval_finds_on_pairs_what_the_run_has_found_whatever_their_columns(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    rows = [
        {"asked": f"Say {word}, {i}.", "better": word.upper(), "worse": f"{word} {word}"}
        for i in range(12)
        for word in ("red", "blue", "green")
    ]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for file, some in ((train, rows[9:]), (test, rows[:9])):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    run = RunDir(tmp_path / "run")
    typed = ["train", "--model", random_base, "--bits", 32, "--data", train, "--eval-data", test]
    columns = ["--map", "prompt=asked,chosen=better,rejected=worse", "--objective", "dpo"]
    code, printed, said = ptp(*typed, *columns, "--steps", 4, "--lr", 0.03, "--out", run.path)
    assert code == 0, said
    assert f"ptp eval --run {run.path} --data {test}" in printed
    code, printed, said = ptp("eval", "--run", run.path, "--data", test)
    assert code == 0, said
    assert "chosen is likelier per token" in printed
    of_run = Preferences.of_json(json.loads(run.summary.read_text())["preferences"])
    found = json.loads(run.eval_result("data-test").read_text())
    lines = {line["metric"]: line for line in found["lines"]}
    [adapter] = {*lines["chosen"]["values"]} - {"base"}
    for model, one in (("base", of_run.base), (adapter, of_run.adapter)):
        assert lines["chosen is likelier"]["values"][model] == pytest.approx(one.accuracy)
        assert lines["chosen"]["values"][model] == pytest.approx(one.chosen, rel=1e-4)
        assert lines["rejected"]["values"][model] == pytest.approx(one.rejected, rel=1e-4)
    [more] = lines["margin"]["differences"].values()
    assert 0.1 * more["value"] == pytest.approx(of_run.margin, rel=1e-2)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"asked": "a", "completion": "b"}) + "\n")
    code, printed, said = ptp("eval", "--run", run.path, "--data", answers)
    assert code == 0, said
    assert "perplexity" in printed
    broken = tmp_path / "broken.jsonl"
    broken.write_text(
        "".join(json.dumps(row) + "\n" for row in [*rows[:2], {"asked": "a", "better": "b"}])
    )
    code, _, said = ptp("eval", "--run", run.path, "--data", broken)
    assert code == 1
    assert "line 3: --map rejected=worse names a column that is missing" in " ".join(said.split())
    both = tmp_path / "both.jsonl"
    both.write_text(json.dumps({**rows[0], "messages": [{"role": "user", "content": "a"}]}) + "\n")
    code, printed, said = ptp("eval", "--run", run.path, "--data", both)
    assert code == 0, said
    assert "chosen is likelier" in printed


def test_by_kto_labelled_answers_are_learned_and_eval_finds_what_the_run_has_found(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    rows = [
        {"asked": f"Say {word}, {i}.", "said": word.upper() if i % 2 else "blue", "good": i % 2 > 0}
        for i in range(12)
        for word in ("red", "green", "white")
    ]
    train, test = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    for file, some in ((train, rows[9:]), (test, rows[:9])):
        file.write_text("".join(json.dumps(row) + "\n" for row in some))
    run = RunDir(tmp_path / "run")
    typed = ["train", "--model", random_base, "--bits", 32, "--data", train, "--eval-data", test]
    columns = ["--map", "prompt=asked,completion=said,label=good", "--objective", "kto"]
    code, printed, said = ptp(*typed, *columns, "--steps", 4, "--lr", 0.03, "--out", run.path)
    assert code == 0, said
    assert "15 answers are desirable, 12 are not" in said
    stored = json.loads(run.summary.read_text())
    of_run = Preferences.of_json(stored["preferences"])
    words = " ".join(printed.split())
    assert "On 9 held-out labelled answers (mean log-probabilities in nats): " in words
    assert "desirable is likelier desirable undesirable" in words
    assert f"the desirable answer is ahead in {100 * of_run.reward_accuracy:.1f} % of" in words
    assert f"KTO's loss is {of_run.loss:.4f}, the base's 0.5000." in words
    assert "The desirable answers by themselves:" in words

    code, printed, said = ptp("eval", "--run", run.path, "--data", test)
    assert code == 0, said
    found = json.loads(run.eval_result("data-test").read_text())
    lines = {line["metric"]: line for line in found["lines"]}
    [adapter] = {*lines["desirable"]["values"]} - {"base"}
    for model, one in (("base", of_run.base), (adapter, of_run.adapter)):
        likelier = lines["desirable is likelier per token"]["values"][model]
        assert likelier == pytest.approx(one.accuracy)
        assert lines["desirable"]["values"][model] == pytest.approx(one.chosen, rel=1e-4)
        assert lines["undesirable"]["values"][model] == pytest.approx(one.rejected, rel=1e-4)
    result = result_of(found["items"], adapter, resolve(str(run.recipe)))
    assert result.preference_loss == pytest.approx(of_run.loss, rel=1e-4)
    assert result.chosen_ahead == pytest.approx(of_run.reward_accuracy)
    assert result.loss == pytest.approx(stored["adapter"]["loss"], rel=1e-4)

    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"asked": "Say red.", "said": "RED"}) + "\n")
    code, printed, said = ptp("eval", "--run", run.path, "--data", answers)
    assert code == 0, said
    assert "perplexity" in printed

    named = tmp_path / "named.jsonl"
    row = {"prompt": "Say red.", "completion": "RED", "label": True}
    named.write_text("".join(json.dumps(row | {"label": x}) + "\n" for x in (True, False)))
    code, printed, said = ptp("eval", "--model", random_base, "--bits", 32, "--data", named)
    assert code == 0, said
    assert "desirable is likelier per token" in printed


def test_pairs_are_read_by_the_runs_on_pairs_and_their_answers_alone_count(
    ptp: Ptp, random_base: Path, tmp_path: Path
) -> None:
    pairs = tmp_path / "pairs.jsonl"
    row = {"prompt": "Say red.", "chosen": "RED", "rejected": "blue"}
    pairs.write_text(json.dumps(row) + "\n")
    adapter = save_adapter(tmp_path / "adapter", random_base, PrefixTuningPlus(), seed=1)
    whole = save_run(tmp_path / "whole", random_base, adapter, data={"train_on": "all"})
    code, _, said = ptp("eval", "--run", whole, "--data", pairs, "--answer-pattern", "(R.*)")
    assert code == 0, said
    assert "--answer-pattern judges generated answers, of which data-pairs has none" in said
    [item] = json.loads(RunDir(whole).eval_result("data-pairs").read_text())["items"]
    tokens = load_tokenizer(ModelSection(name=str(random_base)))
    assert item["tokens"]["chosen"] <= len(tokens.encode("RED")) + 1  # and the end of the turn

    maps = ({"chosen": "chosen"}, {"chosen": "rejected", "rejected": "chosen"})
    runs = []
    for i, columns in enumerate(maps):
        other = save_adapter(tmp_path / f"adapter-{i}", random_base, PrefixTuningPlus(), seed=i)
        sections = {"data": {"map": columns}, "train": {"objective": "dpo"}}
        runs += ["--run", save_run(tmp_path / f"run-{i}", random_base, other, **sections)]
    code, _, said = ptp("eval", *runs, "--data", pairs)
    assert code == 2
    assert "The runs read the columns of pairs differently" in said


def test_rates_are_not_tried_for_pairs(ptp: Ptp) -> None:
    typed = ["train", "--data", "sample:preferences", "--objective", "dpo"]
    code, _, said = ptp(*typed, "--find-learning-rate")
    assert code == 2
    assert "--find-learning-rate does not try rates for objective dpo yet" in said


def test_answers_then_preferences_and_what_is_printed_is_against_the_start(
    ptp: Ptp, random_base: Path, colours: Path, tmp_path: Path
) -> None:
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    short = ["--steps", 4, "--batch-size", 8, "--eval-split", 0.2, "--max-length", 256]
    typed = ["train", "--model", random_base, "--bits", 32, "--data", colours, "--out", sft]
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}")
    code, _, said = ptp(*typed, *short, "--sites", "ffn", "--lr", 0.1, "--chat-template", template)
    assert code == 0, said
    code, printed, said = ptp("inspect-data", colours, "--from", sft, "--examples", 1)
    assert code == 0, said
    assert "<user>Say the colour" in printed
    assert "tokens of tiny" not in said
    typed = ["train", "--from", sft, "--data", "sample:preferences", "--objective", "dpo"]
    code, printed, said = ptp(*typed, *short, "--out", dpo)
    assert code == 0, said
    assert f"It went on from {sft}." in printed
    found = Preferences.of_json(json.loads(RunDir(dpo).summary.read_text())["preferences"])
    table = printed.split("held-out pairs of answers")[1].split("Difference")[0].splitlines()
    rows = {name: line.split() for line in table if (name := line.partition(" ")[0]) in ROWS}
    assert list(rows) == list(ROWS)
    assert found.start is not None
    assert rows["start"][3] == f"{found.start.chosen:.2f}" != rows["base"][3]
    words = " ".join(printed.split())
    assert "By the implicit reward against the start" in words
    assert f"DPO's loss is {found.loss:.4f}, the start's 0.6931." in words
    assert "Trained" in printed
    assert resolve(str(RunDir(dpo).recipe)).adapter.sites == "ffn"  # type: ignore[union-attr]

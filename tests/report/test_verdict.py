"""The sentences of a report's verdict."""

from dataclasses import replace

from prefixtune_cli.compare.comparison import TEST, Cell, Comparison, Contestant, Result
from prefixtune_cli.compare.legend import legend
from prefixtune_cli.report.verdict import verdict
from tests.compare.made import FAILURE, comparison, contestant, in_groups


def of(shares: dict[str, list[float]], rows: int = 40) -> Comparison:
    """Contestants judged only on TEST: the share of right answers of each seed, from the first row on."""
    contestants = [
        replace(
            contestant("lora"),
            label=label,
            trainable_parameters=None,
            cost=None,
            cells=[
                Cell(s, "r", results={TEST: judged(share, rows)}) for s, share in enumerate(each)
            ],
        )
        for label, each in shares.items()
    ]
    return comparison(contestants=contestants, base={}, base_cost=None)


def judged(share: float, rows: int) -> Result:
    right = [row < round(share * rows) for row in range(rows)]
    return Result([1.0] * rows, [2] * rows, right)


def leads(found: Comparison) -> list[str]:
    return [said.lead for said in verdict(found)]


def test_the_first_sentence_says_that_the_first_contestant_loses() -> None:
    first = leads(comparison())[0]
    assert first.startswith("On the test data, full has the best mean: 93.3 ± 1.4 % right answers")
    assert "prefix-tuning-plus (70.0 ± 0.0 % right answers) is behind it by 23.3 points" in first
    assert "; the base alone has 15.0 % right answers. " in first
    assert first.endswith("; this is larger than noise.")


def test_a_first_contestant_that_wins_is_named_as_the_best() -> None:
    said = verdict(of({"mine": [0.9, 0.85, 0.9], "other": [0.2, 0.25, 0.2]}))
    assert said[0].lead == (
        "On the test data, mine has the best mean: 88.3 ± 2.9 % right answers (mean of 3 seeds). "
        "Its lead is larger than noise."
    )
    assert (
        said[0]
        .details[0]
        .startswith(
            "other is 66.7 points worse than mine; this is larger than noise (95 % interval of the difference −"
        )
    )


def test_a_difference_within_the_noise_is_called_so() -> None:
    said = verdict(of({"mine": [0.5, 0.6, 0.4], "other": [0.6, 0.4, 0.525]}))[0]
    assert "is behind it by 0.8 points; this may be noise" in said.lead
    assert (
        "better than mine; this may be noise (95 % interval of the difference −" in said.details[0]
    )


def test_a_lead_within_the_noise_is_called_so() -> None:
    found = of({"mine": [0.6, 0.4, 0.525], "near": [0.5, 0.6, 0.4], "far": [0.1, 0.1, 0.15]})
    assert verdict(found)[0].lead.endswith("Its lead over near may be noise.")


def test_a_mean_that_is_best_by_a_failed_seed_is_not_called_a_lead() -> None:
    found = of({"mine": [0.1, 0.6], "other": [0.2, 0.5]})
    mine, other = found.contestants
    other = replace(other, cells=[Cell(0, "r", failure=FAILURE), other.cells[1]])
    lead = verdict(replace(found, contestants=[mine, other]))[0].lead
    assert "other has the best mean: 50.0 % right answers (one seed)" in lead
    assert lead.endswith(
        "On the seeds that both finished, mine (35.0 ± 35.4 % right answers) is not behind it."
    )


def test_equal_means_are_shared() -> None:
    said = verdict(of({"mine": [0.5, 0.5], "other": [0.5, 0.5]}))[0]
    assert "mine and other share the best mean: 50.0 ± 0.0 % right answers" in said.lead
    assert said.details[0] == "other is level with mine."


def test_means_that_are_shown_alike_are_a_tie() -> None:
    found = of({"mine": [0.5], "other": [0.5]})
    mine, other = found.contestants
    nearly = Result([1.0002], [1], None)
    exact = Result([1.0], [1], None)
    cells = [[Cell(0, "r", results={TEST: result})] for result in (nearly, exact)]
    tied = [replace(c, cells=own) for c, own in zip((mine, other), cells, strict=True)]
    said = verdict(replace(found, contestants=tied))[0]
    assert (
        said.lead
        == "On the test data, mine and other share the best mean: 1.000 nats a token of loss (one seed)."
    )
    assert said.details[0] == "other is level with mine."


def test_costs_that_are_alike_have_no_winner() -> None:
    lora = contestant("lora")
    twins = [replace(lora, label=name) for name in ("lora a", "lora b")]
    said = leads(comparison(contestants=[*twins, contestant("full")]))
    assert "lora a and lora b alike train the fewest parameters: 224,256." in said
    assert "lora a and lora b alike train fastest: 4,100 tokens/s." in said


def test_one_seed_is_said_to_show_nothing_of_other_seeds() -> None:
    said = verdict(of({"mine": [0.5], "other": [0.9]}))[0]
    assert "(one seed)" in said.lead
    assert "with other seeds it may turn out otherwise" in said.details[-1]


def test_runs_on_other_rows_are_not_tested() -> None:
    found = of({"mine": [0.5, 0.5], "other": [0.9, 0.9]})
    said = verdict(replace(found, data={TEST: {"same_rows": False}}))[0]
    assert "this was not tested" in said.lead
    assert said.details == (
        ["other is 40.0 points better than mine; this was not tested.",
         "Differences on the test data are not tested: not every run was judged on the same rows."]
    )  # fmt: skip


def test_single_figures_are_not_tested_and_legend_and_verdict_say_so_alike() -> None:
    found = of({"mine": [0.5], "other": [0.9]}, rows=1)
    said = verdict(found)[0]
    assert "this was not tested" in said.lead
    assert said.details[-1] == (
        "Differences on the test data are not tested: there is one figure of each."
    )
    assert "Differences from mine are not tested: there is one figure of each." in legend(found)
    best = verdict(of({"mine": [0.9], "other": [0.4]}, rows=1))[0]
    assert best.lead.endswith("Whether its lead is larger than noise was not tested.")


def test_what_the_tests_do_not_cover_is_said_alike_in_legend_and_verdict() -> None:
    one_seed = of({"mine": [0.5], "other": [0.9]})
    of_losses = of({"mine": [0.5, 0.5, 0.5], "other": [0.5, 0.5, 0.5]})
    bare = [
        replace(
            c,
            cells=[
                replace(cell, results={TEST: Result([i + cell.seed**i], [1])}) for cell in c.cells
            ],
        )
        for i, c in enumerate(of_losses.contestants)
    ]
    for found, limit in (
        (one_seed, "not every difference is tested over several seeds: with other seeds it may turn out otherwise."),
        (replace(of_losses, contestants=bare), "differences are tested over seeds alone, not over rows."),
    ):  # fmt: skip
        assert verdict(found)[0].details[-1] == f"On the test data {limit}"
        (line,) = (line for line in legend(found) if line.startswith("Differences from mine"))
        assert line.endswith(f" {limit.capitalize()}")


def test_forgetting_is_told_as_loss_above_the_bases() -> None:
    (lead,) = (lead for lead in leads(comparison()) if lead.startswith("On unrelated text"))
    assert "nats a token more loss than the base" in lead
    assert "the base alone" not in lead


def test_the_cheapest_is_named_beside_the_first() -> None:
    said = leads(comparison())
    assert (
        "prefix-tuning trains the fewest parameters: 24,576 (prefix-tuning-plus: 49,152)." in said
    )
    assert "prefix-tuning-plus trains fastest: 5,200 tokens/s." in said


def test_the_cheapest_is_sought_among_those_that_were_measured_together() -> None:
    said = leads(in_groups())
    assert "prefix-tuning-plus trains the fewest parameters: 49,152." in said
    assert "prefix-tuning trains the fewest parameters: 24,576." in said
    assert [lead for lead in said if "fastest" in lead] == [
        "prefix-tuning-plus trains fastest: 5,200 tokens/s."
    ]


def test_failed_runs_are_counted() -> None:
    assert leads(comparison(failed=True))[-1] == (
        "Some runs failed, and the figures are without them: 1 of prefix-tuning. The reasons are under Runs."
    )


def test_a_comparison_in_which_all_failed_has_no_winner() -> None:
    def dead(one: Contestant) -> Contestant:
        return replace(one, cells=[Cell(0, "r", failure=FAILURE)], cost=None)

    found = comparison()
    said = leads(replace(found, contestants=[dead(c) for c in found.contestants]))
    assert said[0] == "No run has a result, so nobody wins."
    assert "1 of prefix-tuning-plus, 1 of lora, 1 of prefix-tuning and 1 of full" in said[-1]


def test_of_costs_alone_the_fastest_is_told() -> None:
    found = comparison(kind="speed", base={})
    bare = replace(found, contestants=[replace(c, cells=[]) for c in found.contestants])
    assert leads(bare)[0].startswith("No quality was measured")
    assert "prefix-tuning-plus trains fastest: 5,200 tokens/s." in leads(bare)

"""The table and the text below it."""

import json
from dataclasses import replace

import pytest

from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Comparison, Point
from prefixtune_cli.compare.legend import legend
from prefixtune_cli.compare.standing import standings_on
from prefixtune_cli.compare.table import columns, markdown
from tests.compare.made import FAILURE, comparison, cost, in_groups


def cell(made: Comparison, row: str, column: str) -> str:
    head, rows = columns(made)
    found = next(cells for cells in rows if cells[0] == row)
    return found[head.index(column)]


def test_every_figure_of_the_issue_has_a_column_with_its_unit() -> None:
    head, rows = columns(comparison())
    assert head == [
        "method",
        "exact match, %",
        "difference from prefix-tuning-plus, points",
        "trained parameters, k",
        "adapter on disk, MB",
        "learning rate",
        "training, tokens/s",
        "peak memory, GiB",
        "decode, tokens/s",
        "first token, ms",
        "KV cache a sequence, MB",
        "OOD: exact match, %",
        "forgetting, nats",
    ]
    assert [row[0] for row in rows] == [
        "base", "prefix-tuning-plus", "lora", "prefix-tuning", "full"
    ]  # fmt: skip
    assert {len(row) for row in rows} == {len(head)}


def test_figures_have_the_digits_that_mean_something() -> None:
    made = comparison()
    assert cell(made, "lora", "exact match, %") == "90.0 ± 4.3"
    assert cell(made, "lora", "trained parameters, k") == "224"
    assert cell(made, "full", "trained parameters, k") == "6,013"
    assert cell(made, "lora", "adapter on disk, MB") == "0.897"
    assert cell(made, "full", "learning rate") == "0.0003"
    assert cell(made, "lora", "training, tokens/s") == "4,100 (3,895–4,305)"
    assert cell(made, "lora", "first token, ms") == "12.2 (11.6–12.8)"
    assert cell(made, "lora", "KV cache a sequence, MB") == "6.291"


def test_a_prefix_in_the_cache_is_seen() -> None:
    """The context is 1,024 tokens, and a virtual prefix of 32 comes on top."""
    assert cell(comparison(), "prefix-tuning", "KV cache a sequence, MB") == "6.488"


def test_the_difference_has_an_interval_and_a_mark() -> None:
    made = comparison()
    found = standings_on(made, TEST).each[1].difference
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.larger_than_noise
    shown = cell(made, "lora", "difference from prefix-tuning-plus, points")
    assert shown == f"+20.0 [{100 * found.low:+.1f}, {100 * found.high:+.1f}] †"
    assert cell(made, "prefix-tuning-plus", "difference from prefix-tuning-plus, points") == ""


def test_a_difference_within_the_noise_has_no_mark() -> None:
    made = comparison()
    twin = replace(made.contestants[0], label="twin")
    made = replace(made, contestants=[made.contestants[0], twin])
    assert cell(made, "twin", "difference from prefix-tuning-plus, points") == "+0.0 [+0.0, +0.0]"


def test_the_best_is_bold_in_markdown_and_starred_in_a_terminal() -> None:
    made = comparison()
    assert cell(made, "full", "exact match, %") == "93.3 ± 1.4 *"
    text = markdown(made)
    assert "| **93.3 ± 1.4** |" in text
    assert "bold: the best mean" in text
    assert "*: the best mean" in " ".join(legend(made))
    assert cell(made, "prefix-tuning", "forgetting, nats").endswith("*")


def test_columns_without_a_figure_are_left_out() -> None:
    made = comparison(base={}, base_cost=None)
    bare = [
        replace(
            c,
            cost=None,
            learning_rate=None,
            cells=[replace(x, results={TEST: x.results[TEST]}) for x in c.cells],
        )
        for c in made.contestants
    ]
    head, rows = columns(replace(made, contestants=bare))
    assert head == [
        "method",
        "exact match, %",
        "difference from prefix-tuning-plus, points",
        "trained parameters, k",
        "adapter on disk, MB",
    ]
    assert rows[0][0] == "prefix-tuning-plus"


def test_a_failed_cell_is_said_in_its_row_and_explained_below() -> None:
    made = comparison(failed=True)
    _, rows = columns(made)
    assert rows[3][0] == "prefix-tuning (2 of 3 seeds)"
    assert legend(made)[0] == f"prefix-tuning, seed 1, has no result: {FAILURE}"
    assert f"- prefix-tuning, seed 1, has no result: {FAILURE}\n" in markdown(made)


def test_a_contestant_without_any_cell_has_failed() -> None:
    made = comparison(failed=True)
    loser = made.contestants[2]
    cells = [replace(loser.cells[1], seed=s) for s in (0, 1, 2)]
    lost = replace(loser, cells=cells, trainable_parameters=None, adapter_bytes=None)
    made = replace(made, contestants=[made.contestants[0], lost])
    assert cell(made, "prefix-tuning (0 of 3 seeds)", "exact match, %") == "failed"


def test_the_legend_says_what_was_tested_and_on_what() -> None:
    text = "\n".join(legend(comparison()))
    assert "Means over 3 seeds, ± their standard deviation" in text
    assert "paired by seed and row" in text
    assert "Holm" in text
    assert "120 steps of 16 examples, cosine schedule, seeds 0, 1, 2" in text
    assert "a sweep of 3 learning rates each" in text
    assert "test sample:intents-test, 40 rows" in text
    assert "one sequence with a prompt of 1,024 tokens" in text
    assert "Command: ptp compare --model tiny --recipe quickstart --seeds 3" in text


@pytest.mark.parametrize(
    ("seeds", "said"),
    [(1, "with other seeds it may turn out otherwise"), (2, "up to 13 %")],
)
def test_few_seeds_are_called_so(seeds: int, said: str) -> None:
    made = comparison()
    few = [replace(c, cells=c.cells[:seeds]) for c in made.contestants]
    assert said in "\n".join(legend(replace(made, contestants=few)))
    assert said not in "\n".join(legend(made))


def test_rows_that_differ_are_said_not_to_be_tested() -> None:
    made = comparison(data={TEST: {"source": "x", "rows": 40, "same_rows": False}})
    assert (
        "on the test data are not tested: not every run was judged on the same rows"
        in "\n".join(legend(made))
    )
    assert "†" not in cell(made, "lora", "difference from prefix-tuning-plus, points")


def test_a_learning_rate_at_the_end_of_its_sweep_is_said() -> None:
    made = comparison()
    first = made.contestants[0]
    assert "of its sweep" not in "\n".join(legend(made))
    edge = replace(first, learning_rate=first.sweep[-1].learning_rate)
    said = legend(replace(made, contestants=[edge]))
    assert (
        "prefix-tuning-plus: the chosen learning rate, 0.03, is the highest of its sweep, so a better one may lie "
        "beyond. --sweep 5 looks further."
    ) in said
    failed = [replace(point, loss=None) for point in edge.sweep]
    lost = legend(replace(made, contestants=[replace(edge, sweep=failed)]))
    assert not any("of its sweep" in line for line in lost)


def test_a_learning_rate_that_failed_is_said_with_its_reason() -> None:
    made = comparison()
    first = made.contestants[0]
    failed = Point(1.0, None, None, "x", "The loss is nan.")
    made = replace(made, contestants=[replace(first, sweep=[*first.sweep, failed])])
    assert "prefix-tuning-plus failed at learning rate 1: The loss is nan." in legend(made)


def test_speed_alone_has_costs_with_ratios_to_the_base_and_to_lora() -> None:
    made = comparison(kind="speed")
    head, _ = columns(made)
    assert not [name for name in head if "match" in name or "OOD" in name or "forgetting" in name]
    assert "learning rate" not in head
    assert cell(made, "base", "training × base") == "1"
    assert cell(made, "lora", "training × base") == "0.820 (0.779–0.861)"
    assert cell(made, "lora", "training × lora") == "1"
    assert cell(made, "prefix-tuning-plus", "training × lora") == "1.27 (1.20–1.33)"
    assert cell(made, "prefix-tuning-plus", "first token × lora") == "1.27 (1.20–1.33)"
    assert cell(made, "base", "decode × lora") == "1.22 (1.16–1.28)"


def test_each_group_stands_under_its_own_base() -> None:
    made = in_groups()
    _, rows = columns(made)
    assert [row[0] for row in rows] == [
        "base max_length=8", "prefix-tuning-plus", "lora",
        "base max_length=9", "prefix-tuning", "full",
    ]  # fmt: skip
    assert cell(made, "base max_length=8", "training, tokens/s") == "5,000 (4,750–5,250)"
    assert cell(made, "base max_length=8", "training × base") == "1"
    assert cell(made, "base max_length=9", "training × base") == ""
    assert cell(made, "lora", "decode × lora") == "1"
    assert cell(made, "full", "trained parameters, k") == "6,013"
    said = legend(made)
    assert "base max_length=9: its cost was not measured. The memory does not suffice." in said
    assert any("the same base" in line for line in said)
    assert not any("the same base" in line for line in legend(comparison(kind="speed")))


def test_each_group_has_its_own_lora() -> None:
    made = in_groups()
    second = replace(made.contestants[3], label="lora 9", method="lora", cost=cost(9, 0, ratio=1))
    groups = [made.groups[0], replace(made.groups[1], contestants=["prefix-tuning", "lora 9"])]
    made = replace(made, contestants=[*made.contestants[:3], second], groups=groups)
    assert cell(made, "lora 9", "training × lora") == cell(made, "lora", "training × lora") == "1"


def test_groups_are_read_as_they_were_written_and_older_files_have_none() -> None:
    made = in_groups()
    written = json.loads(json.dumps(made.to_json()))
    assert Comparison.from_json(written).groups == made.groups
    del written["groups"]
    for contestant in written["contestants"][:2]:
        del contestant["cost"]["adapters"]
    older = Comparison.from_json(written)
    assert not older.groups
    assert older.contestants[0].cost == made.contestants[0].cost


def test_markdown_is_one_table_whose_cells_keep_their_bars() -> None:
    made = comparison()
    barred = replace(made.contestants[0], label="a|b")
    text = markdown(replace(made, contestants=[barred, *made.contestants[1:]]))
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 2 + 5
    assert {line.replace(r"\|", "").count("|") for line in table} == {14}
    assert text.count("\n\n") == 1


def test_data_sets_of_other_names_and_losses_have_their_columns() -> None:
    made = comparison()
    moved = [
        replace(
            c,
            cells=[
                replace(
                    x, results={TEST: replace(x.results[TEST], right=None), "faq": x.results[OOD]}
                )
                for x in c.cells
            ],
        )
        for c in made.contestants
    ]
    head, _ = columns(replace(made, contestants=moved))
    assert head[1:5] == [
        "loss, nats",
        "difference from prefix-tuning-plus, nats",
        "faq: exact match, %",
        "faq: difference from prefix-tuning-plus, points",
    ]


def test_forgetting_without_a_base_is_called_the_loss_that_it_is() -> None:
    made = comparison(base={})
    found = standings_on(made, FORGETTING).each[0].mean
    assert cell(made, "prefix-tuning-plus", "loss on unrelated text, nats").startswith(
        f"{found:.3f} ±"
    )

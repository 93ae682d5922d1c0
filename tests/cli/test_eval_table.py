"""The table of results: figures stay whole even at a narrow terminal."""

import io

import pytest
from rich.console import Console

from prefixtune_cli.cli import console, eval_table
from prefixtune_cli.evaluate.outcome import BASE, Line, Outcome
from prefixtune_cli.evaluate.paired import PairedDifference
from prefixtune_cli.evaluate.run import Found

ADAPTERS = ("a-long-name-of-an-adapter", "another")


def found() -> Found:
    lines = [
        Line(
            name=f"mmlu_{i}",
            metric="acc",
            items=1234,
            values={BASE: 0.25, ADAPTERS[0]: 0.5, ADAPTERS[1]: 0.125},
            differences={
                ADAPTERS[0]: PairedDifference(0.25, 0.2, 0.3, 0.0001),
                ADAPTERS[1]: PairedDifference(-0.125, -0.2, -0.05, 0.04),
            },
            percent=True,
        )
        for i in range(2)
    ]
    return Found([Outcome("mmlu", lines, {})], [], {})


@pytest.mark.parametrize(("width", "tables"), [(80, 2), (300, 1)])
def test_no_figure_is_cut_and_adapters_get_tables_of_their_own_where_one_is_too_wide(
    width: int,
    tables: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Console(file=io.StringIO(), width=width)
    monkeypatch.setattr(console, "stdout", lambda: made)
    eval_table.print_found(found(), show_all=False, markdown=False, as_json=False)
    assert isinstance(made.file, io.StringIO)
    printed = made.file.getvalue()
    assert "…" not in printed
    assert printed.count("benchmark") == tables
    assert printed.count("mmlu_0") == tables
    for figure in ("25.0 %", "+25.0", "[+20.0, +30.0]", "<0.001", "[-20.0, -5.0]", "0.040"):
        assert figure in printed
    for name in ADAPTERS:
        assert printed.count(name) == 1

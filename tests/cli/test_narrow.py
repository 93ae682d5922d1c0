"""Output on terminals of 60, 80 and 120 columns: figures keep their heads, and words and flags stay whole."""

import io
import re
from collections.abc import Callable

import pytest
import typer
from rich.console import Console

from prefixtune_cli.cli import app as application
from prefixtune_cli.cli import compare, console, models, reporter
from tests.compare.made import comparison

WIDTHS = (60, 80, 120)
FACTS = [
    ["method", "prefix-tuning-plus", "lora"],
    ["recipe", "12 steps, learning rate 0.03 (cosine), 8 rows a step and device, 16 bits", "-"],
    ["sha256", "ab" * 32, "cd" * 32],
]
LONG = "a sentence of many words, with a figure of 0.38 MiB and a --gradient-checkpointing " * 3


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], str]:
    """What is printed at a terminal of so many columns, on stdout and stderr together."""

    def run(width: int, say: Callable[[], None]) -> str:
        made = Console(
            file=io.StringIO(), force_terminal=True, width=width, no_color=True, highlight=False
        )
        monkeypatch.setattr(console, "stdout", lambda: made)
        monkeypatch.setattr(console, "stderr", lambda: made)
        say()
        assert isinstance(made.file, io.StringIO)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", made.file.getvalue())

    return run


@pytest.mark.parametrize("width", WIDTHS)
def test_a_comparison_fits_and_every_figure_stands_beside_its_head(
    printed: Callable[..., str], width: int
) -> None:
    said = printed(width, lambda: compare._print(comparison(), markdown=False, as_json=False))
    assert max(map(len, said.splitlines())) <= width
    of_lora = said.partition("\nlora ")[2] or said.partition("\nlora\n")[2]
    assert re.search(r"^training, tokens/s +4,100 \(3,895–4,305\)", of_lora, re.MULTILINE)
    assert "…" not in said


def test_a_comparison_of_two_turns_on_its_side(printed: Callable[..., str]) -> None:
    made = comparison()
    head = ["method", *(f"figure {i}, with its unit" for i in range(12))]
    rows = [[c.label, *("4,100 (3,895–4,305)" for _ in head[1:])] for c in made.contestants[:2]]
    lines = printed(80, lambda: console.print_table(head, rows)).splitlines()
    assert lines[0].split() == ["method", "prefix-tuning-plus", "lora"]
    assert len(lines) == len(head)


@pytest.mark.parametrize("width", WIDTHS)
def test_two_adapters_side_by_side_or_after_one_another_have_every_fact(
    printed: Callable[..., str], width: int
) -> None:
    head = ["adapter", "first-of-a-long-name", "second-of-a-long-name"]
    said = printed(width, lambda: console.print_table(head, FACTS, by_column=True))
    assert max(map(len, said.splitlines())) <= width
    assert said.count("cosine") == 1
    assert ("ab" * 15) in "".join(said.split())
    if width == 60:
        first, second = said.split("second-of-a-long-name")
        assert "prefix-tuning-plus" in first
        assert "lora" in second


@pytest.mark.parametrize("width", WIDTHS)
def test_columns_that_matter_less_go_first_and_are_named(
    printed: Callable[..., str], width: int
) -> None:
    said = printed(width, models.models)
    assert max(map(len, said.splitlines())) <= width
    assert "smollm2-135m-instruct  HuggingFaceTB/SmolLM2-135M-Instruct" in said
    assert ("licence" in said.splitlines()[0]) == (width == 120)
    assert ("Left out, as the terminal is narrow: " in said) == (width < 120)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("say", [console.say, console.notice, console.warning, console.error])
def test_sentences_wrap_at_spaces(
    printed: Callable[..., str], width: int, say: Callable[[str], None]
) -> None:
    said = printed(width, lambda: say(LONG))
    lines = said.splitlines()
    assert len(lines) > 1
    assert max(map(len, lines)) <= width
    assert said.split()[-len(LONG.split()) :] == LONG.split()


def test_a_command_is_not_broken_so_that_it_can_be_pasted(printed: Callable[..., str]) -> None:
    command = f"  ptp chat --run {'a-long-folder/' * 9}"
    assert printed(60, lambda: console.say(f"Next:\n\n{command}")).splitlines()[-1] == command


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("task", ["training", "mmlu_high_school_government_and_politics, adapter"])
def test_progress_keeps_bar_count_loss_and_time_left(
    printed: Callable[..., str], width: int, task: str
) -> None:
    figures = {"loss": 1.5, "tokens_per_second": 12345.0, "peak_memory_gib": 3.21}

    def work() -> None:
        with reporter.LiveReporter() as live:
            live.progress(task, 0, 4000, {})
            live.progress(task, 2000, 4000, figures)

    last = printed(width, work).replace("\r", "\n").strip().splitlines()[-1]
    assert len(last) <= width
    assert task[:8] in last
    assert "━" in last
    assert " 2000/4000 " in last
    assert "loss 1.5000" in last
    assert re.search(r"ETA [-\d]+:..:..$", last.rstrip())
    assert ("12,345 tokens/s" in last) == (width > 60 if task == "training" else width == 120)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["train", "compare", "eval"])
def test_help_names_every_flag_whole(
    monkeypatch: pytest.MonkeyPatch, ptp: Callable[..., tuple[int, str, str]], width: int, name: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    code, said, _ = ptp(name, "--help")
    command = typer.main.get_command(application.app).get_command(None, name)  # type: ignore[attr-defined]
    flags = [flag for p in command.params for flag in (*p.opts, *p.secondary_opts)]
    assert code == 0
    assert max(map(len, said.splitlines())) <= width
    assert all(
        re.search(rf"(^|[ ,]){flag}\b", said, re.MULTILINE) for flag in flags if flag[0] == "-"
    )
    assert "…" not in said.replace("COLUMN,…", "").replace("NAME,…", "").replace("VALUE,…", "")


@pytest.mark.parametrize("width", [*WIDTHS, 200])
def test_the_list_of_commands_cuts_no_description(
    monkeypatch: pytest.MonkeyPatch, ptp: Callable[..., tuple[int, str, str]], width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    said = " ".join(ptp("--help")[1].split())
    assert "takes, by part and by method, and what fits." in said
    assert "has learned, and whether several can be merged." in said

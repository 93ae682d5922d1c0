"""Results go to stdout, everything else to stderr, and text stays as given."""

import gc
import os
import pty
import subprocess
import sys

import pytest

from prefixtune_cli.cli import console

TEXT = "a [bold]b[/] [0, 1] " + "word " * 60 + "end"


@pytest.mark.parametrize(
    ("say", "line"),
    [
        (console.notice, TEXT),
        (console.warning, f"warning: {TEXT}"),
        (console.error, f"error: {TEXT}"),
    ],
)
def test_what_is_said_goes_to_stderr_whole_and_without_markup(
    say: object, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(say)
    say(TEXT)
    assert capsys.readouterr() == ("", f"{line}\n")


def test_json_goes_to_stdout_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"φ": ["[bold]", 1e-5]})
    assert capsys.readouterr().out == '{\n  "φ": [\n    "[bold]",\n    1e-05\n  ]\n}\n'


def test_a_piped_table_is_one_line_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_table(["name", "text"], [["[a]", TEXT], ["b", "short"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["name  text", f"[a]   {TEXT}", "b     short"]


def at_a_terminal(statement: str, **environment: str) -> str:
    """What a statement prints to a terminal 60 columns wide."""
    ours, theirs = pty.openpty()
    subprocess.run(
        [sys.executable, "-c", f"from prefixtune_cli.cli import console; {statement}"],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "60", **environment},
        check=True,
    )
    os.close(theirs)
    seen = os.read(ours, 65536).decode()
    os.close(ours)
    return seen


def test_colours_are_for_terminals_and_left_out_by_no_color() -> None:
    red = "\x1b[1;31m"
    assert red in at_a_terminal("console.error('x')", NO_COLOR="")
    assert red not in at_a_terminal("console.error('x')", NO_COLOR="1")


def test_a_table_fits_the_terminal() -> None:
    seen = at_a_terminal(f"console.print_table(['name', 'text'], [['a', {TEXT!r}]])", NO_COLOR="1")
    assert max(len(line) for line in seen.splitlines()[1:]) <= 60
    assert "end" in seen


def test_the_collector_rests_while_libraries_are_imported_and_works_again_afterwards() -> None:
    try:
        with console.importing():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > 1000
    finally:
        gc.unfreeze()


def test_what_rested_while_trl_was_imported_is_not_told_as_leaked_at_the_exit() -> None:
    pytest.importorskip("triton")
    code = "from prefixtune_cli.cli import console\nwith console.importing(): import trl.trainer.sft_trainer"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "leaked" not in done.stderr

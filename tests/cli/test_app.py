"""`ptp` itself: it answers fast, and says exactly what is wrong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import typer

from prefixtune_cli import __version__
from prefixtune_cli.cli import app as application
from prefixtune_cli.errors import (
    DataError,
    Interrupted,
    Preempted,
    PtpError,
    RecipeError,
    UsageError,
)

HEAVY = {
    "torch",
    "transformers",
    "peft",
    "trl",
    "datasets",
    "pydantic",
    "yaml",
    "rich",
    "matplotlib",
}
LIST_MODULES = """
import json, sys
from prefixtune_cli.cli.app import main
sys.argv = ["ptp", *sys.argv[1:]]
try:
    main()
finally:
    print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def ptp(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "prefixtune_cli", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run `ptp fail`, a command that raises the given error; return exit code and stderr."""

    def run(error: BaseException) -> tuple[int, str]:
        def fail() -> None:
            raise error

        broken = typer.Typer(cls=application.Ptp, pretty_exceptions_enable=False)
        broken.command("fail")(fail)
        broken.command("other")(lambda: None)
        monkeypatch.setattr(application, "app", broken)
        monkeypatch.setattr(sys, "argv", ["ptp", "fail"])
        with pytest.raises(SystemExit) as caught:
            application.main()
        assert isinstance(caught.value.code, int)
        return caught.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, *arguments], capture_output=True, text=True, check=True
    )
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert "typer" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize("command", sorted(application.COMMANDS))
def test_a_commands_help_does_not_import_what_it_runs(command: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, command, "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert imported & {"torch", "transformers", "peft", "trl", "datasets"} == set()


def test_help_lists_every_command() -> None:
    listed = ptp("--help").stdout.partition("Commands:")[2]
    assert all(f"  {name} " in listed for name in application.COMMANDS)


def test_ptp_alone_shows_the_help_and_is_a_usage_error() -> None:
    done = ptp()
    assert done.returncode == 2
    assert "Commands:" in done.stdout + done.stderr


def test_version_is_printed() -> None:
    done = ptp("--version")
    assert (done.returncode, done.stdout) == (0, f"ptp {__version__}\n")


def test_an_unknown_command_suggests_the_nearest() -> None:
    done = ptp("trian")
    assert done.returncode == 2
    assert "No such command 'trian'. Did you mean 'train'?" in done.stderr


def test_an_unknown_option_suggests_the_nearest() -> None:
    done = ptp("train", "--bathc-size", "3")
    assert done.returncode == 2
    assert "--batch-size" in done.stderr


@pytest.mark.parametrize("command", sorted(application.COMMANDS))
def test_an_argument_that_is_not_utf_8_is_told_in_words(command: str) -> None:
    text = os.fsdecode("café".encode("latin1"))
    with pytest.raises(UsageError, match=r"argument b'caf\\xe9' is not UTF-8"):
        application.app([command, "--prompt", text], standalone_mode=False)


def test_wrong_settings_are_told_together_without_a_traceback() -> None:
    done = ptp("train", "--bits", "5", "--feature-map", "relu")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: 2 problems:",
        "  model.bits must be 4, 8, 16 or 32, got 5",
        "  adapter.feature_map must be elu, gelu or mlp, got 'relu'. Did you mean 'elu'?",
    ]


def test_wrong_settings_are_told_before_anything_heavy_is_imported() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LIST_MODULES, "train", "--bits", "5"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    imported = set(json.loads(done.stdout.splitlines()[-1]))
    assert imported & {"torch", "transformers", "peft", "trl", "datasets"} == set()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (RecipeError("a [b] is wrong"), 2),
        (DataError("a [b] is wrong"), 1),
        (UsageError("a [b] is wrong"), 2),
    ],
)
def test_an_error_of_ours_is_told_in_one_line_and_sets_the_exit_code(
    error: PtpError, code: int, failing: Callable[[BaseException], tuple[int, str]]
) -> None:
    assert failing(error) == (code, "error: a [b] is wrong\n")


@pytest.mark.parametrize(("stop", "code"), [(Interrupted, 130), (Preempted, 0)])
def test_a_stop_that_was_asked_for_is_no_error(
    stop: type[PtpError], code: int, failing: Callable[[BaseException], tuple[int, str]]
) -> None:
    said = "Stopped by SIGINT at step 3 of 8; a checkpoint is saved."
    assert failing(stop(said)) == (code, f"{said}\n")


def test_a_long_error_is_not_wrapped_where_nobody_is_at_a_terminal(
    failing: Callable[[BaseException], tuple[int, str]],
) -> None:
    text = "word " * 200 + "end"
    assert failing(RecipeError(text)) == (2, f"error: {text}\n")


def test_ctrl_c_exits_with_130(failing: Callable[[BaseException], tuple[int, str]]) -> None:
    assert failing(KeyboardInterrupt())[0] == 130


def test_an_error_that_is_not_the_users_keeps_its_traceback(
    failing: Callable[[BaseException], tuple[int, str]],
) -> None:
    with pytest.raises(ZeroDivisionError):
        failing(ZeroDivisionError())


def test_ptp_traceback_shows_where_an_error_comes_from() -> None:
    done = ptp("train", "--bits", "5", PTP_TRACEBACK="1")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "RecipeError" in done.stderr

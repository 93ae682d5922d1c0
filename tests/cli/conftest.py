"""`ptp` as the user types it, in this process."""

import sys
from collections.abc import Callable

import pytest

from prefixtune_cli.cli.app import main

Ptp = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ptp(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ptp:
    """Run `ptp` in this process; returns exit code, stdout and stderr."""
    from prefixtune_cli.cli import console

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ptp", *map(str, arguments)])
        console.stdout.cache_clear()
        console.stderr.cache_clear()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = int(left.code or 0)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run

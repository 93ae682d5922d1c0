"""Help's defaults and the shell's completions come from the schema."""

import os
import re
import subprocess
import sys

import pytest

from prefixtune_cli.cli.flags import FLAGS
from prefixtune_cli.recipe import settings
from prefixtune_cli.recipe.explain import METHODS
from prefixtune_cli.recipe.load import shipped
from tests.cli.conftest import Ptp


@pytest.mark.parametrize("command", ["compare", "inspect-data", "plan", "train"])
def test_help_tells_the_schemas_default_of_every_flag_that_has_one(
    ptp: Ptp, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    said = " ".join(ptp(command, "--help")[1].split())
    assert "[default: 1024]" in said  # --max-length
    told = re.findall(r"\[default: ([^]]+)\]", said)
    defaults = [settings.default(flag.key) for flag in FLAGS if flag.key]
    assert set(told) <= {*defaults, "3; x>=0"}  # inspect-data's own --examples
    if command == "train":
        assert sorted(told) == sorted(filter(None, defaults))


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.epochs", "3"),
        ("train.batch_size", "8"),
        ("train.packing", "no"),
        ("adapter.basis", "yes"),
        ("adapter.r", "16"),
        ("adapter.method", "prefix-tuning-plus"),
        ("data.eval_split", "0.05"),
        ("train.save_steps", "a tenth of the run"),
        ("out", "runs/<model>-<data>-<method>"),
        ("data.train", ""),
        ("data.map", ""),
    ],
)
def test_a_default_is_said_as_a_user_says_it(key: str, expected: str) -> None:
    assert settings.default(key) == expected


def completed(*words: str) -> set[str]:
    """What bash's completion offers for the last word."""
    done = subprocess.run(
        [sys.executable, "-m", "prefixtune_cli"],
        env={
            **os.environ,
            "_PTP_COMPLETE": "complete_bash",
            "COMP_WORDS": "\n".join(["ptp", *words]),
            "COMP_CWORD": str(len(words)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    return set(done.stdout.split())


def test_the_shell_is_offered_methods_recipes_models_and_choices() -> None:
    assert {*METHODS, "ia3"} <= completed("train", "--method", "")
    assert completed("train", "--recipe", "") == set(shipped())
    assert completed("generate", "--model", "smollm2-135m") == {
        "smollm2-135m", "smollm2-135m-instruct"
    }  # fmt: skip
    assert completed("train", "--sites", "a") == {"attention", "attention+ffn"}
    assert completed("merge", "a", "--method", "") == set()  # not the same flag as in `ptp train`


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model.bits", ["4", "8", "16", "32"]),
        ("adapter.preset", ["paper"]),
        ("adapter.feature_map", ["elu", "gelu", "mlp"]),
        ("train.track", ["none", "tensorboard", "wandb", "trackio"]),
        ("train.epochs", []),
        ("data.train", []),
        ("adapter.layers", []),
    ],
)
def test_values_are_those_that_the_schema_names(key: str, expected: list[str]) -> None:
    assert settings.values(key) == expected

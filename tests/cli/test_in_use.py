"""Two commands never write to one folder: the second is refused, names the first, and changes nothing."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from prefixtune_cli import model as models
from prefixtune_cli.cli.app import app
from prefixtune_cli.errors import RunDirError
from prefixtune_cli.lock import LOCK, locked
from prefixtune_cli.recipe.load import dump, resolve
from prefixtune_cli.run_dir import RunDir

RUN = [
    ["train", "--recipe", "RUN/recipe.yaml"],
    ["train", "--recipe", "RUN/recipe.yaml", "--resume"],
    ["train", "--recipe", "RUN/recipe.yaml", "--resume", "auto"],
    ["train", "--recipe", "RUN/recipe.yaml", "--overwrite"],
    ["train", "--recipe", "RUN/recipe.yaml", "--overwrite", "--find-learning-rate"],
    ["eval", "--run", "RUN", "--data", "DATA"],
    ["merge-info", "RUN"],
]
COMPARISON = [["compare", "--model", "BASE", "--data", "DATA", "--methods", "lora", "--out", "OUT"]]
MERGE = [["merge", "RUN", "OTHER", "--out", "OUT"]]


@pytest.fixture(scope="module")
def things(random_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What the commands name: a base, data, a run with an adapter, and a copy of that adapter."""
    folder = tmp_path_factory.mktemp("in-use")
    data = folder / "data.jsonl"
    rows = ({"prompt": f"say {i}", "completion": "red"} for i in range(40))
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    section = {"name": str(random_base), "bits": 32}
    flags = {"model": section, "data": {"train": str(data)}, "out": str(folder / "run")}
    recipe = resolve(flags=flags)
    run = RunDir(folder / "run")
    attached = models.attach(models.load_base(recipe.model), recipe.adapter)
    for adapter in (run.adapter, folder / "other"):
        attached.save_pretrained(adapter)
    run.recipe.write_text(dump(recipe))
    names = {"RUN": run.path, "OTHER": folder / "other", "DATA": data, "BASE": random_base}
    return {name: str(path) for name, path in names.items()}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


@pytest.mark.parametrize("typed", [*RUN, *COMPARISON, *MERGE], ids=" ".join)
def test_a_second_command_is_refused_and_changes_nothing(
    typed: list[str], things: dict[str, str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = out if "OUT" in typed else Path(things["RUN"])
    for name, path in {**things, "OUT": str(out)}.items():
        typed = [word.replace(name, path) for word in typed]
    with locked(folder):
        before = files(folder)
        done = CliRunner().invoke(app, typed)
        assert files(folder) == before
    assert isinstance(done.exception, RunDirError), done.output
    assert f"{folder} is in use: process {os.getpid()} on" in str(done.exception)


def test_two_evaluations_of_one_run_share_its_folder_and_no_training_begins_in_it(
    things: dict[str, str],
) -> None:
    recipe = str(Path(things["RUN"], "recipe.yaml"))
    with locked(Path(things["RUN"]), shared=True):
        asked = ["eval", "--run", things["RUN"], "--data", things["DATA"], "--limit", "2"]
        done = CliRunner().invoke(app, [*asked, "--no-base", "--no-cache"])
        assert done.exit_code == 0, done.output
        done = CliRunner().invoke(app, ["train", "--recipe", recipe, "--overwrite"])
        assert "is in use" in str(done.exception)

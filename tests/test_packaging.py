"""The wheel, built and used where the source tree cannot be imported."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {
    "pyproject.toml", "prefixtune_cli", "tests", "recipes", "README.md", "CHANGELOG.md", "LICENSE",
}  # fmt: skip

DISTRIBUTIONS = {"lm_eval": "lm-eval",
    "yaml": "pyyaml", "huggingface_hub": "huggingface-hub", "pydantic_core": "pydantic",
    "sklearn": "scikit-learn",
}  # fmt: skip


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT,
        cwd=folder,
    )  # fmt: skip
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel unpacked into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    run(
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index",
        "--target", target, wheel,
        cwd=target,
    )  # fmt: skip
    return target


def ptp(installed: Path, *arguments: str) -> str:
    # -P ignores the current folder, and PYTHONPATH puts the wheel before the editable source tree.
    where = run(
        sys.executable, "-P", "-c", "import prefixtune_cli; print(prefixtune_cli.__file__)",
        cwd=installed.parent, PYTHONPATH=str(installed),
    )  # fmt: skip
    assert Path(where.strip()).is_relative_to(installed)
    return run(
        sys.executable, "-P", "-m", "prefixtune_cli", *arguments,
        cwd=installed.parent, PYTHONPATH=str(installed),
    )  # fmt: skip


def test_the_installed_recipes_are_those_of_the_source_tree(installed: Path) -> None:
    rows = json.loads(ptp(installed, "recipes", "--json"))
    source = sorted((ROOT / "recipes").glob("*.yaml"))
    assert [row["name"] for row in rows] == [
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in source
    ]
    assert ptp(installed, "recipes", "quickstart") == (ROOT / "recipes/quickstart.yaml").read_text()


def test_the_installed_aliases_are_listed(installed: Path) -> None:
    assert "llama2-7b-chat" in {
        row["alias"] for row in json.loads(ptp(installed, "models", "--json"))
    }


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    package = ROOT / "prefixtune_cli"
    files = {
        path.relative_to(ROOT).as_posix()
        for path in package.rglob("*")
        if path.is_file()
        and not any(p.startswith(".") or p == "__pycache__" for p in path.relative_to(ROOT).parts)
    }
    assert files <= names


def test_the_wheel_holds_the_built_in_model_and_samples(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "prefixtune_cli/assets/tiny/config.json" in names
    assert any(
        n.startswith("prefixtune_cli/assets/tiny/") and n.endswith(".safetensors") for n in names
    )
    assert any(n.startswith("prefixtune_cli/assets/samples/") for n in names)


def test_every_sample_that_a_recipe_names_is_in_the_wheel(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    samples = {
        word.removeprefix("sample:")
        for path in (ROOT / "recipes").rglob("*.yaml")
        for word in path.read_text().split()
        if word.startswith("sample:")
    }
    assert samples
    assert {f"prefixtune_cli/assets/samples/{sample}.jsonl" for sample in samples} <= names


def test_the_wheel_installs_the_ptp_command_and_the_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (entry_points,) = [n for n in archive.namelist() if n.endswith("entry_points.txt")]
        assert "ptp = prefixtune_cli.cli.app:main" in archive.read(entry_points).decode()
        assert any(n.endswith("dist-info/licenses/LICENSE") for n in archive.namelist())


def test_every_third_party_that_is_imported_is_a_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = {k: v for k, v in project["optional-dependencies"].items() if k != "dev"}
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    declared = {re.split(r"[^\w-]", line)[0] for line in lines}
    trees = [
        ast.parse(path.read_text(encoding="utf-8"))
        for path in (ROOT / "prefixtune_cli").rglob("*.py")
    ]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    modules = {a.name for node in nodes if isinstance(node, ast.Import) for a in node.names} | {
        node.module or "" for node in nodes if isinstance(node, ast.ImportFrom) and not node.level
    }
    imported = {module.partition(".")[0] for module in modules} - {"prefixtune_cli"}
    third_parties = imported - sys.stdlib_module_names
    third_parties -= {"triton"}  # comes with the builds of torch that need it
    assert "torch" in third_parties
    assert {DISTRIBUTIONS.get(name, name) for name in third_parties} <= declared


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert len(project["dependencies"]) > 10
    assert all(">=" in line and "<" in line for line in project["dependencies"])


def test_the_installed_libraries_are_in_the_ranges_that_the_tests_have_passed_with() -> None:
    """Otherwise these tests may use libraries that a user does not get."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(version(requirement.name)), requirement


def test_the_top_level_holds_what_the_design_names_and_nothing_else() -> None:
    found = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if found.returncode != 0 or not found.stdout:
        pytest.skip("not a git checkout with files in it")
    top = {line.partition("/")[0] for line in found.stdout.splitlines()}
    assert {name for name in top if not name.startswith(".")} <= TOP_LEVEL

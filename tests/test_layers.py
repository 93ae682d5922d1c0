"""The imports of every file go only downward through the layers that the package's docstring shows."""

import ast
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import prefixtune_cli

PACKAGE = Path(prefixtune_cli.__file__).parent
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


def _layers() -> dict[str, int]:
    """The rooms in the docstring, from the lowest, with their layers."""
    found: dict[str, int] = {}
    for line in (prefixtune_cli.__doc__ or "").splitlines():
        if heading := re.match(r"(\d)\. ", line):
            layer = int(heading[1])
        elif room := re.match(r"    (\w+)/? ", line):
            found[room[1]] = layer
    return found


LAYERS = _layers()
ROOT = {"__init__"}  # the version; everything may import it, and it imports nothing

# Imports within a layer, each with its reason.
BESIDE = {
    "lock": {"errors"},
    "run_dir": {"errors", "lock"},
    "sampling": {"errors"},
    "run_list": {"recipe"},
    "pointed": {"recipe", "run_list"},
    "tokenizer": {"gguf_base"},
    "model": {"tokenizer", "gguf_base", "quantization", "peft_methods"},
    "adapter_folder": {"model", "peft_methods"},
    "shared_base": {"model"},
    "agreement": {"model"},  # with its adapter, and without
    "evaluate": {"generate"},  # the answers to match
    "report": {"compare"},  # the comparison that it describes
    "merge_info": {
        "plan",
        "merge",
    },  # the base's configuration, which may not be here; what can be merged
    "train": {"evaluate", "plan"},  # a run ends with its evaluation; the plan tells what fits
}

# Packages that only one room may import.
HOMES = {
    "typer": {"cli"}, "rich": {"cli"}, "trl": {"train"}, "lm_eval": {"evaluate"},
    "bitsandbytes": {"quantization", "plan"}, "triton": {"adapter"},
}  # fmt: skip
# The outside packages that a room may import, if the design is narrower than the layers.
OUTSIDE = {
    "errors": set(), "lock": set(), "run_dir": set(), "progress": set(), "__init__": set(), "__main__": set(),
    "recipe": {"pydantic", "pydantic_core", "yaml"},
    "adapter": {"torch", "peft", "transformers", "triton"},
}  # fmt: skip


@dataclass(frozen=True)
class Import:
    """One imported module; `top` is false inside of a function or under TYPE_CHECKING."""

    module: str
    top: bool

    @property
    def part(self) -> str | None:
        """The imported part of our package; "__init__" for the package itself."""
        first, _, rest = self.module.partition(".")
        return (rest.partition(".")[0] or "__init__") if first == "prefixtune_cli" else None

    @property
    def distribution(self) -> str:
        return self.module.partition(".")[0]


def part_of(file: Path) -> str:
    return file.parts[0].removesuffix(".py")


def imports(file: Path) -> list[Import]:
    return list(_imports(ast.parse((PACKAGE / file).read_text(encoding="utf-8")), file, top=True))


def _imports(node: ast.AST, file: Path, *, top: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(alias.name, top) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:  # a relative import
                above = ("prefixtune_cli", *file.parent.parts)
                above = above[: len(above) - child.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in child.names:
                whole = f"{base}.{alias.name}"
                yield Import(whole if base.partition(".")[0] == "prefixtune_cli" else base, top)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            yield from _imports(child, file, top=top and not inside)


def ours(found: Import) -> str | None:
    """The imported part of our package; `from prefixtune_cli import __version__` is the root."""
    part = found.part
    return "__init__" if part is not None and part.startswith("__version") else part


def test_every_file_is_checked_and_belongs_to_a_layer() -> None:
    on_disk = [name for _, _, names in os.walk(PACKAGE) for name in names if name.endswith(".py")]
    assert len(FILES) == len(on_disk)
    unknown = [str(file) for file in FILES if part_of(file) not in {*LAYERS, *ROOT}]
    assert unknown == [], "give these a place in the package's docstring"
    assert {*LAYERS, *ROOT} - {part_of(file) for file in FILES} == set(), "these are no more"


def test_no_module_is_imported_by_a_name_that_only_runs_know() -> None:
    """importlib and __import__ would escape these checks."""
    for file in FILES:
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.id
            for node in ast.walk(ast.parse((PACKAGE / file).read_text(encoding="utf-8")))
            if isinstance(node, ast.Attribute | ast.Name)
        }
        assert not names & {"__import__", "import_module"}, file


@pytest.mark.parametrize("file", FILES, ids=str)
def test_imports_go_downward_only(file: Path) -> None:
    part = part_of(file)
    if part in ROOT:
        allowed = set()
    elif part == "adapter":
        allowed = {"adapter"}  # so that it could be moved into peft unchanged
    else:
        below = {name for name, layer in LAYERS.items() if layer < LAYERS[part]}
        allowed = below | {part} | BESIDE.get(part, set()) | ROOT
    forbidden = {found.module for found in imports(file) if ours(found) not in {None, *allowed}}
    assert forbidden == set()


def test_the_imports_within_a_layer_are_needed_and_in_one_direction() -> None:
    order = list(LAYERS)
    for part, beside in BESIDE.items():
        found = {ours(i) for file in FILES if part_of(file) == part for i in imports(file)}
        assert beside <= found
        assert all(LAYERS[other] == LAYERS[part] for other in beside)
        assert all(order.index(other) < order.index(part) for other in beside)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_third_parties_stay_in_their_homes(file: Path) -> None:
    part = part_of(file)
    strangers = {
        found.module for found in imports(file) if part not in HOMES.get(found.distribution, {part})
    }
    assert strangers == set()


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) in OUTSIDE], ids=str)
def test_the_lower_layers_need_little(file: Path) -> None:
    allowed = {*sys.stdlib_module_names, "prefixtune_cli", *OUTSIDE[part_of(file)]}
    assert {found.distribution for found in imports(file)} <= allowed


@pytest.mark.parametrize("file", [f for f in FILES if part_of(f) == "cli"], ids=str)
def test_the_top_of_a_command_imports_next_to_nothing(file: Path) -> None:
    heavy = {
        found.module
        for found in imports(file)
        if found.top
        and found.distribution not in {*sys.stdlib_module_names, "typer"}
        and ours(found) not in {"errors", "cli"}
    }
    assert heavy == set()


def test_what_these_checks_forbid_is_found(tmp_path: Path) -> None:
    """A check of the reader of imports: relative imports, and imports inside functions and classes."""
    text = (
        "from __future__ import annotations\nimport a.b\nfrom . import x\nfrom ..errors import E\n"
        "from prefixtune_cli import train\n"
        "def f():\n    import rich\n    class C:\n        from trl import SFT\n"
        "if TYPE_CHECKING:\n    import torch\ntry:\n    import yaml\nexcept ImportError:\n    pass\n"
    )
    found = list(_imports(ast.parse(text), Path("cli/train.py"), top=True))
    assert [(i.module, i.top) for i in found] == [
        ("__future__", True),
        ("a.b", True),
        ("prefixtune_cli.cli.x", True),
        ("prefixtune_cli.errors.E", True),
        ("prefixtune_cli.train", True),
        ("rich", False),
        ("trl", False),
        ("torch", False),
        ("yaml", True),
    ]

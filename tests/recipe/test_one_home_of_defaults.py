"""Only the schema has defaults: the package does not state the default of a setting a second time."""

from __future__ import annotations

import ast
import typing
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel

import prefixtune_cli
from prefixtune_cli.recipe.schema import Recipe

PACKAGE = Path(prefixtune_cli.__file__).parent
# Parameters and fields that have a setting's name but another meaning.
OTHERS = {
    ("adapter/memory.py", "feature_map"): "the adapter imports nothing of ours; test_config.py holds its defaults",
    ("sampling.py", "max_new_tokens"): "of `ptp generate`, where evaluate.max_new_tokens is of a held-out row",
    ("generate.py", "batch_size"): "of `ptp generate`",
    ("cli/chat.py", "max_new_tokens"): "shown in help",
    ("cli/generate.py", "max_new_tokens"): "shown in help",
    ("cli/generate.py", "batch_size"): "shown in help",
    ("cli/eval.py", "batch_size"): "`auto`, of `ptp eval`",
    ("cli/runs.py", "method"): "what stands in a table where there is none",
    ("compare/run.py", "gpus"): "the processes of a comparison",
    ("merge/adapters.py", "method"): "of merging",
    ("merge_info/costs.py", "share_heads"): "of PEFT's saved configuration, which leaves out the default",
    ("peft_methods.py", "target_modules"): "stands for a method without the setting",
    ("train/sft.py", "save_steps"): "what the schema's null stands for",
}  # fmt: skip


def settings() -> set[str]:
    """The names of all settings of a recipe."""
    found: set[str] = set()
    todo: list[type[BaseModel]] = [Recipe]
    while todo:
        for name, field in todo.pop().model_fields.items():
            inner = [a for a in parts(field.annotation) if isinstance(a, type)]
            sections = [a for a in inner if issubclass(a, BaseModel)]
            todo += sections
            if not sections:
                found.add(name)
    return found


def parts(annotation: object) -> list[object]:
    inside = typing.get_args(annotation)
    return [annotation, *(each for one in inside for each in parts(one))]


def named_values(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, value) of the defaults of parameters and fields, and of `x.name or value` and `.get("name", value)`."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(args=args):
                given = [*args.posonlyargs, *args.args]
                for one, value in zip(reversed(given), reversed(args.defaults), strict=False):
                    yield one.arg, value
                for one, optional in zip(args.kwonlyargs, args.kw_defaults, strict=True):
                    if optional is not None:
                        yield one.arg, optional
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                yield name, value
            case ast.BoolOp(op=ast.Or(), values=[ast.Attribute(attr=name), *_, value]):
                yield name, value
            case ast.Call(
                func=ast.Attribute(attr="get"), args=[ast.Constant(value=str(name)), value]
            ):
                yield name, value
            case ast.Call(
                func=ast.Name(id="getattr"), args=[_, ast.Constant(value=str(name)), value]
            ):
                yield name, value


def test_no_default_of_a_setting_stands_outside_of_the_schema() -> None:
    names = settings()
    assert {"batch_size", "eval_split", "sites", "r", "bits"} <= names
    found = set()
    for file in PACKAGE.rglob("*.py"):
        where = file.relative_to(PACKAGE).as_posix()
        if where.startswith("recipe/") or where == "adapter/feature_map.py":
            continue
        for name, value in named_values(ast.parse(file.read_text(encoding="utf-8"))):
            if (
                name in names
                and isinstance(value, ast.Constant)
                and value.value not in (None, False, "", 0)
            ):
                found.add((where, name))
    assert found - set(OTHERS) == set()
    assert set(OTHERS) - found == set()

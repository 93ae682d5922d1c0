"""What the user points at: a run, its adapter/ or a checkpoint of it, an adapter folder, or a base.

Every command that takes one of these asks here, before torch and the like are imported. No weight is read.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from prefixtune_cli.errors import AdapterError, ModelError, RunDirError, UsageError
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import (
    WITH_REFERENCE,
    DataSection,
    Lora,
    ModelSection,
    PrefixTuning,
    PrefixTuningPlus,
    Recipe,
    canonical,
)
from prefixtune_cli.run_dir import RunDir, step_of
from prefixtune_cli.run_list import RUNS, newest_finished

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FULL = "full"
# Of the methods with a section of their own: their settings by their names in an adapter's configuration.
OWN: dict[str, dict[str, str]] = {
    "prefix-tuning-plus": {name: name for name in PrefixTuningPlus.model_fields},
    "lora": Lora.OWN,
    "prefix-tuning": PrefixTuning.OWN,
}


@dataclass(frozen=True, kw_only=True)
class Pointed:
    """One thing that the user pointed at.

    Attributes:
        given: what was typed.
        model: the base, with the settings that were typed; None if an adapter folder names no base.
        folder: the adapter's folder, or the whole model's if a run of method full trained it; None for a base alone.
        method: the method's name in recipes, or in peft if only peft knows it; None for a base alone.
        run, recipe: the run that the folder belongs to, and its recipe.
        as_trained: the folder is the run's final adapter, on the run's own base. Its results are the run's results.
        notices: what the user should know about the choice.
    """

    given: str
    model: ModelSection | None
    folder: Path | None = None
    method: str | None = None
    run: RunDir | None = None
    recipe: Recipe | None = None
    as_trained: bool = False
    notices: tuple[str, ...] = ()

    @property
    def base(self) -> ModelSection:
        """The base; raises UsageError if nothing names it."""
        if self.model is None:
            raise UsageError(
                f"The adapter in {self.given} does not say which base it belongs to (base_model_name_or_path in its "
                f"{CONFIG}). Type --model NAME with it."
            )
        return self.model

    @property
    def whole(self) -> bool:
        """Whether the folder holds a whole model instead of an adapter."""
        return self.method == FULL

    @property
    def name(self) -> str:
        """A short name: the run's or the folder's. For a folder called `adapter`, the name of the folder around it."""
        folder = (self.folder or Path(self.given)).absolute()
        above = (self.run.path if self.run else folder.parent).absolute().name
        if self.run is None:
            return above if folder.name == "adapter" else folder.name
        return above if folder.name == self.run.adapter.name else f"{above}-{folder.name}"

    @property
    def reading(self) -> DataSection:
        """How the run reads data, without its files and its template, which the adapter has. Defaults without a run."""
        data = DataSection() if self.recipe is None else self.recipe.data_of_answers
        left_out = {"train": None, "eval": None, "eval_split": None, "chat_template": None}
        return data.model_copy(update=left_out)


def choose(
    *,
    runs: Sequence[str] = (),
    model: str | None = None,
    adapters: Sequence[str] = (),
    typed: Mapping[str, Any] | None = None,
) -> list[Pointed]:
    """What --run, --adapter and --model point at, or the newest finished run if none of them was typed.

    Args:
        runs: runs, or folders in them.
        model: a base by itself, or a base for the runs or adapters in place of the one that they name.
        adapters: adapter folders.
        typed: further settings of the model section.

    Raises:
        UsageError: the flags contradict each other, there is no finished run, or nothing names an adapter's base.
        AdapterError: there is neither a run nor an adapter, or it cannot be read.
        RunDirError: a run has neither an adapter nor a checkpoint.
        ModelError: there is no such base.
        RecipeError: a setting is wrong.
    """
    settings = dict(typed or {})
    if runs and adapters:
        raise UsageError(
            "--run has its own adapter. Leave --adapter out, or give --adapter FOLDER alone."
        )
    things = [*runs, *adapters]
    if model is not None and _is_trained(model):
        if things:
            raise UsageError(
                f"--model {model} is a run or an adapter, and so is {things[0]}. Leave one out, or give --model the "
                "name of a base."
            )
        things, model = [model], None
    if model is not None:
        settings["name"] = model
        if not things:
            return [Pointed(given=model, model=resolve(flags={"model": settings}).model)]
    return [point(thing, settings) for thing in things] or [_newest(settings)]


def point(given: str | Path, typed: Mapping[str, Any] | None = None) -> Pointed:
    """Find out what the run or the adapter at a path is.

    Args:
        given: a run, its adapter/ or a checkpoint of it, or an adapter folder. For an unfinished run, the newest
            checkpoint is used, and a notice says so.
        typed: settings of the model section. They override the run's or the adapter's.

    Raises:
        AdapterError, RunDirError, RecipeError: see `choose`.
    """
    path = Path(given).expanduser()
    settings = dict(typed or {})
    if "name" in settings:  # a revision belongs to the base that is replaced
        settings = {"revision": None, **settings}
    if (run := run_of(path)) is not None:
        return _of_run(str(given), path, run, settings)
    if not (path / CONFIG).is_file():
        raise AdapterError(nothing_at(path))
    config = read_config(path)
    base = config.get("base_model_name_or_path")
    settings = {"name": base, "revision": config.get("revision"), **settings}
    named = bool(settings["name"])
    return Pointed(
        given=str(given),
        model=resolve(flags={"model": settings}).model if named else None,
        folder=path,
        method=canonical(str(config.get("peft_type")).lower()),
    )


def point_at_start(given: str) -> Pointed:
    """The trained adapter that training goes on from.

    Raises:
        AdapterError, RunDirError: see `point`; or it is a whole model.
    """
    found = point(given)
    if found.whole:
        raise AdapterError(
            f"--from goes on from an adapter, and {given} has none: its method is full. For a fresh adapter on what it "
            f"has learned, type: --model {shlex.quote(str(found.folder))}"
        )
    return found


def settings_of_start(given: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe takes from the adapter that it goes on from: its base and its settings.

    A folder outside of a run tells the settings of a method that has its own section, as far as it has them. DPO
    and KTO compute without dropout, so they take none.

    Args:
        given: the run or the adapter folder.
        values: the recipe's own. If they name a base, nothing of the other base is taken.

    Raises:
        AdapterError, RunDirError: see `point_at_start`.
    """
    found = point_at_start(given)
    model, train = values.get("model") or {}, values.get("train") or {}
    taken: dict[str, Any] = {}
    if found.model is not None and "name" not in model:
        taken["model"] = found.model.model_dump()
    if found.recipe is not None:
        adapter = found.recipe.adapter.model_dump(exclude={"preset"})
    else:
        assert found.folder is not None
        config, method = read_config(found.folder), str(found.method)
        own = OWN.get(method, {}).items()
        adapter = {ours: config[name] for name, ours in own if config.get(name) is not None}
        adapter["method"] = method
    if train.get("objective") in WITH_REFERENCE:
        adapter = _without_dropout(adapter)
        if "config" in adapter:
            adapter["config"] = _without_dropout(adapter["config"])
    return {**taken, "adapter": adapter}


def _without_dropout(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.endswith("dropout")}


def run_of(path: Path) -> RunDir | None:
    """The run that a path belongs to: the path is the run, its adapter/, or a checkpoint of it."""
    if (run := RunDir(path)).recipe.is_file():
        return run
    name = path.name or path.absolute().name
    above = RunDir(path.parent if path.name else path.absolute().parent)
    is_part = name == above.adapter.name or name.startswith("checkpoint-")
    return above if is_part and path.is_dir() and above.recipe.is_file() else None


def _of_run(given: str, path: Path, run: RunDir, settings: dict[str, Any]) -> Pointed:
    recipe = resolve(str(run.recipe), flags={"model": settings} if settings else None)
    method, notices = recipe.adapter.method, list[str]()
    folder: Path | None = path
    if path.absolute() == run.path.absolute():
        folder = run.adapter
        if not folder.exists():
            folder, notices = run.newest_whole_checkpoint()
            if folder is None:
                raise RunDirError(
                    f"The run in {run.path} has no adapter yet and no checkpoint. To go on with it: "
                    f"{run.resume_command}"
                )
            notices.append(
                f"The run in {run.path} is not finished: its checkpoint of step {step_of(folder)} is used. To go on "
                f"with the run: {run.resume_command}"
            )
            given = str(folder)
    assert folder is not None
    if method != FULL:
        read_config(folder)
    own = "name" not in settings or settings["name"] == resolve(str(run.recipe)).model.name
    return Pointed(
        given=given,
        model=recipe.model,
        folder=folder,
        method=method,
        run=run,
        recipe=recipe,
        as_trained=own and folder.absolute() == run.adapter.absolute(),
        notices=tuple(notices),
    )


def _newest(settings: Mapping[str, Any]) -> Pointed:
    run = newest_finished()
    if run is None:
        raise UsageError(
            f"There is no finished run below {RUNS}/. Give either --run FOLDER, or --model NAME (with --adapter FOLDER "
            "or without)."
        )
    found = point(run.path, settings)
    said = f"Taking {run.path}, the newest finished run below {RUNS}/."
    return Pointed(**{**vars(found), "notices": (said, *found.notices)})


def _is_trained(model: str) -> bool:
    """Whether a --model is a run or an adapter. The adapter/ of a run of method full is neither: it is a model."""
    try:
        path = Path(resolve_alias(model))
    except ModelError:
        return False
    if (path / "config.json").is_file():
        return False
    return run_of(path) is not None or (path / CONFIG).is_file()


def base_key(section: ModelSection) -> str:
    """A key for a base, the same for all its spellings: the full path or the hub id, and the revision."""
    try:
        name = resolve_alias(section.name)
    except ModelError:  # it existed when the run was made
        name = section.name
    where = str(Path(name).resolve()) if Path(name).exists() else name
    return f"{where} at {section.revision}" if section.revision else where


def read_config(folder: Path) -> dict[str, Any]:
    """The content of adapter_config.json in an adapter folder that also has its weights.

    Raises:
        AdapterError: one of the two files is missing, or the configuration is not a JSON object.
    """
    if not (folder / CONFIG).is_file():
        raise AdapterError(nothing_at(folder))
    if not (folder / WEIGHTS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        reason = (
            "its weights are a pickle (adapter_model.bin), which is never read"
            if pickled
            else "no weights"
        )
        raise AdapterError(
            f"The adapter in {folder} has no {WEIGHTS}: {reason}. Save it as safetensors."
        )
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{CONFIG} is not a JSON object")
    except (OSError, ValueError) as error:
        raise AdapterError(f"The adapter in {folder} cannot be read: {error}") from error
    return found


def nothing_at(path: Path) -> str:
    """Why a path is not a run, or neither a run nor an adapter, and what to type instead."""
    if (path / CONFIG).is_file():
        return f"{path} is an adapter outside of a run. {near_runs(path)}"
    if path.is_dir() and (path / WEIGHTS).exists():
        return f"{path} has weights but no {CONFIG}, so nothing says what they are. Restore it."
    if (path / "config.json").is_file() or (path.is_file() and path.suffix.lower() == ".gguf"):
        return f"{path} is a base, not a run or an adapter. Type: --model {shlex.quote(str(path))}"
    if path.is_file():
        return f"{path} is a file, not a run or an adapter. {near_runs(path)}"
    if path.exists():
        return (
            f"{path} is not a run directory (it has no recipe.yaml) and holds no adapter (no {CONFIG}). "
            f"{near_runs(path)}"
        )
    return f"There is no run or adapter {path}. {near_runs(path)}"


def near_runs(path: Path) -> str:
    """A hint at the run that the user may mean by a path that is not a run."""
    if inside := _runs_in(path):
        shown = " ".join(shlex.quote(str(run)) for run in inside[:3])
        return f"It holds {len(inside)}: {shown}{' …' if len(inside) > 3 else ''}"
    for near in (RUNS / path, *path.absolute().parents[:2]):
        if RunDir(near).recipe.is_file():
            return f"Did you mean {near}?"
    beside = {run.name: run for run in (*_runs_in(RUNS), *_runs_in(path.parent))}
    if close := get_close_matches(path.name, beside, n=1):
        return f"Did you mean {beside[close[0]]}?"
    return "`ptp train` makes runs, and `ptp runs` lists them."


def _runs_in(folder: Path) -> list[Path]:
    """The runs directly in a folder. Subfolders are not searched, as the folder may be any."""
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in inside if RunDir(path).recipe.is_file()]

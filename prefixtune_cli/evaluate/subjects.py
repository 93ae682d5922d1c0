"""Who is evaluated: a base, and adapters on it, on one loaded model.

The adapter is switched off for the base's turn; of several adapters, one at a time is attached.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefixtune_cli import model as models
from prefixtune_cli.agreement import any_prompt, check_generation
from prefixtune_cli.errors import UsageError
from prefixtune_cli.evaluate.outcome import BASE
from prefixtune_cli.parallel.devices import device
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import ModelSection, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.tokenizer import check_base, load_config, load_tokenizer

ADAPTER = "adapter"
WHOLE_FILE_BYTES = 64 * 2**20  # larger weights of a base are told by their beginning, size and time
ANSWERED_BY = ("prefixtune-cli", "torch", "transformers", "peft", "lm_eval")
PARTS_OF_A_MODEL = {".json", ".safetensors", ".bin", ".pt", ".jinja", ".model", ".txt", ".py"}


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        name: the head of its column: `base`, `adapter`, or the run's or folder's name where there are several.
        adapter: its folder; None for the base alone.
        whole: the folder holds a whole model (method `full`), and no adapter.
        run: the run directory that it comes from.
        sha256: of the adapter's content, or of the base's.
    """

    name: str
    adapter: Path | None = None
    whole: bool = False
    run: RunDir | None = None
    sha256: str = ""

    @property
    def folder_name(self) -> str:
        """What its folder is called; `adapter`, as runs call it, says less than the folder around it."""
        folder = (self.run.path if self.run else self.adapter or Path(BASE)).resolve()
        return folder.parent.name if folder.name == ADAPTER else folder.name

    def to_json(self) -> dict[str, Any]:
        folder = None if self.adapter is None else str(self.adapter)
        return {"name": self.name, "folder": folder, "sha256": self.sha256}


@dataclass
class Cast:
    """The base's section, the recipe that data is read by, and all subjects, the base first where it takes part.

    `tokenizer` is the adapters', with their chat template, or the base's; `template` is a file that wins over that.
    `readings` has every adapter's way to read and render data, as text.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    readings: list[str]
    subjects: list[Subject]
    base_sha256: str
    _base: PreTrainedModel | None = field(default=None, repr=False)
    _attached: tuple[Subject, Any] | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def loaded(self, bases: SharedBase | None = None) -> Iterator[PreTrainedModel]:
        """Within the block there is a base, lent by `bases` where that is given.

        Raises:
            ModelError, ResourceError: see `model.load_base`.
        """
        with (bases or SharedBase()).lent(self.recipe.model) as self._base:
            yield self._base.eval()
            self._detach()

    @contextlib.contextmanager
    def on_stage(self, subject: Subject) -> Iterator[Any]:
        """Within the block the model that is given answers as `subject`.

        Raises:
            ModelError: an adapter does not fit, or does not generate what it computes.
        """
        assert self._base is not None
        if subject.adapter is None:
            with models.without_adapter(self._attached[1] if self._attached else self._base):
                yield self._base
            return
        if self._attached is None or self._attached[0] != subject:
            self._detach()
            self._attached = (subject, self._attach(subject))
        yield self._attached[1]

    def _attach(self, subject: Subject) -> Any:
        assert self._base is not None
        assert subject.adapter is not None
        if subject.whole:
            section = self.recipe.model.model_copy(update={"name": str(subject.adapter)})
            model: Any = models.load_base(section).eval()
        else:
            model = models.load_adapter(self._base, subject.adapter).eval()
        try:
            prompt = any_prompt(self.tokenizer)
            check_generation(model, prompt, then="type the same command again.")
        except BaseException:
            if isinstance(model, PeftModel):
                models.detach(model)
            raise
        return model

    def _detach(self) -> None:
        if self._attached is not None and isinstance(self._attached[1], PeftModel):
            models.detach(self._attached[1])
        self._attached = None

    def key(self, subject: Subject, **settings: Any) -> dict[str, Any]:
        """Everything that an answer of `subject` depends on, beside the request."""
        section = self.recipe.model
        return {
            "base": self.base_sha256,
            "bits": section.bits,
            "attention": section.attention,
            "device": device(section.device).type,
            "versions": [metadata.version(name) for name in ANSWERED_BY],
            "adapter": None if subject.adapter is None else subject.sha256,
            **settings,
        }


def assemble(
    *,
    runs: Sequence[str],
    model: str | None,
    adapters: Sequence[str],
    flags: dict[str, Any],
    base: bool,
    template: str | None = None,
) -> Cast:
    """Find out who is evaluated, without loading anything.

    Args:
        runs: run directories, whose bases must be the same.
        model: the base, where there are no runs.
        adapters: adapter folders, for `model`.
        flags: the model section's settings that were typed.
        base: the base takes part.
        template: a chat template that was typed.

    Raises:
        UsageError: both or neither of runs and model are given, or the runs have different bases, or the adapters
            different tokenizers.
        RunDirError: a run has no adapter.
        AdapterError: a folder holds no adapter that can be read.
    """
    if bool(runs) == (model is not None):
        raise UsageError(
            "Give either --run FOLDER, or --model NAME (with --adapter FOLDER or without)."
        )
    if runs and adapters:
        raise UsageError("--run has its own adapter. Leave --adapter out, or give --model with it.")
    if not runs and not adapters and not base:
        raise UsageError(
            "--no-base leaves nothing to evaluate. Give an --adapter, or leave it out."
        )
    if runs:
        found = [_of_run(run) for run in runs]
        recipes = [resolve(str(RunDir(run).recipe), flags={"model": flags}) for run in runs]
        _check_same_base(recipes, runs)
        recipe = recipes[0]
    else:
        found = [_subject(Path(folder)) for folder in adapters]
        recipe = resolve(flags={"model": {**flags, "name": model}})
        recipes = [recipe for _ in found]
    check_base(recipe.model)
    models.check_precision(recipe.model)
    for subject in found:
        if subject.adapter is not None and not subject.whole:
            models.check_fits(recipe.model, subject.adapter)
    tokenizers = [load_tokenizer(recipe.model, s.adapter) for s in found]
    tokenizers = tokenizers or [load_tokenizer(recipe.model)]
    _check_same_tokenizer(tokenizers, found)
    readings = [
        _reading(of, None if template else tokenizer.chat_template)
        for of, tokenizer in zip(recipes, tokenizers, strict=False)
    ]
    its = hash_of_base(recipe.model)
    subjects = [Subject(BASE, sha256=its)] if base else []
    everyone = [*subjects, *_named(found)]
    return Cast(recipe, tokenizers[0], template, readings, everyone, its)


def _of_run(run: str) -> Subject:
    run_dir = RunDir(run)
    run_dir.check_adapter()
    whole = resolve(str(run_dir.recipe)).adapter.method == "full"
    return _subject(run_dir.adapter, run=run_dir, whole=whole)


def _subject(folder: Path, run: RunDir | None = None, whole: bool = False) -> Subject:
    return Subject("", folder, whole, run, hash_of_folder(folder, shortcut=whole))


def _named(subjects: list[Subject]) -> list[Subject]:
    """`adapter` for a single one; else the folders' names, as long as needed to tell them apart."""
    if len(subjects) == 1:
        names = [ADAPTER]
    else:
        names = [subject.folder_name for subject in subjects]
        if len(set(names)) < len(names) or BASE in names:
            names = [str(s.run.path if s.run else s.adapter) for s in subjects]
        if len({Path(name).resolve() for name in names}) < len(names):
            raise UsageError(f"An adapter is given twice: {', '.join(names)}. Give each once.")
    return [
        Subject(name, s.adapter, s.whole, s.run, s.sha256)
        for name, s in zip(names, subjects, strict=True)
    ]


def _reading(recipe: Recipe, template: Any) -> str:
    where = {"train": None, "eval": None, "eval_split": None, "chat_template": None}
    data = recipe.data.model_copy(update=where).model_dump()
    return json.dumps([data, template, recipe.evaluate.answer_pattern], sort_keys=True)


def _check_same_tokenizer(
    tokenizers: Sequence[PreTrainedTokenizerBase], subjects: Sequence[Subject]
) -> None:
    first, *others = (tokenizer.get_vocab() for tokenizer in tokenizers)
    for vocabulary, subject in zip(others, subjects[1:], strict=True):
        if vocabulary != first:
            raise UsageError(
                f"{subjects[0].adapter} and {subject.adapter} carry different tokenizers ({len(first):,} and "
                f"{len(vocabulary):,} tokens), so one call cannot compare them. Evaluate each by itself."
            )


def _check_same_base(recipes: list[Recipe], runs: Sequence[str]) -> None:
    bases = {(r.model.name, r.model.revision, r.model.bits) for r in recipes}
    if len(bases) > 1:
        raise UsageError(
            "The runs have different bases, so one call cannot compare them: "
            + ", ".join(
                f"{run}: {r.model.name} at {r.model.bits} bits"
                for run, r in zip(runs, recipes, strict=True)
            )
            + ". Evaluate each by itself, or give --model and --adapter."
        )


def hash_of_base(section: ModelSection) -> str:
    """What tells this base from every other: the hub's commit, or the content of the folder or file.

    Of a GGUF file it is the sha256 of the whole, which `sha256sum` gives, and which names Ollama's files.

    Raises:
        ModelError: there is no such model.
    """
    name = resolve_alias(section.name)
    if Path(name).is_dir():
        return hash_of_folder(Path(name), shortcut=True)
    if Path(name).is_file():
        with open(name, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    commit = load_config(section)._commit_hash
    return hashlib.sha256(f"{name} {commit}".encode()).hexdigest()


def hash_of_folder(folder: Path, *, shortcut: bool = False) -> str:
    """sha256 of what a model or an adapter consists of: settings, tokenizer, code and weights.

    Args:
        folder: the model's or the adapter's.
        shortcut: of files over 64 MiB, take the beginning, the size and the time alone.
    """
    found = hashlib.sha256()
    for file in sorted(folder.glob("*")):
        if not file.is_file() or file.suffix.lower() not in PARTS_OF_A_MODEL:
            continue
        about = file.stat()
        with open(file, "rb") as content:
            if shortcut and about.st_size > WHOLE_FILE_BYTES:
                part = hashlib.sha256(content.read(2**20)).hexdigest()
                part += f" {about.st_size} {about.st_mtime_ns}"
            else:
                part = hashlib.file_digest(content, "sha256").hexdigest()
        found.update(json.dumps([file.name, part]).encode())
    return found.hexdigest()

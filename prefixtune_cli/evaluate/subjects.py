"""The models that are evaluated: a base and adapters on it, all on one loaded base.

The base is evaluated with the adapter switched off. Adapters are attached one at a time.
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
from prefixtune_cli.adapter_folder import check_fits, load_adapter
from prefixtune_cli.agreement import any_prompt, check_generation
from prefixtune_cli.errors import UsageError
from prefixtune_cli.evaluate.outcome import BASE
from prefixtune_cli.parallel.devices import device
from prefixtune_cli.pointed import Pointed, base_key
from prefixtune_cli.recipe.aliases import resolve as resolve_alias
from prefixtune_cli.recipe.schema import DataSection, Kind, ModelSection, Recipe
from prefixtune_cli.run_dir import RunDir
from prefixtune_cli.shared_base import SharedBase
from prefixtune_cli.tokenizer import check_base, load_config, load_tokenizer

ADAPTER = "adapter"
WHOLE_FILE_BYTES = 64 * 2**20  # a larger file of a base is known by its beginning, size and time
ANSWERED_BY = ("prefixtune-cli", "torch", "transformers", "peft", "lm_eval")
PARTS_OF_A_MODEL = {".json", ".safetensors", ".bin", ".pt", ".jinja", ".model", ".txt", ".py"}


@dataclass(frozen=True)
class Subject:
    """A model that is evaluated.

    Attributes:
        name: the head of its column: `base`, `adapter`, or the name of the run or folder if there are several.
        adapter: its folder; None for the base alone.
        whole: whether the folder holds a whole model (method `full`) rather than an adapter.
        run: the run directory that its results belong to.
        sha256: of the content of the adapter, or of the base.
        folder_name: the name of its run or folder.
    """

    name: str
    adapter: Path | None = None
    whole: bool = False
    run: RunDir | None = None
    sha256: str = ""
    folder_name: str = ""

    def to_json(self) -> dict[str, Any]:
        folder = None if self.adapter is None else str(self.adapter)
        return {"name": self.name, "folder": folder, "sha256": self.sha256}


@dataclass
class Cast:
    """All models that are evaluated together, and how they read data.

    Attributes:
        recipe: has the base's section, and the settings for reading data.
        tokenizer: the adapters', with their chat template, or the base's.
        template: the file of a chat template that wins over the tokenizer's.
        readings: each adapter's way to read and render data, as text.
        preferences: how the runs that were trained on preferences read them, and of what kind they are.
        subjects: the models; the base, if it takes part, is the first.
        base_sha256: see `hash_of_base`.
    """

    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    template: str | None
    readings: list[str]
    preferences: list[tuple[Kind, DataSection]]
    subjects: list[Subject]
    base_sha256: str
    _base: PreTrainedModel | None = field(default=None, repr=False)
    _attached: tuple[Subject, Any] | None = field(default=None, repr=False)

    @contextlib.contextmanager
    def loaded(self, bases: SharedBase | None = None) -> Iterator[PreTrainedModel]:
        """Within the block, the base is loaded, or lent by `bases` if given.

        Raises:
            ModelError, ResourceError: see `model.load_base`.
        """
        with (bases or SharedBase()).lent(self.recipe.model) as self._base:
            yield self._base.eval()
            self._detach()

    @contextlib.contextmanager
    def on_stage(self, subject: Subject) -> Iterator[Any]:
        """Within the block, the yielded model answers as `subject`.

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
            model = load_adapter(self._base, subject.adapter).eval()
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
        """Everything that an answer of `subject` depends on, besides the request."""
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


def assemble(who: Sequence[Pointed], *, base: bool = True, template: str | None = None) -> Cast:
    """Find the models to evaluate, without loading weights.

    Args:
        who: runs and adapters of one base, or a base by itself.
        base: whether the base takes part.
        template: a chat template that was typed.

    Raises:
        UsageError: no model is left, one is given twice, or the bases or the adapters' tokenizers differ.
        AdapterError: a folder has no readable adapter, or the adapter does not fit the base.
    """
    trained = [one for one in who if one.folder is not None]
    if not trained and not base:
        raise UsageError(
            "--no-base leaves nothing to evaluate. Give an --adapter, or leave it out."
        )
    _check_same_base(who)
    recipe = who[0].recipe or Recipe(model=who[0].base)
    check_base(recipe.model)
    models.check_precision(recipe.model)
    for one in trained:
        if one.folder is not None and not one.whole:
            check_fits(recipe.model, one.folder)
    tokenizers = [load_tokenizer(recipe.model, one.folder) for one in who]
    _check_same_tokenizer(tokenizers, who)
    readings = [
        _reading(one, None if template else tokenizer.chat_template)
        for one, tokenizer in zip(who, tokenizers, strict=True)
    ]
    its = hash_of_base(recipe.model)
    subjects = [Subject(BASE, sha256=its)] if base else []
    everyone = [*subjects, *_named(trained)]
    recipes = [one.recipe for one in who if one.recipe and one.recipe.on_preferences]
    preferences = [(one.kind, one.data) for one in recipes]
    return Cast(recipe, tokenizers[0], template, readings, preferences, everyone, its)


def _named(trained: Sequence[Pointed]) -> list[Subject]:
    """The trained subjects: `adapter` if there is one; several have their folders' names, or paths if names repeat."""
    if len({one.folder and one.folder.resolve() for one in trained}) < len(trained):
        given = ", ".join(one.given for one in trained)
        raise UsageError(f"An adapter is given twice: {given}. Give each once.")
    names = [one.name for one in trained]
    if len(set(names)) < len(names) or BASE in names:
        names = [one.given for one in trained]
    if len(names) == 1:
        names = [ADAPTER]
    return [_subject(name, one) for name, one in zip(names, trained, strict=True)]


def _check_same_tokenizer(
    tokenizers: Sequence[PreTrainedTokenizerBase], who: Sequence[Pointed]
) -> None:
    first, *others = (tokenizer.get_vocab() for tokenizer in tokenizers)
    for vocabulary, one in zip(others, who[1:], strict=True):
        if vocabulary != first:
            raise UsageError(
                f"{who[0].given} and {one.given} carry different tokenizers ({len(first):,} and "
                f"{len(vocabulary):,} tokens), so one call cannot compare them. Evaluate each by itself."
            )


def _subject(name: str, one: Pointed) -> Subject:
    assert one.folder is not None
    run = one.run if one.as_trained else None
    sha256 = hash_of_folder(one.folder, shortcut=one.whole)
    return Subject(name, one.folder, one.whole, run, sha256, one.name)


def _reading(one: Pointed, template: Any) -> str:
    pattern = None if one.recipe is None else one.recipe.evaluate.answer_pattern
    return json.dumps([one.reading.model_dump(), template, pattern], sort_keys=True)


def _check_same_base(who: Sequence[Pointed]) -> None:
    if len({(base_key(one.base), one.base.bits) for one in who}) > 1:
        raise UsageError(
            "These have different bases, so one call cannot compare them: "
            + ", ".join(f"{one.given}: {one.base.name} at {one.base.bits} bits" for one in who)
            + ". Evaluate each by itself, or give the base of all with --model, and --bits."
        )


def hash_of_base(section: ModelSection) -> str:
    """What distinguishes this base from every other: the hub's commit, or the content of the folder or file.

    For a GGUF file it is the sha256 of the file, which `sha256sum` prints and Ollama uses as the file's name.

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
    """The sha256 of a model or an adapter: of its settings, tokenizer, code and weights.

    Args:
        folder: the model's or the adapter's.
        shortcut: for a file over 64 MiB, take only its beginning, size and time.
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

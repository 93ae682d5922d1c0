"""`evaluate`: compares a base and its adapters on benchmarks and own data. Reads from top to bottom.

It refuses wrong names, data, settings and a full disk before the base loads. Then every model does every evaluation,
and each result is written as soon as it is compared. If one evaluation fails, the others go on.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from prefixtune_cli import model as models
from prefixtune_cli.errors import Interrupted, PtpError, ResourceError
from prefixtune_cli.evaluate.answer_cache import AnswerCache, check_room, digest
from prefixtune_cli.evaluate.batches import BatchLimit
from prefixtune_cli.evaluate.evaluations import Evaluation, prepare
from prefixtune_cli.evaluate.outcome import Outcome
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.evaluate.settings import OWN_BENCHMARKS, Settings
from prefixtune_cli.evaluate.subjects import Cast, assemble
from prefixtune_cli.lock import locked
from prefixtune_cli.progress import Reporter, Silent
from prefixtune_cli.run_dir import RunDir, write_atomically, write_json
from prefixtune_cli.shared_base import SharedBase

PACKAGES = (
    "prefixtune-cli",
    "lm_eval",
    "torch",
    "transformers",
    "peft",
    "datasets",
    "bitsandbytes",
)


@dataclass(frozen=True)
class Found:
    """The outcomes in the order of the command line, the files written, and why each failed evaluation failed."""

    outcomes: list[Outcome]
    written: list[Path]
    failures: dict[str, str]


def evaluate(
    settings: Settings, reporter: Reporter | None = None, *, bases: SharedBase | None = None
) -> Found:
    """Evaluate as `settings` say, and write the results; `bases`, if given, lends the base.

    Raises:
        PtpError: see `errors`; everything that can be checked is checked before the base model loads.
        Interrupted: Ctrl-C; finished requests are kept, and the same command continues.
    """
    reporter = reporter or Silent()
    settings.check()
    cast = assemble(
        settings.who, base=settings.base, template=settings.data_settings.get("chat_template")
    )
    tokenizer = cast.tokenizer
    folders = _folders(settings, cast)
    evaluations = list(prepare(settings, cast, tokenizer, reporter))
    requests = sum(e.requests for e in evaluations) * len(cast.subjects)
    if settings.cache is not None:
        check_room(settings.cache, requests)
    with ExitStack() as opened:
        for folder in folders:
            opened.enter_context(locked(folder.path, shared=True))
            _check_writable(folder)
        models.tell_loading(cast.recipe.model, reporter)
        base = opened.enter_context(cast.loaded(bases))
        limit = (
            BatchLimit.automatic(base.device, reporter)
            if settings.batch_size is None
            else BatchLimit.of_rows(settings.batch_size, reporter)
        )
        of_base, lm = Scorer(base, tokenizer, limit, reporter), None
        if any(name not in OWN_BENCHMARKS for name in settings.benches):
            from prefixtune_cli.evaluate.language_model import BenchmarkLM

            lm = BenchmarkLM(base, tokenizer, limit, reporter)
        found = Found([], [], {})
        for evaluation in evaluations:
            with _kept_apart(evaluation.name, found, reporter, settings.cache is not None):
                outcome = _carry_out(evaluation, settings, cast, of_base, lm)
                found.outcomes.append(outcome)
                for folder in folders:
                    found.written.append(_write(outcome, folder))
    return found


def _carry_out(
    evaluation: Evaluation, settings: Settings, cast: Cast, of_base: Scorer, lm: Any
) -> Outcome:
    """Judge every model, compare them, and record everything that the figures depend on."""
    started = time.monotonic()
    judged: dict[str, Any] = {}
    for subject in cast.subjects:
        chat = of_base.tokenizer.chat_template if settings.apply_chat_template else None
        cache = AnswerCache(settings.cache, cast.key(subject, chat=digest(chat)))
        with cast.on_stage(subject) as model:
            scorer = dataclasses.replace(of_base, model=model, cache=cache)
            judged[subject.name] = evaluation.judge(scorer, subject.name, lm)
    outcome = evaluation.compare(judged, lm)
    section = cast.recipe.model
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started, 1),
        "model": {**section.model_dump(), "sha256": cast.base_sha256},
        "subjects": [subject.to_json() for subject in cast.subjects],
        "settings": settings.to_json(),
        "batch": {"rows": of_base.limit.rows, "tokens": of_base.limit.tokens},
        "versions": {name: metadata.version(name) for name in PACKAGES},
        **outcome.record,
    }
    return dataclasses.replace(outcome, record=record)


@contextmanager
def _kept_apart(name: str, found: Found, reporter: Reporter, resumes: bool) -> Iterator[None]:
    """Within the block, an error is recorded and does not stop the other evaluations."""
    try:
        yield
    except KeyboardInterrupt:
        kept = "Finished requests are kept: the same command continues where this one stopped."
        lost = "Without a cache, nothing was kept. Leave out --no-cache to be able to continue next time."
        raise Interrupted(f"Stopped. {kept if resumes else lost}") from None
    except Interrupted:
        raise
    except Exception as error:
        said = str(error) if isinstance(error, PtpError) else f"{type(error).__name__}: {error}"
        found.failures[name] = said
        reporter.warning(f"{name} failed: {said}")


def _folders(settings: Settings, cast: Cast) -> list[RunDir]:
    """The folders for the results."""
    if settings.out is not None:
        return [RunDir(settings.out)]
    if runs := [subject.run for subject in cast.subjects if subject.run is not None]:
        return runs
    name = cast.recipe.model.name.rstrip("/").split("/")[-1]
    adapters = [s.folder_name for s in cast.subjects if s.adapter is not None]
    return [RunDir(Path("runs") / "-".join([name, *adapters, "eval"]))]


def _check_writable(folder: RunDir) -> None:
    """Refuse a folder that cannot be made or is not writable, without making it."""
    results = folder.eval_result("any").parent
    there = next(path for path in (results, *results.resolve().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        why = "cannot be written to" if there.is_dir() else "is a file"
        raise ResourceError(
            f"Results cannot be written to {results}: {there} {why}. Name another folder with --out FOLDER."
        )


def _write(outcome: Outcome, folder: RunDir) -> Path:
    """Write the result last: its presence means that all files are complete."""
    result = folder.eval_result(outcome.bench)
    for name, content in outcome.files.items():
        write_atomically(result.parent / name, content)
    write_json(result, outcome.to_json())
    return result

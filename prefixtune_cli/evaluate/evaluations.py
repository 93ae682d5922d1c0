"""Prepares evaluations for a model: lm-eval's benchmarks, the user's data, our samples, and plain text.

It refuses whatever it can before the base loads: first wrong names, then wrong data.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from transformers import PreTrainedTokenizerBase

from prefixtune_cli.data.columns import MAPS
from prefixtune_cli.data.template import chat_template
from prefixtune_cli.errors import OtherRowsError, UsageError
from prefixtune_cli.evaluate import forgetting, own_data, own_labelled, own_pairs
from prefixtune_cli.evaluate.catalogue import Catalogue, load_catalogue
from prefixtune_cli.evaluate.outcome import Outcome
from prefixtune_cli.evaluate.own_data import OwnData
from prefixtune_cli.evaluate.own_pairs import OwnPairs
from prefixtune_cli.evaluate.scorer import Scorer
from prefixtune_cli.evaluate.settings import FORGETTING, OWN_BENCHMARKS, QUICKSTART, Settings, stem
from prefixtune_cli.evaluate.subjects import Cast
from prefixtune_cli.progress import Reporter
from prefixtune_cli.recipe.load import resolve
from prefixtune_cli.recipe.schema import DataSection, EvaluateSection, Kind
from prefixtune_cli.tokenizer import check_ids, load_config

SAMPLES = {"intents": "sample:intents-test", "records": "sample:records-test"}
WINDOW = 1024
NO_PATTERN = {"answer_pattern": None}


@dataclass(frozen=True)
class Evaluation:
    """One name of `--bench`, or one `--data`, ready for a model.

    Attributes:
        name: the name of its result.
        requests: how many requests a model has to answer.
        judge: asks the scorer's model, under the given name; for benchmarks, the third argument is lm-eval's model.
        compare: makes the table from what every model did, by name.
    """

    name: str
    requests: int
    judge: Callable[[Scorer, str, Any], Any]
    compare: Callable[[Mapping[str, Any], Any], Outcome]


def prepare(
    settings: Settings, cast: Cast, tokenizer: PreTrainedTokenizerBase, reporter: Reporter
) -> Iterator[Evaluation]:
    """Do everything that needs no model; check all names before reading the first data set."""
    from_hub = [name for name in settings.benches if name not in OWN_BENCHMARKS]
    given = {**cast.recipe.evaluate.bench_data, **settings.bench_data}
    catalogue = load_catalogue() if from_hub or given else None
    if catalogue is not None:
        catalogue.check(from_hub, OWN_BENCHMARKS)
    for source in settings.data:
        yield _of_own(source, settings, cast, tokenizer, reporter)
    local: dict[str, Path] = {}
    if catalogue is not None:
        from prefixtune_cli.evaluate.tasks import local_data

        local = local_data(given, catalogue)
        read = {task.dataset for name in from_hub for task in catalogue.tasks(name)}
        for name in settings.bench_data:
            if not read & local_data({name: ""}, catalogue).keys():
                reporter.warning(f"--bench-data {name}: none of the benchmarks reads it.")
    for name in settings.benches:
        if name == QUICKSTART:
            yield _of_data(SAMPLES, QUICKSTART, settings, cast, tokenizer, reporter)
        elif name == FORGETTING:
            yield _of_text(settings, cast, tokenizer)
        else:
            assert catalogue is not None
            reporter.notice(f"Building the requests of {name}.")
            yield _of_benchmark(name, catalogue, local, settings, cast, tokenizer)


def _of_own(
    source: str,
    settings: Settings,
    cast: Cast,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
) -> Evaluation:
    """The user's data: rows with one answer, pairs of answers, or labelled answers, as a run learned from first."""
    name = f"data-{stem(source)}"
    rest = (settings, cast, tokenizer, reporter)
    mapped = settings.data_settings.get("map", {})
    of_columns: dict[str, Kind] = {"chosen": "pairs", "label": "labelled"}
    kinds: dict[Kind, None] = dict.fromkeys(
        (
            *(kind for kind, _ in cast.preferences),
            *(kind for column, kind in of_columns.items() if column in mapped),
            *get_args(Kind),
        )
    )
    errors: list[OtherRowsError] = []
    for kind in kinds:
        try:
            if kind == "answers":
                return _of_data({name: source}, None, *rest)
            return _of_preferences(kind, name, source, *rest)
        except OtherRowsError as error:
            errors.append(error)
    raise errors[0]


def _of_preferences(
    kind: Kind,
    name: str,
    source: str,
    settings: Settings,
    cast: Cast,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
) -> Evaluation:
    ways = {
        json.dumps([way.map, way.format], sort_keys=True): way
        for of_kind, way in cast.preferences
        if of_kind == kind
    }
    if len(ways) > 1 and "map" not in settings.data_settings:
        raise UsageError(
            f"The runs read the columns of {'pairs' if kind == 'pairs' else 'labelled answers'} differently. Name "
            f"them: {MAPS[kind]}."
        )
    of_run = next(iter(ways.values()), cast.recipe.data_of_answers)
    section = _section(of_run, settings, cast).model_copy(update={"train_on": "completion"})
    pairs = own_pairs.prepare(
        source, section, tokenizer, reporter, name=name, limit=settings.limit, kind=kind
    )
    compare = own_pairs.compare if kind == "pairs" else own_labelled.compare
    _check_ids(pairs, cast, tokenizer)
    if settings.judging.get("answer_pattern"):
        reporter.warning(f"--answer-pattern judges generated answers, of which {name} has none.")
    return Evaluation(
        name,
        len(pairs.examples),
        lambda scorer, who, _: own_pairs.judge(scorer, pairs, f"{who} on {name}"),
        lambda judged, _: compare(pairs, judged),
    )


def _section(section: DataSection, settings: Settings, cast: Cast) -> DataSection:
    """How own data is read: as the run reads its data, changed by what was typed."""
    if len(set(cast.readings)) > 1:
        raise UsageError(
            "The adapters read and render data differently (data.max_length, map, train_on, the chat template or the "
            "like), so one call cannot compare them fairly. Evaluate each by itself on --data and quickstart; if only "
            "their templates differ, give one with --chat-template."
        )
    return section.model_copy(update={"chat_template": cast.template, **settings.data_settings})


def _check_ids(data: OwnData | OwnPairs, cast: Cast, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ModelError if the base has no embedding for a token."""
    ids = [row["input_ids"] for row in data.examples]
    i = max(range(len(ids)), key=lambda i: max(ids[i]))
    check_ids(cast.recipe.model, tokenizer, ids[i], data.origin(i))


def _of_data(
    sources: Mapping[str, str],
    bench: str | None,
    settings: Settings,
    cast: Cast,
    tokenizer: PreTrainedTokenizerBase,
    reporter: Reporter,
) -> Evaluation:
    """Rows with one answer: the user's, or our samples."""
    section = _section(cast.recipe.data_of_answers, settings, cast)
    judging = _judging(cast.recipe.evaluate, settings.judging if bench is None else NO_PATTERN)
    parts = [
        own_data.prepare(
            source,
            section if bench is None else section.model_copy(update={"map": {}, "format": "auto"}),
            judging,
            tokenizer,
            reporter,
            name=name,
            limit=settings.limit,
        )
        for name, source in sources.items()
    ]
    for part in parts:
        _check_ids(part, cast, tokenizer)

    def judge(scorer: Scorer, who: str, _: Any) -> Any:
        return [own_data.judge(scorer, part, f"{who} on {part.name}") for part in parts]

    def compare(judged: Mapping[str, Any], _: Any) -> Outcome:
        each = [
            own_data.compare(part, {who: its[i] for who, its in judged.items()})
            for i, part in enumerate(parts)
        ]
        return each[0] if bench is None else _as_one(bench, each)

    name = bench or parts[0].name
    return Evaluation(name, sum(2 * len(part) for part in parts), judge, compare)


def _judging(section: EvaluateSection, typed: Mapping[str, Any]) -> EvaluateSection:
    """How the run judges answers, changed by what was typed; raises RecipeError for a wrong value."""
    return resolve(flags={"evaluate": {**section.model_dump(), **typed}}).evaluate


def _as_one(bench: str, each: list[Outcome]) -> Outcome:
    return Outcome(
        bench,
        [line for outcome in each for line in outcome.lines],
        {"parts": {outcome.bench: outcome.record for outcome in each}},
        tuple(dict.fromkeys(notice for outcome in each for notice in outcome.notices)),
        {f"{bench}.{name}": content for outcome in each for name, content in outcome.files.items()},
    )


def _of_text(settings: Settings, cast: Cast, tokenizer: PreTrainedTokenizerBase) -> Evaluation:
    positions = getattr(
        load_config(cast.recipe.model).get_text_config(), "max_position_embeddings", None
    )
    window = settings.window or min(WINDOW, int(tokenizer.model_max_length), positions or WINDOW)
    text = forgetting.prepare(str(settings.text), tokenizer, window, settings.limit)
    highest = max(text.windows, key=lambda window: max(window.ids))
    check_ids(cast.recipe.model, tokenizer, highest.ids, highest.origin)
    return Evaluation(
        FORGETTING,
        len(text),
        lambda scorer, who, _: forgetting.judge(scorer, text, who),
        lambda judged, _: forgetting.compare(text, judged),
    )


def _of_benchmark(
    name: str,
    catalogue: Catalogue,
    local: Mapping[str, Path],
    settings: Settings,
    cast: Cast,
    tokenizer: PreTrainedTokenizerBase,
) -> Evaluation:
    """One of lm-eval's benchmarks."""
    from prefixtune_cli.evaluate import benchmarks
    from prefixtune_cli.evaluate.tasks import Rendering, load_benchmark_tasks

    rendering = Rendering(
        limit=settings.limit,
        num_fewshot=settings.num_fewshot,
        chat_template=_chat(tokenizer, cast) if settings.apply_chat_template else None,
        runs_code=settings.runs_code,
    )
    loaded = load_benchmark_tasks(name, catalogue, local, rendering)

    def judge(scorer: Scorer, who: str, lm: Any) -> Any:
        lm.turn(name, who, scorer.model, scorer.cache, loaded.versions)
        return benchmarks.answer(lm, loaded, rendering)

    def compare(judged: Mapping[str, Any], lm: Any) -> Outcome:
        outcome = benchmarks.compare(loaded, judged)
        cut = sum(lm.cut.values())
        if not cut:
            return outcome
        notice = (
            f"{cut:,} of {loaded.requests:,} requests of {name} are longer than the model's {lm.max_length:,} "
            "tokens, so their beginning was cut off. A smaller --num-fewshot makes them shorter."
        )
        return dataclasses.replace(outcome, notices=(*outcome.notices, notice))

    return Evaluation(name, loaded.requests, judge, compare)


def _chat(tokenizer: PreTrainedTokenizerBase, cast: Cast) -> Callable[..., str]:
    """What renders messages as lm-eval does, by the tokenizer's template or the run's."""
    from jinja2.exceptions import TemplateError

    template = chat_template(tokenizer, cast.template)
    if template is None:
        raise UsageError(
            f"{cast.recipe.model.name} has no chat template. Leave --apply-chat-template out, or use the -instruct "
            "version of the model."
        )
    tokenizer.chat_template = template.source

    def render(messages: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        how = {"tokenize": False, "add_generation_prompt": add_generation_prompt}
        how["continue_final_message"] = not add_generation_prompt
        try:
            return str(tokenizer.apply_chat_template(messages, **how))
        except TemplateError:  # some templates refuse a system message
            rest = [message for message in messages if message["role"] != "system"]
            return str(tokenizer.apply_chat_template(rest, **how))

    return render

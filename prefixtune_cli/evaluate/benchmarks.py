"""Has the base and its adapters answer one of lm-eval's benchmarks, and compares them item by item."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from prefixtune_cli.evaluate.answer_cache import digest
from prefixtune_cli.evaluate.outcome import BASE, Line, Outcome
from prefixtune_cli.evaluate.paired import (
    Interval,
    PairedDifference,
    aggregate_difference,
    aggregate_interval,
    mean_difference,
    mean_interval,
)
from prefixtune_cli.evaluate.tasks import Benchmark, Rendering

# For metrics other than means: each draw of items computes the metric again.
RESAMPLES, FEWEST_DRAWS, SECONDS_OF_DRAWS = 1000, 100, 60

Key = tuple[str, str]  # a metric and its filter
Items = dict[int, Any]  # document → value


@dataclass(frozen=True)
class Answered:
    """lm-eval's results for one model, and the value of each item."""

    results: dict[str, Any]
    items: dict[str, dict[Key, Items]]


def answer(lm: Any, benchmark: Benchmark, rendering: Rendering) -> Answered:
    """Have the current model of `lm` answer all requests of a benchmark.

    Args:
        lm: an lm-eval model.
        benchmark: its tasks, with their requests built.
        rendering: the settings that built the requests.
    """
    from lm_eval import evaluate

    results: Any = evaluate(
        lm=lm,
        task_dict={"tasks": benchmark.tasks, "groups": benchmark.groups},
        limit=rendering.limit,
        bootstrap_iters=0,
        confirm_run_unsafe_code=rendering.runs_code,
    )
    items = {name: _items(results["samples"][name]) for name in benchmark.tasks}
    return Answered(results, items)


def _items(samples: Sequence[Mapping[str, Any]]) -> dict[Key, Items]:
    found: dict[Key, Items] = {}
    for sample in samples:
        for metric in sample["metrics"]:
            key = (metric, sample["filter"])
            found.setdefault(key, {})[sample["doc_id"]] = sample[metric]
    return found


def compare(benchmark: Benchmark, answered: Mapping[str, Answered]) -> Outcome:
    """The table and the record of a benchmark that every model has answered.

    Args:
        benchmark: the benchmark.
        answered: model → its results; the base, if it took part, is under BASE.
    """
    first = _first(answered)
    lines = list(_lines(benchmark, answered))
    record = {
        "tasks": {
            name: {
                "version": task.VERSION,
                "num_fewshot": task.get_config("num_fewshot"),
                "dataset": task.DATASET_PATH,
                "subset": task.DATASET_NAME,
                "items": first.results["n-samples"][name]["effective"],
                "of": first.results["n-samples"][name]["original"],
                "rows_sha256": digest([s["doc_hash"] for s in first.results["samples"][name]]),
                "prompts_sha256": digest(
                    [s["prompt_hash"] for s in first.results["samples"][name]]
                ),
            }
            for name, task in benchmark.tasks.items()
        },
        "items": {
            name: {
                ",".join(key): {
                    "document": list(items),
                    **{
                        who: [_plain(of.items[name].get(key, {}).get(d)) for d in items]
                        for who, of in answered.items()
                    },
                }
                for key, items in first.items[name].items()
            }
            for name in benchmark.tasks
        },
    }
    return Outcome(benchmark.name, lines, record, benchmark.notices)


class _Sample(Protocol):
    """The items behind a figure, for every model."""

    @property
    def percent(self) -> bool: ...

    def interval(self, who: str) -> Interval: ...

    def difference(self, base: str, adapter: str) -> PairedDifference: ...


@dataclass(frozen=True)
class _Mean:
    """A mean of numbers, over one task, or over a group with one stratum a task."""

    strata: Mapping[str, list[NDArray[np.float64]]]
    weights: list[float] | None = None

    @property
    def percent(self) -> bool:
        return all(
            bool(np.isin(part, (0, 1)).all()) for parts in self.strata.values() for part in parts
        )

    def interval(self, who: str) -> Interval:
        return mean_interval(self.strata[who], weights=self.weights)

    def difference(self, base: str, adapter: str) -> PairedDifference:
        return mean_difference(self.strata[base], self.strata[adapter], weights=self.weights)


@dataclass(frozen=True)
class _Aggregate:
    """Any other metric: lm-eval's own function computes it for every draw of items."""

    items: Mapping[str, list[Any]]
    aggregate: Callable[[list[Any]], float]
    resamples: int
    percent: bool = False

    def interval(self, who: str) -> Interval:
        return aggregate_interval(self.items[who], self.aggregate, resamples=self.resamples)

    def difference(self, base: str, adapter: str) -> PairedDifference:
        return aggregate_difference(
            self.items[base], self.items[adapter], self.aggregate, resamples=self.resamples
        )


def _lines(benchmark: Benchmark, answered: Mapping[str, Answered]) -> Iterator[Line]:
    """The lines of groups, each before those of its members; if a group has its own figure, its tasks are folded."""
    inside = {child for group in benchmark.groups.values() for child in group.child_names}

    def walk(name: str, depth: int, folded: bool) -> Iterator[Line]:
        if name not in benchmark.groups:
            yield from _task_lines(benchmark.tasks[name], answered, depth, folded)
            return
        own = list(_group_lines(benchmark.groups[name], answered, depth, folded))
        yield from own
        for child in benchmark.groups[name].child_names:
            is_task = child not in benchmark.groups
            yield from walk(child, depth + bool(own), folded or (bool(own) and is_task))

    for name in (*benchmark.groups, *benchmark.tasks):
        if name not in inside:
            yield from walk(name, 0, False)


def _task_lines(
    task: Any, answered: Mapping[str, Answered], depth: int, folded: bool
) -> Iterator[Line]:
    name = task.task_name
    for key, items in _first(answered).items[name].items():
        of_all = _aligned(answered, name, key)
        aggregate = task.aggregation().get(key[0])
        sample: _Sample | None = None
        if (numbers := _numbers(of_all)) is not None and _is_mean(aggregate):
            sample = _Mean({who: [values] for who, values in numbers.items()})
        elif aggregate is not None:
            sample = _sampled(of_all, aggregate)
        yield from _line(name, key, answered, sample, len(items), depth, folded)


def _group_lines(
    group: Any, answered: Mapping[str, Answered], depth: int, folded: bool
) -> Iterator[Line]:
    """The figures that lm-eval gives for the group; only means have an interval."""
    its_tasks = {task.task_name: task for task in group.get_all_tasks()}
    tasks = list(its_tasks)
    wanted = {
        setting.metric: setting.weight_by_size for setting in group.aggregate_metric_list or []
    }
    first = _first(answered).items
    keys = dict.fromkeys(key for task in tasks for key in first[task] if key[0] in wanted)
    for key in keys:
        its = [task for task in tasks if key in first[task]]
        parts = [_numbers(_aligned(answered, task, key)) for task in its]
        means = all(_is_mean(its_tasks[task].aggregation().get(key[0])) for task in its)
        sample = None
        if means and all(part is not None for part in parts):
            strata = {who: [part[who] for part in parts if part is not None] for who in answered}
            sample = _Mean(strata, None if wanted[key[0]] else [1.0] * len(its))
        count = sum(len(first[task][key]) for task in its)
        yield from _line(group.name, key, answered, sample, count, depth, folded)


def _line(
    name: str,
    key: Key,
    answered: Mapping[str, Answered],
    sample: _Sample | None,
    items: int,
    depth: int,
    folded: bool,
) -> Iterator[Line]:
    values = {who: of.results["results"][name].get(",".join(key)) for who, of in answered.items()}
    if not all(isinstance(value, int | float) for value in values.values()):
        return  # a value that is not a number appears only in the record
    metric, filter_name = key
    compared = [who for who in answered if who != BASE] if BASE in answered else []
    yield Line(
        name=name,
        metric=metric if filter_name == "none" else f"{metric}, {filter_name}",
        items=items,
        values={who: float(value) for who, value in values.items()},
        differences={who: sample.difference(BASE, who) for who in compared} if sample else {},
        intervals={who: sample.interval(who) for who in answered}
        if sample and not compared
        else {},
        higher_is_better=_first(answered)
        .results["higher_is_better"]
        .get(name, {})
        .get(metric, True),
        percent=sample is not None and sample.percent,
        depth=depth,
        folded=folded,
    )


def _aligned(answered: Mapping[str, Answered], name: str, key: Key) -> dict[str, list[Any]]:
    """Each model's values, in the same order, for the documents for which every model has one."""
    of_all = {who: of.items[name].get(key, {}) for who, of in answered.items()}
    shared = [
        d for d in _first(answered).items[name][key] if all(d in of for of in of_all.values())
    ]
    return {who: [of[d] for d in shared] for who, of in of_all.items()}


def _sampled(of_all: Mapping[str, list[Any]], aggregate: Any) -> _Aggregate | None:
    """The metric with as many draws as a minute allows; None if the metric fails or is too slow."""
    started = time.perf_counter()
    try:
        for items in of_all.values():
            aggregate(list(items))
    except Exception:  # some metrics load a scorer
        return None
    seconds = (time.perf_counter() - started) / len(of_all)
    draws = int(min(RESAMPLES, SECONDS_OF_DRAWS / max(seconds, 1e-9)))
    return _Aggregate(of_all, aggregate, draws) if draws >= FEWEST_DRAWS else None


def _first(answered: Mapping[str, Answered]) -> Answered:
    return next(iter(answered.values()))


def _numbers(of_all: Mapping[str, list[Any]]) -> dict[str, NDArray[np.float64]] | None:
    """The items as numbers; None if any is not a number."""
    plain = all(
        isinstance(value, int | float | np.integer | np.floating | np.bool_)
        for values in of_all.values()
        for value in values
    )
    if not plain:
        return None
    return {who: np.asarray(values, dtype=float) for who, values in of_all.items()}


def _is_mean(aggregate: Any) -> bool:
    """Whether lm-eval takes the plain mean of the items, which is its default."""
    from lm_eval.api.metrics import mean

    return aggregate in (None, mean)


def _plain(value: Any) -> Any:
    """An item's value in JSON's types."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)

"""The legend under a comparison's table: failures, how the figures were tested, the protocol, the data, the command.

Its words for tests and differences are those of wording.py, which the report's verdict has, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prefixtune_cli.compare import wording
from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.metrics import COSTS, FORGOTTEN, KV_CACHE
from prefixtune_cli.compare.standing import Standings, standings
from prefixtune_cli.recipe.schema import kind_of


def legend(comparison: Comparison, *, bold: bool = False) -> list[str]:
    """The lines of the legend; with `bold`, the table shows the best figures in bold and not with a star."""
    every = standings(comparison)
    return [
        *_failures(comparison),
        *_figures(every, "bold" if bold else wording.BEST),
        *_tests(comparison, every),
        *_losses(every),
        *_costs(comparison),
        *_model_and_protocol(comparison),
        *_data(comparison),
        *_sweeps(comparison),
        *comparison.notices,
        f"Command: {comparison.command}",
    ]


def _failures(comparison: Comparison) -> Iterator[str]:
    for contestant in comparison.contestants:
        for cell in contestant.cells:
            if cell.failure is not None:
                what = "is not whole" if cell.results else "has no result"
                yield f"{contestant.label}, seed {cell.seed}, {what}: {cell.failure}"
    for label, why in comparison.unmeasured.items():
        yield f"{label}: its cost was not measured. {why}"


def _figures(every: list[Standings], best: str) -> Iterator[str]:
    """What a figure is: a mean over seeds, or the figure of one seed."""
    seeds = max((s.seeds for found in every for s in found.each), default=0)
    if seeds > 1:
        yield f"Means over {seeds} seeds, ± their standard deviation; {best}: the best mean."
    elif seeds == 1:
        yield f"Figures of one seed, so nothing is known of how seeds differ; {best}: the best one."


def _tests(comparison: Comparison, every: list[Standings]) -> Iterator[str]:
    """How differences were tested; data sets that were tested alike share a line."""
    alike: dict[str, dict[str, None]] = {}  # how → the names, each once
    for found in every:
        if len(found.each) > 1 and (found.untested or any(s.difference for s in found.each)):
            alike.setdefault(wording.how_tested(found), {})[wording.data_name(found.data)] = None
    for how, names in alike.items():
        on = f" on {', '.join(names)}" if len(alike) > 1 else ""
        yield f"Differences from {comparison.contestants[0].label}{on} {how}"
    seeds = {difference.seeds for found in every for difference in found.tested}
    if any(found.seeds_tested for found in every) and min(seeds) == 2:
        yield (
            "With two seeds the test takes up to 13 % of chance differences for real ones where seeds differ much; "
            "three or more seeds keep it at some 5 %."
        )


def _losses(every: list[Standings]) -> Iterator[str]:
    for found in every:
        where = wording.data_name(found.data)
        if found.metric is FORGOTTEN and found.base is not None:
            base = found.metric.figure(found.base)
            yield (
                f"Forgetting: by how much the loss on {where} is above the base's {base} nats a token; "
                "less is better."
            )
        elif found.metric.legend:
            yield found.metric.legend.format(where=where)


def _costs(comparison: Comparison) -> Iterator[str]:
    costs = [c.cost for c in comparison.contestants if c.cost is not None]
    if any(cost.interleaved for cost in costs):
        yield (
            "Speeds are medians (with their range) of rounds in which all take turns in one process; the rest of "
            "the machine may do other work."
        )
    elif any(cost.training_tokens_per_second for cost in costs):
        yield (
            "Training speeds are medians (with their range) of what the runs logged; what else the machine did at "
            "the time is in them."
        )
    asked = {(cost.prompts, cost.prompt_tokens) for cost in costs if cost.prompt_tokens is not None}
    if len(asked) == 1:
        ((prompts, length),) = asked
        alone = prompts == 1
        names = [m.answering for m in COSTS if m.answering and (alone or m is not KV_CACHE)]
        many = "one sequence" if alone else f"{prompts} sequences at once, each"
        yield f"{wording.listed(names)}: {many} with a prompt of {length:,} tokens."
    if (adapters := max((cost.adapters for cost in costs), default=1)) > 1:
        yield f"Of each method {adapters} adapters are active at once, and trained together."
    if comparison.kind == "speed" and any(cost.training_ratio for cost in costs):
        yield (
            "×: how many times as fast, above 1 is faster; the base's training is its forward and backward pass."
        )
    if comparison.groups:
        yield "Those under a base took turns with it, and × is over what stands under the same base."


def _model_and_protocol(comparison: Comparison) -> Iterator[str]:
    model = comparison.model
    about = [f"{model['bits']} bits"] if model.get("bits") else []
    if model.get("revision"):
        about.append(f"revision {model['revision']}")
    if model.get("parameters"):
        about.append(f"{model['parameters']:,} parameters")
    in_brackets = f" ({', '.join(about)})" if about else ""
    yield f"Base: {model['name']}{in_brackets}."
    if said := list(_protocol(comparison.protocol)):
        yield f"All alike: {', '.join(said)}."


def _protocol(protocol: Mapping[str, Any]) -> Iterator[str]:
    if (steps := protocol.get("steps")) is not None:
        kind = kind_of(protocol.get("objective"))
        batch, rows = protocol.get("batch"), "pairs" if kind == "pairs" else "examples"
        yield f"{steps:,} steps" + (f" of {batch} {rows}" if batch is not None else "")
    if (objective := protocol.get("objective")) is not None:
        settings = ("beta", "gamma", "desirable_weight", "undesirable_weight")
        given = [
            f"{name.replace('_', ' ')} {protocol[name]:g}" for name in settings if name in protocol
        ]
        yield " ".join(
            ["objective", objective, *(["with", wording.listed(given)] if given else [])]
        )
    if schedule := protocol.get("schedule"):
        yield f"{schedule} schedule"
    if seeds := protocol.get("seeds"):
        shown = seeds if isinstance(seeds, list | tuple) else [seeds]
        yield f"seed{'s' if len(shown) > 1 else ''} {', '.join(map(str, shown))}"
    if few_shot := protocol.get("few_shot"):
        yield f"{few_shot} example{'s' if few_shot > 1 else ''} a class, drawn anew for each seed"
    if (sweep := protocol.get("sweep")) and sweep > 1:
        yield f"a sweep of {sweep} learning rates each, chosen by the validation rows"


def _data(comparison: Comparison) -> Iterator[str]:
    parts = []
    for name, about in comparison.data.items():
        rows = f", {about['rows']:,} rows" if about.get("rows") is not None else ""
        parts.append(f"{name} {about['source']}{rows}")
    if parts:
        yield f"Data: {'; '.join(parts)}."


def _sweeps(comparison: Comparison) -> Iterator[str]:
    for contestant in comparison.contestants:
        for point in contestant.sweep:
            if point.failure is not None:
                yield f"{contestant.label} failed at learning rate {point.learning_rate:g}: {point.failure}"
        if said := wording.edge_of_sweep(
            contestant.label, contestant.sweep, contestant.learning_rate
        ):
            yield said

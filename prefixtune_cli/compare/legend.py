"""What stands under the table of a comparison: failures, what was tested and how, protocol, data, command."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Comparison, Contestant
from prefixtune_cli.compare.metrics import COSTS, EXACT_MATCH, FORGOTTEN, KV_CACHE
from prefixtune_cli.compare.standing import Standings, standings

BEST, LARGER = "*", "†"
# A data set's name under a table, and in a sentence that stands alone; another one has its own.
NAMES: Mapping[str, str] = {TEST: "the test data", OOD: "the OOD data", FORGETTING: "other text"}
FULL_NAMES: Mapping[str, str] = {
    TEST: "the test data",
    OOD: "the out-of-distribution data",
    FORGETTING: "unrelated text",
}


def legend(comparison: Comparison, *, bold: bool = False) -> list[str]:
    """One sentence or two a line.

    Args:
        comparison: what was found.
        bold: the best figures are in bold, and not marked by a star.
    """
    every = [] if comparison.kind == "speed" else standings(comparison)
    return [
        *_failures(comparison),
        *_figures(comparison, every, bold=bold),
        *_tests(comparison, every),
        *_forgetting(every),
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


def _figures(comparison: Comparison, every: list[Standings], *, bold: bool) -> Iterator[str]:
    if not every:
        return
    seeds = sorted({cell.seed for c in comparison.contestants for cell in c.cells})
    spread = any(s.deviation is not None for found in every for s in found.each)
    best = "bold" if bold else BEST
    if spread:
        yield f"Means over {len(seeds)} seeds, ± their standard deviation; {best}: the best mean."
    else:
        yield f"Figures of one seed, so nothing is known of how seeds differ; {best}: the best one."


def _tests(comparison: Comparison, every: list[Standings]) -> Iterator[str]:
    """What was tested, in the fewest words that are true of each data set."""
    if not every or len(comparison.contestants) < 2:
        return
    first = comparison.contestants[0].label
    ways: dict[str, list[str]] = {}
    for found in every:
        if way := _way(found):
            ways.setdefault(way, []).append(NAMES.get(found.data, found.data))
    for way, names in ways.items():
        on = f" on {', '.join(names)}" if len(ways) > 1 else ""
        yield f"Differences from {first}{on} {way}"
    if any(found.seeds_tested for found in every) and _fewest_seeds(every) == 2:
        yield (
            "With two seeds the test takes up to 13 % of chance differences for real ones where seeds differ much; "
            "three or more seeds keep it at some 5 %."
        )


def _way(found: Standings) -> str | None:
    if found.untested:
        return f"are not tested: {found.untested}."
    if not any(s.difference for s in found.each):
        return None
    if found.seeds_tested and found.rows_tested:
        over = "paired by seed and row, both taken as random (crossed effects, Satterthwaite's degrees of freedom)"
    elif found.rows_tested:
        over = "paired by row; with one seed in common they say nothing of other seeds"
    elif found.seeds_tested:
        over = "paired by seed; as the rows' losses were not kept, they say nothing of other rows"
    else:
        return "are not tested: there is one figure of each."
    return (
        f"are {over}, with 95 % intervals; {LARGER}: larger than noise, p < 0.05 by the t test after Holm's "
        "adjustment for the number of differences."
    )


def _fewest_seeds(every: list[Standings]) -> int:
    return min(
        s.difference.seeds
        for found in every
        for s in found.each
        if s.difference is not None and s.difference.p_value is not None
    )


def _forgetting(every: list[Standings]) -> Iterator[str]:
    for found in every:
        if found.metric is FORGOTTEN and found.base is not None:
            yield (
                "Forgetting: by how much the loss on text that has nothing to do with the task is above the base's "
                f"{found.metric.figure(found.base)} nats a token; less is better."
            )
        elif found.metric is not EXACT_MATCH:
            yield f"Loss on {NAMES.get(found.data, found.data)}: nats a token; less is better."


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
        yield f"{listed(names)}: {many} with a prompt of {length:,} tokens."
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
        batch = protocol.get("batch")
        yield f"{steps:,} steps" + (f" of {batch} examples" if batch is not None else "")
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
        if edge := _edge(contestant):
            yield (
                f"{contestant.label}: the chosen learning rate is the {edge} of its sweep, so a better one may lie "
                "beyond. A larger --sweep would tell."
            )


def _edge(contestant: Contestant) -> str | None:
    rates = sorted(point.learning_rate for point in contestant.sweep)
    if len(rates) < 3 or contestant.learning_rate not in (rates[0], rates[-1]):
        return None
    return "lowest" if contestant.learning_rate == rates[0] else "highest"


def listed(parts: Sequence[str]) -> str:
    """As in `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"

"""What a comparison says, in plain sentences: who wins, by how much, and whether that is more than noise.

The first contestant is the one that the others are compared with. Where it loses, the first sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.legend import FULL_NAMES, listed
from prefixtune_cli.compare.metrics import COSTS, FORGOTTEN, PARAMETERS, Metric
from prefixtune_cli.compare.standing import Difference, Standing, Standings, standings


@dataclass(frozen=True)
class Said:
    """A sentence, and those that bear it out."""

    lead: str
    details: Sequence[str] = ()


def verdict(comparison: Comparison) -> list[Said]:
    """The findings, the most important one first; at least one."""
    said = [_of_data(found) for found in standings(comparison)]
    if not said:
        speed = "No quality was measured: this comparison tells what the methods cost."
        said = [
            Said(speed if comparison.kind == "speed" else "No run has a result, so nobody wins.")
        ]
    return said + _of_cost(comparison) + _of_failures(comparison)


def _of_data(found: Standings) -> Said:
    known = [s for s in found.each if s.mean is not None]
    first, rivals = found.each[0], found.each[1:]
    against = [_against_first(found, first, s, s.difference) for s in rivals if s.difference]
    return Said(_opening(found, known), [*against, *_of_the_test(found)])


def _opening(found: Standings, known: Sequence[Standing]) -> str:
    """Who has the best mean, and where the first one stands."""
    where, winners = _where(found), [s for s in known if s.best]
    first = found.each[0]
    figure = f"{_mean(found.metric, winners[0])} ({_seeds(winners[0])})"
    base = ""
    if found.base is not None and found.metric is not FORGOTTEN:
        base = f"; the base alone has {_amount(found.metric, found.base)}"
    if len(known) == 1:
        return f"On {where}, {known[0].contestant} has {figure}{base}. There is nothing to compare it with."
    if len(winners) > 1:
        return f"On {where}, {listed([s.contestant for s in winners])} share the best mean: {figure}{base}."
    best = winners[0]
    said = f"On {where}, {best.contestant} has the best mean: {figure}{base}."
    if best is first:
        return f"{said} {_lead_over(found)}"
    if best.difference is None:
        return said
    return f"{said} {_behind(found, first, best.difference)}"


def _lead_over(found: Standings) -> str:
    """How sure it is that the first one, which has the best mean, is ahead."""
    rivals = [s for s in found.each[1:] if s.difference is not None]
    doubtful = [s.contestant for s in rivals if s.difference and not s.difference.larger_than_noise]
    if found.untested is not None or not rivals:
        return "Whether its lead is more than noise was not tested."
    if not doubtful:
        return "Its lead is more than noise."
    return f"Its lead over {listed(doubtful)} may be noise."


def _behind(found: Standings, first: Standing, difference: Difference) -> str:
    if difference.p_value is None:
        sure = "this was not tested"
    else:
        sure = "this is more than noise" if difference.larger_than_noise else "this may be noise"
    mean = f"{first.contestant} ({_mean(found.metric, first)})"
    if (difference.value > 0) != found.metric.up:
        return f"On the seeds that both finished, {mean} is not behind it."
    by = _gap(found.metric, difference.value)
    return f"{mean} is behind it by {by}; {sure}."


def _against_first(
    found: Standings, first: Standing, rival: Standing, difference: Difference
) -> str:
    by = _gap(found.metric, difference.value)
    better = (difference.value > 0) == found.metric.up
    if difference.is_none:
        return f"{rival.contestant} is level with {first.contestant}."
    how = f"{by} {'better' if better else 'worse'} than"
    return f"{rival.contestant} is {how} {first.contestant}{_sureness(found, difference)}."


def _sureness(found: Standings, difference: Difference) -> str:
    if difference.p_value is None or difference.low is None or difference.high is None:
        return " (not tested)"
    low, high = (_signed(found, end) for end in (difference.low, difference.high))
    p_value = (
        "adjusted p < 0.001"
        if difference.p_value < 0.001
        else f"adjusted p = {difference.p_value:.2g}"
    )
    noise = "more than noise" if difference.larger_than_noise else "not more than noise"
    return f": {noise} (95 % interval of the difference {low} to {high}, {p_value})"


def _signed(found: Standings, value: float) -> str:
    text = found.metric.figure(value, signed=True)
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def _of_the_test(found: Standings) -> list[str]:
    """What the test covers."""
    if found.untested is not None:
        return [f"Differences on {_where(found)} were not tested: {found.untested}."]
    tested = [s for s in found.each if s.difference and s.difference.p_value is not None]
    if not tested:
        return []
    if not found.seeds_tested:
        return [
            f"On {_where(found)} not every difference is tested over several seeds: with other seeds it may turn out "
            "otherwise."
        ]
    if not found.rows_tested:
        return [f"On {_where(found)} differences are tested over seeds alone, not over rows."]
    return []


def _of_cost(comparison: Comparison) -> list[Said]:
    """The cheapest of each group, beside its first; the table has the others."""
    said = []
    for group in comparison.measured_together:
        contestants = [c for c in comparison.contestants if c.label in group.contestants]
        for metric in (PARAMETERS, *COSTS):
            figures = {c.label: figure for c in contestants if (figure := metric.median(c))}
            if metric.best and len(figures) > 1:
                said.append(Said(_cheapest(metric, figures, group.contestants[0])))
    return said


def _cheapest(metric: Metric, figures: Mapping[str, float], first: str) -> str:
    best = (max if metric.up else min)(figures.values())
    who = [label for label, figure in figures.items() if round(figure) == round(best)]
    lead = f"{listed(who)} {'trains' if len(who) == 1 else 'alike train'} {metric.best}"
    beside = first in figures and first not in who
    its = f" ({first}: {metric.with_unit(figures[first])})" if beside else ""
    return f"{lead}: {metric.with_unit(best)}{its}."


def _of_failures(comparison: Comparison) -> list[Said]:
    failed = [(c.label, len(c.failures)) for c in comparison.contestants if c.failures]
    if not failed:
        return []
    cells = listed([f"{count} of {label}" for label, count in failed])
    return [
        Said(
            f"Some runs failed, and the figures are without them: {cells}. The reasons are under Runs."
        )
    ]


def _where(found: Standings) -> str:
    return FULL_NAMES.get(found.data, found.data)


def _seeds(standing: Standing) -> str:
    return f"mean of {standing.seeds} seeds" if standing.seeds > 1 else "one seed"


def _mean(metric: Metric, standing: Standing) -> str:
    if standing.mean is None:
        return "no result"
    return _amount(metric, standing.mean, standing.deviation)


def _amount(metric: Metric, value: float, deviation: float | None = None) -> str:
    return f"{metric.figure(value, deviation)} {metric.said}"


def _gap(metric: Metric, difference: float) -> str:
    return f"{metric.figure(abs(difference))} {metric.said_of_difference}"

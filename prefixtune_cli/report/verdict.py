"""The verdict of a comparison in sentences: who is best, by how much, and whether that is larger than noise.

The others are compared with the first contestant. Where it is not the best, the first sentence says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prefixtune_cli.compare import wording
from prefixtune_cli.compare.comparison import Comparison
from prefixtune_cli.compare.metrics import COSTS, PARAMETERS, Metric
from prefixtune_cli.compare.standing import (
    Difference,
    Standing,
    Standings,
    is_level,
    standings,
)


@dataclass(frozen=True)
class Said:
    """A finding in one sentence, with further sentences that give its details."""

    lead: str
    details: Sequence[str] = ()


def verdict(comparison: Comparison) -> list[Said]:
    """The findings, the most important one first; there is at least one."""
    said: list[Said] = []
    for found in standings(comparison):
        known = {detail for one in said for detail in one.details}
        of_data = _of_data(found)
        said.append(replace(of_data, details=[d for d in of_data.details if d not in known]))
    if not said:
        speed = "No quality was measured: this comparison tells what the methods cost."
        said = [
            Said(speed if comparison.kind == "speed" else "No run has a result, so nobody wins.")
        ]
    return said + _of_cost(comparison) + _of_failures(comparison)


def _of_data(found: Standings) -> Said:
    first, *rivals = found.each
    details = [_against_first(found, first, s, s.difference) for s in rivals if s.difference]
    where = wording.data_name(found.data)
    if said := wording.untested(found):
        details.append(f"Differences on {where} {said}")
    elif said := wording.limit(found):
        details.append(f"On {where} {said}")
    return Said(_opening(found), details)


def _opening(found: Standings) -> str:
    """Who has the best mean, and how far the first contestant is behind."""
    known = [s for s in found.each if s.mean is not None]
    best, *equals = [s for s in known if s.best]
    seeds = f"mean of {best.seeds} seeds" if best.seeds > 1 else "one seed"
    figure = f"{_mean(found.metric, best)} ({seeds})"
    if (base := found.base_beside) is not None:
        figure += f"; the base alone has {_amount(found.metric, base)}"
    where, first = wording.data_name(found.data), found.each[0]
    if len(known) == 1:
        return f"On {where}, {best.contestant} has {figure}. There is nothing to compare it with."
    if equals:
        names = wording.listed([s.contestant for s in (best, *equals)])
        return f"On {where}, {names} share the best mean: {figure}."
    said = f"On {where}, {best.contestant} has the best mean: {figure}."
    if best is first:
        return f"{said} {_lead_over(found)}"
    if best.difference is None:
        return said
    return f"{said} {_behind(found, first, best.difference)}"


def _lead_over(found: Standings) -> str:
    """Whether the lead of the first contestant, which has the best mean, is larger than noise."""
    rivals = [s for s in found.each[1:] if s.difference is not None]
    if found.untested is not None or not rivals:
        return f"Whether its lead is {wording.LARGER_THAN_NOISE} was not tested."
    doubtful = [s.contestant for s in rivals if s.difference and not s.difference.larger_than_noise]
    if not doubtful:
        return f"Its lead is {wording.LARGER_THAN_NOISE}."
    return f"Its lead over {wording.listed(doubtful)} may be noise."


def _behind(found: Standings, first: Standing, difference: Difference) -> str:
    mean = f"{first.contestant} ({_mean(found.metric, first)})"
    if (difference.value > 0) != found.metric.up:
        return f"On the seeds that both finished, {mean} is not behind it."
    return f"{mean} is behind it by {_gap(found.metric, difference)}; {wording.noise(difference)}."


def _against_first(
    found: Standings, first: Standing, rival: Standing, difference: Difference
) -> str:
    if is_level(difference.value, 0.0):
        return f"{rival.contestant} is level with {first.contestant}."
    better = (difference.value > 0) == found.metric.up
    how = f"{_gap(found.metric, difference)} {'better' if better else 'worse'} than"
    sure = f"{wording.noise(difference)}{wording.interval(found.metric, difference)}"
    return f"{rival.contestant} is {how} {first.contestant}; {sure}."


def _of_cost(comparison: Comparison) -> list[Said]:
    """The cheapest contestant of each group, beside the group's first; the table has the others."""
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
    lead = f"{wording.listed(who)} {'trains' if len(who) == 1 else 'alike train'} {metric.best}"
    beside = first in figures and first not in who
    its = f" ({first}: {metric.with_unit(figures[first])})" if beside else ""
    return f"{lead}: {metric.with_unit(best)}{its}."


def _of_failures(comparison: Comparison) -> list[Said]:
    failed = [(c.label, len(c.failures)) for c in comparison.contestants if c.failures]
    if not failed:
        return []
    cells = wording.listed([f"{count} of {label}" for label, count in failed])
    return [
        Said(
            f"Some runs failed, and the figures are without them: {cells}. The reasons are under Runs."
        )
    ]


def _mean(metric: Metric, standing: Standing) -> str:
    if standing.mean is None:
        return "no result"
    return _amount(metric, standing.mean, standing.deviation)


def _amount(metric: Metric, value: float, deviation: float | None = None) -> str:
    return f"{metric.figure(value, deviation)} {metric.said}"


def _gap(metric: Metric, difference: Difference) -> str:
    return f"{metric.figure(abs(difference.value))} {metric.said_of_difference}"

"""The words for what a comparison found. The legend, the verdict, the table and the pictures take them from here.

The legend stands under a table and says how the figures were made. The verdict opens a report and says who is best.
Both speak of the same facts, so one function here derives each fact and phrases it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from prefixtune_cli.compare.comparison import FORGETTING, OOD, TEST, Point
from prefixtune_cli.compare.metrics import Metric
from prefixtune_cli.compare.standing import LEVEL, Difference, Standings
from prefixtune_cli.errors import PtpError
from prefixtune_cli.recipe.schema import Kind

# The marks of the best figure, and of a difference that is larger than noise.
BEST, LARGER = "*", "†"
LARGER_THAN_NOISE = "larger than noise"
INTERVAL = f"{100 * (1 - LEVEL):.0f} % interval"
DATA_NAMES: Mapping[str, str] = {
    TEST: "the test data",
    OOD: "the out-of-distribution data",
    FORGETTING: "unrelated text",
}


# Of the training loss, by what is learned from.
UNITS_OF_LOSS: Mapping[Kind, str] = {
    "answers": "nats a token",
    "pairs": "nats a pair",
    "labelled": "KTO's, an answer",
}


def rows_of(kind: Kind) -> str:
    """What such rows are."""
    names = {"answers": "answers", "pairs": "pairs of answers", "labelled": "labelled answers"}
    return names[kind]


def data_name(data: str) -> str:
    """A data set's name in a sentence; data sets of the user keep their own names."""
    return DATA_NAMES.get(data, data)


def listed(parts: Sequence[str]) -> str:
    """As in `a, b and c`."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def reason(error: Exception) -> str:
    """Why something failed."""
    return str(error) if isinstance(error, PtpError) else f"{type(error).__name__}: {error}"


def noise(difference: Difference) -> str:
    """Whether the difference is larger than noise."""
    if difference.p_value is None:
        return "this was not tested"
    return f"this is {LARGER_THAN_NOISE}" if difference.larger_than_noise else "this may be noise"


def interval(metric: Metric, difference: Difference) -> str:
    """` (95 % interval of the difference −3.1 to 0.4, adjusted p = 0.2)`; empty without a test."""
    if difference.p_value is None or difference.low is None or difference.high is None:
        return ""
    low, high = (_signed(metric, end) for end in (difference.low, difference.high))
    tiny = difference.p_value < 0.001
    p_value = "adjusted p < 0.001" if tiny else f"adjusted p = {difference.p_value:.2g}"
    return f" ({INTERVAL} of the difference {low} to {high}, {p_value})"


def _signed(metric: Metric, value: float) -> str:
    text = metric.figure(value, signed=True)
    return "0" if float(text.replace(",", "")) == 0 else text.replace("-", "−")


def untested(found: Standings) -> str | None:
    """What follows `Differences` where none was tested."""
    return None if found.untested is None else f"are not tested: {found.untested}."


def how_tested(found: Standings) -> str:
    """What follows `Differences`: how they were tested, what the mark means, and what the tests do not cover."""
    if said := untested(found):
        return said
    if found.seeds_tested and found.rows_tested:
        pairs = "seed and row, both taken as random (crossed effects, Satterthwaite's degrees of freedom)"
    else:
        pairs = "row" if found.rows_tested else "seed"
    rule = (
        f"are paired by {pairs}, with {INTERVAL}s; {LARGER}: {LARGER_THAN_NOISE}, p < {LEVEL} by the t test after "
        "Holm's adjustment for the number of differences."
    )
    not_covered = limit(found)
    return f"{rule} {not_covered[0].upper()}{not_covered[1:]}" if not_covered else rule


def limit(found: Standings) -> str | None:
    """What the tests do not cover; None where they cover seeds and rows, or where there are none."""
    if found.rows_tested and not found.seeds_tested:
        return "not every difference is tested over several seeds: with other seeds it may turn out otherwise."
    if found.seeds_tested and not found.rows_tested:
        return "differences are tested over seeds alone, not over rows."
    return None


def edge_of_sweep(label: str, sweep: Sequence[Point], chosen: float | None) -> str | None:
    """That a better learning rate may not have been tried, as the chosen one is the lowest or the highest.

    None where fewer than three rates were tried, or where all of them failed.
    """
    rates = sorted(point.learning_rate for point in sweep)
    failed = all(point.loss is None for point in sweep)
    if len(rates) < 3 or failed or chosen not in (rates[0], rates[-1]):
        return None
    end = "lowest" if chosen == rates[0] else "highest"
    return (
        f"{label}: the chosen learning rate, {chosen:g}, is the {end} of its sweep, so a better one may lie beyond. "
        f"--sweep {len(rates) + 2} looks further."
    )

"""What is measured, and how it is shown: table, legend, pictures and report read one record for each metric.

A new cost needs a field of `Cost`, a record below, and its measurement in `speed.turn`. Nothing here needs torch.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prefixtune_cli.compare.comparison import Contestant, Result


@dataclass(frozen=True)
class Measured:
    """A figure that was measured several times."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Measured:
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True)
class Cost:
    """What a contestant costs; None where it was not measured.

    Attributes:
        training_tokens_per_second: forward, backward and optimizer step.
        decode_tokens_per_second: of all `prompts` together, which are answered at once.
        time_to_first_token_seconds: with `prompts` prompts of `prompt_tokens` each.
        peak_memory_gib: of a training step: the GPU allocator's, or the process's on a CPU.
        kv_cache_bytes: of one sequence of `prompt_tokens`.
        adapters: how many adapters of the contestant's kind are active at once.
        training_ratio, decode_ratio, first_token_ratio: the contestant's speed over the base's, round by round; above
            1 is faster. The base's training is a forward and a backward pass. None where the base was not measured
            beside the contestant.
        training_over_lora, decode_over_lora, first_token_over_lora: the same over LoRA's speed.
        interleaved: measured in turns with the others in one process; else the runs logged it, and other work on the
            machine may have disturbed it.
    """

    training_tokens_per_second: Measured | None = None
    decode_tokens_per_second: Measured | None = None
    time_to_first_token_seconds: Measured | None = None
    peak_memory_gib: float | None = None
    kv_cache_bytes: int | None = None
    prompt_tokens: int | None = None
    prompts: int = 1
    adapters: int = 1
    training_ratio: Measured | None = None
    decode_ratio: Measured | None = None
    first_token_ratio: Measured | None = None
    training_over_lora: Measured | None = None
    decode_over_lora: Measured | None = None
    first_token_over_lora: Measured | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Metric:
    """A figure of a model or of a contestant, and how it is shown.

    Attributes:
        key: the field of a `Result`, a `Contestant` or a `Cost`, and so the key in results.json.
        name, unit: the head of its column; a fraction is shown in %.
        up: whether more is better.
        size: one unit, in the unit of the field.
        digits: significant digits in a column of costs; 0 shows all.
        places: digits after the point elsewhere.
        axis: its name in a picture.
        ratio: the first part of its ratios' fields, as in `training`_ratio and `training`_over_lora; empty without any.
        answering: its name in the legend, where it is measured by answering prompts.
        best: how the verdict ends a sentence about who is best, as in `trains fastest`; empty where it has none.
        difference: the unit of a difference.
        said, said_of_difference: what follows a figure, and a difference, in a sentence.
        legend: what it is, as a sentence of the legend with `{where}` for the data set; empty where it needs none.
    """

    key: str
    name: str
    unit: str = ""
    up: bool = False
    size: float = 1.0
    digits: int = 3
    places: int = 0
    axis: str = ""
    ratio: str = ""
    answering: str = ""
    best: str = ""
    difference: str = ""
    said: str = ""
    said_of_difference: str = ""
    legend: str = ""

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit else self.name

    @property
    def over_base(self) -> str:
        """The field of `Cost` with the ratios to the base."""
        return f"{self.ratio}_ratio"

    @property
    def over_lora(self) -> str:
        """The field of `Cost` with the ratios to LoRA."""
        return f"{self.ratio}_over_lora"

    def of(self, whose: Result | Contestant | Cost | None) -> Measured | float | None:
        """Its figure; None where it was not measured."""
        holder = whose if hasattr(whose, self.key) else getattr(whose, "cost", None)
        found: Measured | float | None = getattr(holder, self.key, None)
        return found

    def median(self, whose: Result | Contestant | Cost | None) -> float | None:
        """Its figure, or the median where it was measured several times."""
        found = self.of(whose)
        return found.median if isinstance(found, Measured) else found

    def value(self, result: Result) -> float:
        """The figure of a result that has it."""
        found = self.median(result)
        assert found is not None
        return found

    def in_unit(self, value: float) -> float:
        return 100 * value if self.unit == "%" else value / self.size

    def figure(self, value: float, deviation: float | None = None, *, signed: bool = False) -> str:
        """`84.2 ± 1.3`, without the unit."""
        around = None if deviation is None else self.in_unit(deviation)
        return self.written(self.in_unit(value), around, signed=signed)

    def with_unit(self, value: float) -> str:
        return f"{self.figure(value)} {self.unit}".rstrip()

    def written(self, value: float, deviation: float | None = None, *, signed: bool = False) -> str:
        """`figure` of a value that is in the unit already."""
        sign = "+" if signed else ""
        around = "" if deviation is None else f" ± {self.written(deviation)}"
        return f"{value:{sign},.{self.places}f}{around}"

    def cell(self, whose: Contestant | Cost | None) -> str:
        """A cell of its column in the table."""
        return shown(self.of(whose), self.size, self.digits)


def shown(figure: Measured | float | None, size: float = 1.0, digits: int = 3) -> str:
    """`5,200 (4,940–5,460)`: the median with its range, or a single figure; empty without any."""
    if figure is None:
        return ""
    if not isinstance(figure, Measured):
        return _significant(figure / size, digits)
    median, low, high = (
        _significant(value / size, digits) for value in (figure.median, figure.low, figure.high)
    )
    return median if low == high else f"{median} ({low}–{high})"


def _significant(value: float, digits: int) -> str:
    """With so many significant digits, but all that are before the point: 0.0983, 49.2, 6,013."""
    if not digits:
        return f"{value:g}"
    if value == 0 or abs(value) < 1e-4:
        return f"{value:.{digits}g}"
    decimals = digits - 1 - math.floor(math.log10(abs(value)))
    return f"{value:,.{max(0, decimals)}f}"


# Of a Result.
EXACT_MATCH = Metric(
    "exact_match", "exact match", "%", up=True, places=1, axis="right answers (%)",
    difference="points", said="% right answers", said_of_difference="points",
)  # fmt: skip
LOSS = Metric(
    "loss", "loss", "nats", places=3, axis="loss (nats a token, less is better)",
    difference="nats", said="nats a token of loss", said_of_difference="nats a token",
    legend="Loss on {where}: nats a token; less is better.",
)  # fmt: skip
LOSS_ON_TEXT = replace(LOSS, name="loss on unrelated text")
FORGOTTEN = replace(LOSS, name="forgetting", said="nats a token more loss than the base")
PREFERENCE_LOSS = Metric(
    "preference_loss", "preference loss", "nats", places=3,
    axis="preference loss (less is better)",
    difference="nats", said="nats a pair of preference loss", said_of_difference="nats a pair",
    legend="Preference loss on {where}: the objective's, in nats a pair; less is better.",
)  # fmt: skip
CHOSEN_AHEAD = Metric(
    "chosen_ahead", "chosen ahead", "%", up=True, places=1, axis="chosen ahead (%)",
    difference="points", said="% of the pairs with the chosen answer ahead", said_of_difference="points",
    legend="Chosen ahead on {where}: the pairs whose chosen answer has the higher reward.",
)  # fmt: skip
LOSS_OF_CHOSEN = replace(
    LOSS,
    name="loss of chosen answers",
    axis="loss of chosen answers (nats a token)",
    said="nats a token of loss on the chosen answers",
    legend="Loss of the chosen answers on {where}: nats a token; where it rises, both answers may have become less "
    "likely.",
)
KTO_LOSS = replace(
    PREFERENCE_LOSS, name="KTO's loss", unit="", axis="KTO's loss (less is better)", difference="",
    said="of KTO's loss an answer", said_of_difference="of KTO's loss",
    legend="KTO's loss on {where}: of an answer, without a unit; less is better.",
)  # fmt: skip
DESIRABLE_AHEAD = replace(
    CHOSEN_AHEAD, name="desirable ahead", axis="desirable ahead (%)",
    said="% of the pairs of a desirable and an undesirable answer with the desirable one ahead",
    legend="Desirable ahead on {where}: the pairs of each desirable answer with each undesirable one whose desirable "
    "one has the higher reward. Its tests take the undesirable answers as given.",
)  # fmt: skip
LOSS_OF_DESIRABLE = replace(
    LOSS_OF_CHOSEN, name="loss of desirable answers",
    axis="loss of desirable answers (nats a token)",
    said="nats a token of loss on the desirable answers",
    legend="Loss of the desirable answers on {where}: nats a token; where it rises, all answers may have become less "
    "likely.",
)  # fmt: skip
OF_PAIRS = (PREFERENCE_LOSS, CHOSEN_AHEAD, LOSS_OF_CHOSEN)
OF_LABELLED = (KTO_LOSS, DESIRABLE_AHEAD, LOSS_OF_DESIRABLE)

# Of a Contestant.
PARAMETERS = Metric(
    "trainable_parameters", "trained parameters",
    axis="trainable parameters (log scale)", best="the fewest parameters",
)  # fmt: skip
ON_DISK = Metric("adapter_bytes", "adapter on disk", "MB", size=1e6)
LEARNING_RATE = Metric("learning_rate", "learning rate", digits=0)

# Of a Cost. A metric that has ratios is kept as a median with its range.
TRAINING = Metric(
    "training_tokens_per_second", "training", "tokens/s", up=True,
    axis="training speed (tokens/s)", ratio="training", best="fastest",
)  # fmt: skip
PEAK_MEMORY = Metric("peak_memory_gib", "peak memory", "GiB")
DECODE = Metric(
    "decode_tokens_per_second", "decode", "tokens/s", up=True, ratio="decode", answering="Decoding"
)
FIRST_TOKEN = Metric(
    "time_to_first_token_seconds", "first token", "ms",
    size=1e-3, ratio="first_token", answering="first token",
)  # fmt: skip
KV_CACHE = Metric(
    "kv_cache_bytes", "KV cache a sequence", "MB", size=1e6, digits=4, answering="KV cache"
)
COSTS = (TRAINING, PEAK_MEMORY, DECODE, FIRST_TOKEN, KV_CACHE)

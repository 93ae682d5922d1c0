"""The default learning rates, which depend on the method, the objective and the base's width."""

from __future__ import annotations

import math
from typing import NamedTuple

from prefixtune_cli.recipe.schema.adapters import PrefixTuningPlus
from prefixtune_cli.recipe.schema.section import Section
from prefixtune_cli.recipe.schema.sections import Objective


class Rate(NamedTuple):
    """A default learning rate: at·(2,000 / hidden size)^power, but at most `most`.

    The power is from the tinker cookbook's fit over models of many widths (0.781 for Llama). The fit is too high for
    small bases, hence `most`. A power of 0 means one rate for all bases.
    """

    at: float
    power: float
    why: str
    most: float = math.inf

    def of(self, width: int) -> float:
        """The rate for a base of this hidden size, to two digits."""
        return float(f"{min(self.most, self.at * (2000 / width) ** self.power):.1e}")

    def times(self, factor: float, why: str) -> Rate:
        """The rate with all its numbers multiplied, for a reason."""
        return Rate(self.at * factor, self.power, why, self.most * factor)


# Chosen by sweeps, on the built-in base (hidden size 192) and on SmolLM2-135M (576): see the README.
IN_THE_BASIS = Rate(0.03, 0, "a step changes the output that M adds to by about 3 %")
WITHOUT_A_BASIS = Rate(1e-3, 0, "without a basis, one rate for outputs of any size")
RATES: dict[str, Rate] = {
    "lora": Rate(1.1e-3, 0.781, "it falls with the base's hidden size", most=3e-3),
    "prefix-tuning": Rate(3e-2, 0, "one rate for all bases"),
    "full": Rate(5e-5, 0.781, "it falls with the base's hidden size"),
    # Not swept. These methods train few small vectors, or many weights.
    "vera": Rate(1e-2, 0, "ten times LoRA's"),  # Kopiczko et al. 2024
    "prompt-tuning": Rate(3e-2, 0, "the rate of peft's example"),
    "osf": Rate(5e-5, 0.781, "the rate of full, as it trains nearly every weight"),
}
# The part of SFT's rate for preferences: of Prefix-Tuning+ and of other methods, for which LoRA was swept on
# SmolLM2-135M. For LoRA a third was the best by DPO, and the whole by ORPO and KTO; by SimPO the whole was a little
# better, and less sure.
A_TENTH, A_THIRD, THE_WHOLE = (0.1, "a tenth"), (1 / 3, "a third"), (1.0, "the whole")
OF_SFT = {
    "dpo": (A_THIRD, A_THIRD),
    "simpo": (A_TENTH, A_THIRD),
    "orpo": (A_THIRD, THE_WHOLE),
    "kto": (A_THIRD, THE_WHOLE),
}


def default_rate(adapter: Section, objective: Objective = "sft") -> Rate:
    """The learning rate of an adapter if the recipe has none; LoRA's for a method that is not in `RATES`."""
    if isinstance(adapter, PrefixTuningPlus):
        rate = IN_THE_BASIS if adapter.basis else WITHOUT_A_BASIS
    else:
        rate = RATES.get(str(getattr(adapter, "method", "")), RATES["lora"])
    if objective == "sft":
        return rate
    of_plus, of_others = OF_SFT[objective]
    part, in_words = of_plus if isinstance(adapter, PrefixTuningPlus) else of_others
    return rate.times(part, f"{in_words} of sft's for {objective}")

"""The recipe's schema: the only home of defaults, choices and descriptions.

recipe    `Recipe`, and what does not go together in it
adapters  the `adapter` section of each method
sections  the other sections: model, data, train, evaluate
rates     the learning rates
section   what all sections have in common

Help shows the first clause of a setting's description, up to a semicolon (see `settings`).

A recipe is frozen once validated, and unknown keys are forbidden. `adapter` is a union, and `adapter.method` chooses
its member. `METHOD_DEFAULTS` and `OBJECTIVE_DEFAULTS` have the training defaults that depend on the method and on the
objective; `RATES` has the learning rates, which also depend on the base's width. Four methods have their own section.
Any other name is a method of peft's. This layer does not import peft, so `peft_methods` checks the name and its
settings.
"""

from prefixtune_cli.recipe.schema.adapters import (
    IN_FRONT,
    IN_THE_CACHE,
    AdapterSection,
    Full,
    Lora,
    Method,
    Peft,
    PrefixTuning,
    PrefixTuningPlus,
    WithConfig,
    canonical,
)
from prefixtune_cli.recipe.schema.rates import default_rate
from prefixtune_cli.recipe.schema.recipe import (
    NOT_SPREAD,
    OWN_SETTINGS,
    WITH_REFERENCE,
    Recipe,
    kind_of,
    method_defaults,
)
from prefixtune_cli.recipe.schema.sections import (
    HELD_OUT_SHARE,
    DataFormat,
    DataSection,
    EvaluateSection,
    Kind,
    ModelSection,
    TrainSection,
)

__all__ = [
    "HELD_OUT_SHARE",
    "IN_FRONT",
    "IN_THE_CACHE",
    "NOT_SPREAD",
    "OWN_SETTINGS",
    "WITH_REFERENCE",
    "AdapterSection",
    "DataFormat",
    "DataSection",
    "EvaluateSection",
    "Full",
    "Kind",
    "Lora",
    "Method",
    "ModelSection",
    "Peft",
    "PrefixTuning",
    "PrefixTuningPlus",
    "Recipe",
    "TrainSection",
    "WithConfig",
    "canonical",
    "default_rate",
    "kind_of",
    "method_defaults",
]

"""Registers the method with PEFT. Only this file reaches into PEFT's internals.

PEFT keeps the names of its methods in a closed enum, `PeftType`, and `register_peft_method` refuses a name that
is not in it. Python has no public way to add a member to an enum, so this file does what the enum's own
metaclass does. `tests/adapter/test_register.py` fails when PEFT or Python no longer work this way.
"""

from __future__ import annotations

from typing import Any

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType, register_peft_method

PEFT_TYPE = "PREFIX_TUNING_PLUS"
PREFIX = "prefix_tuning_plus_"


def register(config_class: type[Any], model_class: type[Any]) -> None:
    """Make `PREFIX_TUNING_PLUS` a method of PEFT. A second call changes nothing.

    Raises:
        RuntimeError: PEFT already has another method of this name.
    """
    if PEFT_TYPE in PeftType.__members__:
        if PEFT_TYPE_TO_CONFIG_MAPPING.get(PeftType[PEFT_TYPE]) is config_class:
            return
        raise RuntimeError(
            f"peft already has a method {PEFT_TYPE} of its own; use that one, or an older peft."
        )
    _add_member(PeftType, PEFT_TYPE)
    register_peft_method(
        name=PEFT_TYPE.lower(), config_cls=config_class, model_cls=model_class, prefix=PREFIX
    )


def _add_member(enum: Any, name: str) -> None:
    member = str.__new__(enum, name)
    member._name_ = name
    member._value_ = name
    member._sort_order_ = len(enum)
    member.__objclass__ = enum
    setattr(enum, name, member)
    enum._member_names_.append(name)
    enum._member_map_[name] = member
    enum._value2member_map_[name] = member

"""The one place that knows how PEFT's registries work.

PEFT accepts only names in its `PeftType` enum, so the member has to be added first. If PEFT itself has a method of this
name, that one is used, with a warning.
"""

from typing import Any

from .._warning import warn

NAME = "dual_lora"


def register() -> None:
    """Register DUAL_LORA with PEFT. Calling it twice does no harm."""
    from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
    from peft.utils import PeftType, register_peft_method

    member = NAME.upper()
    if member in PeftType.__members__:
        tuner = PEFT_TYPE_TO_TUNER_MAPPING.get(PeftType[member])
        if tuner is not None:
            if not tuner.__module__.startswith("dual_lora."):
                warn(
                    f"PEFT has its own method {member} ({tuner.__module__}): that one is used, and this package's "
                    "is not registered.",
                    stacklevel=2,
                )
            return
    else:
        add_peft_type(member)

    from . import card, hotswap
    from .config import DualLoraConfig
    from .model import DualLoraModel

    register_peft_method(name=NAME, config_cls=DualLoraConfig, model_cls=DualLoraModel)
    hotswap.install()
    card.install()


def add_peft_type(name: str) -> None:
    """Add a name to PEFT's enum of methods, which `register_peft_method` asks for. Works on Python 3.11 to 3.14."""
    from peft.utils import PeftType

    enum: Any = PeftType
    value: Any = str.__new__(enum, name)
    value._name_, value._value_ = name, name
    value.__objclass__ = enum
    value._sort_order_ = len(enum.__members__)
    enum._member_names_.append(name)
    enum._member_map_[name] = value
    enum._value2member_map_[name] = value
    type.__setattr__(enum, name, value)

"""What the layers of one model share: the warnings that were given, and what decoding needs to know."""

from __future__ import annotations

from dataclasses import dataclass, field

from .._warning import warn


@dataclass(eq=False)
class Shared:
    """State of a model that all its layers read and write. A copy of the model begins with a new one."""

    warnings: set[str] = field(default_factory=set)  # that were given, so that each comes once
    last_load: object = None  # the load that was warned of last
    decoding: bool = False  # whether its last sequences were of few tokens; layers without sequences go by it
    several: bool = False  # whether they were of more than one
    longer: int = 0  # how many sequences of more tokens came; a weight that is kept is of a time without any

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()

    def warn_once(self, message: str) -> None:
        """Warn, unless this message was given before."""
        if message not in self.warnings:
            self.warnings.add(message)
            warn(message, stacklevel=3)

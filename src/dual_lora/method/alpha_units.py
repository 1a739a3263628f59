"""The units of α: `alpha`, LoRA's `lora_alpha`, and `alpha_pattern`, whose numbers go with one or the other.

α is twice LoRA's `lora_alpha`. A pattern next to `alpha` has α's numbers, a pattern without it LoRA's. One with α's
numbers knows that it has them (`Alphas`), so it means the same in whatever configuration it is put.
"""

import copy
import sys
from collections.abc import Iterator
from typing import Any

from .._warning import warn

LORA_ALPHA = 2.0
"""α for each unit of LoRA's `lora_alpha`, at equal strength."""

_COPIERS = ("dataclasses", "json", "pprint", __name__.partition(".")[0])  # they read all, and take nothing for LoRA's


class Alphas(dict[str, float]):
    """An `alpha_pattern` in α's unit, made by `alphas`. Warns once when one of its numbers is read.

    LoRA's scripts compute a layer's strength from such a number, or write it into a LoraConfig.
    """

    told = False

    def __new__(cls, entries: Any = ()) -> Any:
        """Return a plain dictionary: `dataclasses.asdict` copies so, and files and checkpoints take no other."""
        return dict(entries)

    def __reduce__(self) -> Any:
        return alphas, (dict(self),)

    def _tell(self) -> None:
        reader = sys._getframe(2).f_globals.get("__name__", "")
        if self.told or not self or reader.partition(".")[0] in _COPIERS:
            return
        self.told = True
        warn(
            f"alpha_pattern={self!r} of a DualLoraConfig is read: its numbers count as `alpha`, {LORA_ALPHA:g} times "
            f"LoRA's. Divide them by {LORA_ALPHA:g} where `lora_alpha` is meant, or take a layer's strength from "
            "`layer.scaling[adapter]`. Another DualLoraConfig takes the pattern as it is.",
            stacklevel=3,
        )

    def __getitem__(self, key: str) -> float:
        if key in self:
            self._tell()
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        """As of a dictionary."""
        if key in self:
            self._tell()
        return super().get(key, default)

    def items(self) -> Any:
        """As of a dictionary."""
        self._tell()
        return super().items()

    def values(self) -> Any:
        """As of a dictionary."""
        self._tell()
        return super().values()

    def copy(self) -> Any:
        """Return a plain dictionary."""
        self._tell()
        return super().copy()

    def __iter__(self) -> Iterator[str]:  # with it `dict(pattern)` and `{**pattern}` read by `__getitem__`
        return super().__iter__()


def alphas(pattern: dict[str, float]) -> Alphas:
    """Return the pattern as one of α's numbers."""
    made: Alphas = dict.__new__(Alphas)
    made.update(pattern)
    return made


def ordered(pattern: dict[str, Any]) -> dict[str, Any]:
    """Return a copy in the order of a file, in which the first that fits a layer counts."""
    made = dict(sorted(pattern.items()))
    return alphas(made) if isinstance(pattern, Alphas) else made


def scaled(numbers: Any, unit: float) -> Any:
    """Multiply a number, or each number of a pattern, by `unit`. Other values stay as they are, to be checked later."""
    if isinstance(numbers, dict):
        return {name: scaled(number, unit) for name, number in numbers.items()}
    return unit * numbers if type(numbers) in (int, float) else numbers


def beside(alpha: float | None, pattern: dict[str, float]) -> dict[str, float]:
    """Return the pattern as it is read next to this `alpha`. One that knows of no unit has the right one."""
    if isinstance(pattern, Alphas):
        return pattern if alpha is not None else scaled(pattern, 1 / LORA_ALPHA)  # type: ignore[no-any-return]
    return pattern if alpha is None else alphas(pattern)


def keep_units(config: Any, name: str, value: Any) -> Any:
    """Return the value to set for a field. Before `alpha` is set, convert the pattern to the unit in which it will be
    read; warn of a pattern without a unit that is set next to `alpha`."""
    if name == "alpha" and (value is None) != (config.alpha is None):
        pattern = config.alpha_pattern if value is None else alphas(scaled(config.alpha_pattern, LORA_ALPHA))
        vars(config)["alpha_pattern"] = beside(value, pattern)
        note_alphas(config)
    elif name == "alpha_pattern" and isinstance(value, dict):
        if not isinstance(value, Alphas):
            warn_of_alphas(config, value, config.alpha_pattern)
        value = beside(config.alpha, value)
        note_alphas(config, value)
    return value


def note_alphas(config: Any, pattern: Any = None) -> None:
    """Note the pattern whose unit is known, so that a number that is entered into it later shows."""
    vars(config)["_noted_alphas"] = copy.copy(config.alpha_pattern if pattern is None else pattern)


def warn_of_alphas(config: Any, pattern: Any, known: Any) -> None:
    """Warn of a pattern that was written after the configuration was made, next to `alpha`."""
    if config.alpha is not None and pattern != known:
        warn(
            f"alpha_pattern={pattern!r} is written next to alpha={config.alpha:g} (lora_alpha="
            f"{config.alpha / LORA_ALPHA:g}): its numbers count as `alpha`, {LORA_ALPHA:g} times LoRA's. Given "
            "together with `lora_alpha`, in one call, they count as LoRA's.",
            stacklevel=4,
        )


def warn_of_entered(config: Any) -> None:
    """Warn of numbers that were entered in place, as `config.alpha_pattern["q_proj"] = 16`, when layers are made."""
    warn_of_alphas(config, config.alpha_pattern, vars(config).get("_noted_alphas", config.alpha_pattern))
    note_alphas(config)


def lora_alpha(config: Any) -> float:
    """Return LoRA's `lora_alpha` at equal strength. Warn once where it is no layer's that `rank_pattern` names.

    Scripts make another configuration of `lora_alpha` and `rank_pattern`, or compute a layer's strength from them. Here
    each layer has a default of its own rank.
    """
    alpha = config.default_alpha(config.r1, config.r2) if config.alpha is None else config.alpha
    number = alpha / LORA_ALPHA
    if config.alpha is None and config.rank_pattern and not vars(config).get("_read_alpha_told"):
        vars(config)["_read_alpha_told"] = True
        warn(
            f"lora_alpha={number:g} is read from a DualLoraConfig that was made without it: it is for r={config.r} "
            "alone, and layers that `rank_pattern` names have a default of their own rank. They would get another "
            "strength from both together. For another configuration copy all of this one (copy.deepcopy, "
            "dataclasses.replace), or leave `lora_alpha` out there; a layer's strength is `layer.scaling[adapter]`.",
            stacklevel=3,
        )
    return float(number)

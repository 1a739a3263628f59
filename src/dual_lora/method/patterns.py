"""A layer's options by its name: `rank_pattern`, `alpha_pattern`, `sampling_pattern`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.utils.other import get_pattern_key
from torch import nn
from transformers.pytorch_utils import Conv1D

from .._warning import warn
from ..core.tokens import AUTO, EXACT
from .config import DualLoraConfig
from .lora_fields import LORA_ALPHA
from .ranks import ranks_of

MOST_NAMES = 12  # of modules, in a message
# PEFT's words; it says the second where a module was left out besides, such as a new head.
NOTHING_TARGETED = "not found in the base model", "No modules were targeted"
HAS = " Its linear layers are called"


@contextmanager
def explained_targets(config: Any, model: nn.Module) -> Iterator[None]:
    """Add to PEFT's error for target modules that the model does not have which linear layers it has, of any method."""
    try:
        yield
    except ValueError as error:
        if not any(part in str(error) for part in NOTHING_TARGETED) or HAS in str(error):
            raise
        kinds = (nn.Linear, Conv1D)
        names = dict.fromkeys(n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, kinds))
        has = f"{HAS} {', '.join([*names][:MOST_NAMES])}{', …' * (len(names) > MOST_NAMES)}."
        pattern = " A text is a regular expression for the whole name: give several names as a list."
        text = isinstance(getattr(config, "target_modules", None), str)
        raise type(error)(f"{error}{has if names else ''}{pattern if text else ''}") from None


def layer_options(config: DualLoraConfig, key: str) -> tuple[int, int, float]:
    """Return (r1, r2, α) of the layer named `key`, with patterns applied."""
    rank = _matching_value("rank_pattern", config.rank_pattern, key)
    r1, r2 = ranks_of([config.r1, config.r2] if rank is None else rank, one_group=config.one_group)  # type: ignore[list-item]
    alpha = _matching_value("alpha_pattern", config.alpha_pattern, key)
    if config.alpha is None:  # then the pattern has LoRA's numbers
        return r1, r2, config.default_alpha(r1, r2) if alpha is None else LORA_ALPHA * alpha
    return r1, r2, config.alpha if alpha is None else alpha


def token_share(config: DualLoraConfig, key: str) -> float:
    """Return the share of the tokens for the layer named `key`, as the operator takes it."""
    share = _matching_value("sampling_pattern", config.sampling_pattern, key, config.token_sampling)
    return EXACT if share is None else AUTO if share == "auto" else float(share)


def _matching_value(name: str, patterns: dict[str, Any], key: str, otherwise: Any = None) -> Any:
    """Return the value of the first pattern that matches `key`, else `otherwise`. Warns if several values match."""
    found = [pattern for pattern in sorted(patterns) if get_pattern_key([pattern], key) == pattern]
    if len({str(patterns[pattern]) for pattern in found}) > 1:
        warn(
            f"{name} has several values for one layer: {', '.join(map(repr, found))}. The first in alphabetical order "
            "counts, as a saved configuration is sorted so: write patterns of which one fits each layer.",
            stacklevel=2,
        )
    return patterns[found[0]] if found else otherwise

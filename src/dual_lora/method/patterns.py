"""What a configuration says of a layer by its name: `rank_pattern`, `alpha_pattern`, `sampling_pattern`."""

from typing import Any

from peft.utils.other import get_pattern_key

from .._warning import warn
from ..core.tokens import AUTO, EXACT
from .config import DualLoraConfig
from .lora_fields import LORA_ALPHA
from .ranks import ranks_of


def layer_options(config: DualLoraConfig, key: str) -> tuple[int, int, float]:
    """(r1, r2, α) of the layer named `key`, patterns applied."""
    rank = _fitting("rank_pattern", config.rank_pattern, key)
    r1, r2 = ranks_of([config.r1, config.r2] if rank is None else rank, one_group=config.one_group)  # type: ignore[list-item]
    alpha = _fitting("alpha_pattern", config.alpha_pattern, key)
    if config.alpha is None:  # then the pattern has LoRA's numbers
        return r1, r2, config.default_alpha(r1, r2) if alpha is None else LORA_ALPHA * alpha
    return r1, r2, config.alpha if alpha is None else alpha


def sampling_of(config: DualLoraConfig, key: str) -> float:
    """The share of the tokens that the layer named `key` estimates its gradients from, as the operator takes it."""
    said = _fitting("sampling_pattern", config.sampling_pattern, key, config.token_sampling)
    return EXACT if said is None else AUTO if said == "auto" else float(said)


def _fitting(name: str, patterns: dict[str, Any], key: str, otherwise: Any = None) -> Any:
    """What a pattern says of the layer named `key`, `otherwise` if none does. Of several the first counts."""
    found = [pattern for pattern in sorted(patterns) if get_pattern_key([pattern], key) == pattern]
    if len({str(patterns[pattern]) for pattern in found}) > 1:
        warn(
            f"{name} has several values for one layer: {', '.join(map(repr, found))}. The first in alphabetical order "
            "counts, as a saved configuration is sorted so: write patterns of which one fits each layer.",
            stacklevel=2,
        )
    return patterns[found[0]] if found else otherwise

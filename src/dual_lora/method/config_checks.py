"""Checks of DualLoraConfig that are too long for the file of its fields."""

import re
from typing import Any

from .lora_fields import LORA_ALPHA, is_positive, scaled

PAPER_WARMUP = 50


def check_frozen(config: Any, directions: tuple[str, ...]) -> None:
    """Raise ValueError for an unknown direction, or an impossible seed or plain rank."""
    if config.direction_activation not in directions:
        known = ", ".join(map(repr, directions))
        raise ValueError(f"Unknown direction {config.direction_activation!r}: choose one of {known}.")
    for name in ("direction_seed", "plain_rank"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{name} must be a whole number, got {value!r}.")
        if value and not config.one_group:
            raise ValueError(
                f"{name}={value} belongs to frozen signs: write direction_activation='frozen', or leave it out."
            )
    if not 0 <= config.plain_rank < config.r1:
        raise ValueError(
            f"plain_rank is a part of the rank {config.r1}, 0 or more and below it; got {config.plain_rank}."
        )


def check_names(config: Any) -> None:
    """Raise TypeError for a name in place of a list, of which PEFT takes each letter; ValueError for 'all_linear'."""
    for name in ("target_parameters", "modules_to_save"):
        if isinstance(value := getattr(config, name), str):
            raise TypeError(f"`{name}` must be a list of strings or None. Got {value!r}: write [{value!r}].")
    targets = config.target_modules
    (only,) = targets if isinstance(targets, list | set | tuple) and len(targets) == 1 else [targets]
    if isinstance(only, str) and re.sub("[-_ ]", "", only.lower()) == "alllinear" and targets != "all-linear":
        raise ValueError(f"target_modules is {targets!r}: all linear layers are target_modules='all-linear'.")


def check_share(name: str, share: Any) -> None:
    """Raise ValueError for a value that is no share of the tokens."""
    if share not in (None, "auto") and not (is_positive(share) and float(share) <= 1):
        raise ValueError(f"{name} must be a share above 0 and at most 1, 'auto' or None, got {share!r}.")


def check_start(config: Any) -> None:
    """Set the default warm-up of the paper's start. Raises ValueError for what no start has, or another start."""
    for name in ("init_std", "init_gain"):
        if (value := getattr(config, name)) is not None and not is_positive(value):
            raise ValueError(f"{name} must be a positive number or None (the default), got {value!r}.")
    if config.init_gain is not None and not config.starts_like_lora:
        raise ValueError(
            f"init_gain={config.init_gain!r} works only where A is drawn like LoRA's: with init_weights True or "
            f"'aligned', not {config.init_weights!r}. There `init_std` sets how wide A is drawn."
        )
    if not isinstance(config.init_weights, bool) and config.init_weights not in ("aligned", "paper", "zero"):
        raise ValueError(
            f"Unknown init_weights {config.init_weights!r}: choose True (B = 0), 'aligned' (with signs of rank one), "
            "'paper' (Gaussian factors under the warm-up), 'zero' (an earlier default) or False (random, for "
            "tests)."
        )
    steps = config.warmup_steps
    if config.init_weights != "paper":
        if steps:
            raise ValueError(
                f"warmup_steps={steps!r} works only with the paper's start. This adapter has another start: its update "
                f"is zero at first and needs no warm-up. Leave it out, or write "
                f"DualLoraConfig.paper(warmup_steps={steps!r}, …)."
            )
        config.warmup_steps = None
        return
    if steps is None:
        config.warmup_steps = PAPER_WARMUP
    elif isinstance(steps, bool) or not (
        0 < steps < 1 if isinstance(steps, float) else isinstance(steps, int) and steps >= 0
    ):
        raise ValueError(
            f"warmup_steps must be a whole number of optimizer steps, 0 or more (0: no warm-up), or a share of the "
            f"run above 0 and below 1, got {steps!r}."
        )


def upgrade_format_1(saved: dict[str, Any]) -> dict[str, Any]:
    """Convert a configuration that an earlier version saved (format 1) to the present format."""
    if saved.get("alpha") is None:  # format 1 had α, not `lora_alpha`, in its pattern even then
        saved = saved | {"alpha_pattern": scaled(saved.get("alpha_pattern"), 1 / LORA_ALPHA) or {}}
    if saved.get("init_weights", True) is True:
        return saved | {"init_weights": "paper"}
    if saved["init_weights"] is False:  # it had the paper's strength and gradients, without the warm-up
        return saved | {"init_weights": "paper", "warmup_steps": 0}
    return saved | {"warmup_steps": None}  # it had no effect

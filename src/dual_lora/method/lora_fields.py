"""LoRA's fields, as `DualLoraConfig` takes them.

Values that mean plain LoRA are accepted, so that a call of `LoraConfig(…)` works with the class's name changed. A value
that means another method raises ValueError: ignoring it would train something else than the user asked for.
"""

import copy
from dataclasses import MISSING, fields
from difflib import get_close_matches
from typing import Any

from peft import LoraConfig

from .._warning import warn

LORA_ALPHA = 2.0
"""α for each unit of LoRA's `lora_alpha`, at equal strength."""

_DEFAULTS = {f.name: f.default_factory() if f.default_factory is not MISSING else f.default for f in fields(LoraConfig)}
PLAIN_STARTS = (True, "gaussian")  # B = 0, A at random: as this method begins

# The method or option that a field's other values ask for.
MEANINGS = {
    "use_dora": "DoRA",
    "use_rslora": "rsLoRA's scale, lora_alpha/√r (set `lora_alpha` to r times the scale that you want)",
    "lora_bias": "a bias in LoRA's B",
    "loftq_config": "LoftQ's start",
    "eva_config": "EVA's start",
    "corda_config": "CorDA's start",
    "lora_ga_config": "LoRA-GA's start",
    "use_qalora": "QALoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow's routing",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
    "megatron_config": "Megatron's parallel layers",
    "runtime_config": "an option of DoRA's and PiSSA's starts",
}


# What other trainers call a field.
OTHER_NAMES = {"rank": "r", "lora_r": "r", "lora_rank": "r", "lora_target": "target_modules", "warmup": "warmup_steps"}


def names() -> set[str]:
    """The names of all fields of `LoraConfig`."""
    return set(_DEFAULTS)


def is_positive(value: Any) -> bool:
    """Whether a value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def scaled(alphas: Any, unit: float) -> Any:
    """Multiply a number, or each number of a pattern, by `unit`. Other values stay as they are, to be checked later."""
    if isinstance(alphas, dict):
        return {name: scaled(alpha, unit) for name, alpha in alphas.items()}
    return unit * alphas if type(alphas) in (int, float) else alphas


def keep_units(config: Any, name: str, value: Any) -> None:
    """Before `alpha` is set, convert the pattern to the unit in which it will be read; for `alpha_pattern`, warn."""
    if name == "alpha" and (value is None) != (config.alpha is None):
        unit = 1 / LORA_ALPHA if value is None else LORA_ALPHA
        vars(config)["alpha_pattern"] = scaled(config.alpha_pattern, unit)
        note_alphas(config)
    elif name == "alpha_pattern":
        warn_of_alphas(config, value, config.alpha_pattern)
        note_alphas(config, value)


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
    """Return LoRA's `lora_alpha` at equal strength. Warn once where that number does not go with the patterns.

    Scripts make another configuration of `lora_alpha`, `alpha_pattern` and `rank_pattern`, or compute a layer's
    strength from them. Here these have another unit, or each layer has a default of its own rank.
    """
    alpha = config.default_alpha(config.r1, config.r2) if config.alpha is None else config.alpha
    number = alpha / LORA_ALPHA
    if config.alpha is not None and config.alpha_pattern:
        why = (
            f"alpha_pattern={dict(config.alpha_pattern)!r} next to alpha={alpha:g} counts as `alpha`, "
            f"{LORA_ALPHA:g} times LoRA's numbers"
        )
        instead = f"take alpha={alpha:g} with it"
    elif config.alpha is None and config.rank_pattern:
        why = f"it was not given, so {number:g} is for r={config.r} alone, and other ranks have their own default"
        instead = "leave `lora_alpha` out there"
    else:
        return number
    if not vars(config).get("_read_alpha_told"):
        vars(config)["_read_alpha_told"] = True
        warn(
            f"lora_alpha={number:g} is read from a DualLoraConfig, and its patterns do not go with that number: {why}. "
            "Layers that the patterns name would get another strength from both together. For another configuration "
            f"copy all of this one (copy.deepcopy, dataclasses.replace), or {instead}; a layer's strength is "
            "`layer.scaling[adapter]`.",
            stacklevel=3,
        )
    return number


def refuse_unknown(options: dict[str, Any], own: set[str]) -> None:
    """Raise TypeError, as Python does, for a name that neither configuration has, with the name that may be meant."""
    for name in options:
        if name in own or name in _DEFAULTS:
            continue
        like = [OTHER_NAMES[name]] if name in OTHER_NAMES else get_close_matches(name, own | _DEFAULTS.keys(), 1)
        meant = f" Did you mean {like[0]!r}?" if like else " docs/reference/config.md lists all fields."
        raise TypeError(f"DualLoraConfig.__init__() got an unexpected keyword argument {name!r}.{meant}")


def translate(options: dict[str, Any], own: set[str]) -> dict[str, Any]:
    """Translate options that may be LoraConfig's to those of `DualLoraConfig`.

    own: the fields of `DualLoraConfig`. Its `alpha_pattern` without `alpha` has LoRA's numbers already.
    Raises ValueError for a value that means another method, and for two names of one option with different values.
    """
    result = {name: value for name, value in options.items() if name in own or name not in _DEFAULTS}
    if (lora_alpha := options.get("lora_alpha")) is not None:
        if not is_positive(lora_alpha):
            raise ValueError(f"lora_alpha must be a positive number, got {lora_alpha!r}.")
        _set(result, "alpha", scaled(lora_alpha, LORA_ALPHA), "lora_alpha", lora_alpha)
        if "alpha_pattern" in options and options.get("alpha") is None:
            result["alpha_pattern"] = scaled(options["alpha_pattern"], LORA_ALPHA)
    if options.get("lora_dropout") is not None:
        _set(result, "dropout", options["lora_dropout"], "lora_dropout", options["lora_dropout"])
    if (start := options.get("init_lora_weights")) is not None:
        if not isinstance(start, bool) and start not in PLAIN_STARTS:
            raise ValueError(
                _other_method_message("init_lora_weights", start, f"the start or variant {start!r} of LoRA")
            )
        _set(result, "init_weights", bool(start), "init_lora_weights", start)
    if result.get("bias") == "lora_only":
        result["bias"] = "dual_lora_only"
    for name in set(options) & set(_DEFAULTS) - own - {"lora_alpha", "lora_dropout", "init_lora_weights"}:
        value, usual = options[name], _DEFAULTS[name]
        if isinstance(value, dict) and not any(value.values()):  # as a saved file has an object of switches
            continue
        if value != usual and (value or usual) and name not in ("qalora_group_size", "megatron_core"):
            raise ValueError(_other_method_message(name, value, MEANINGS.get(name, "another method")))
    return result


def written(name: str, value: Any, own: set[str]) -> tuple[str, Any]:
    """Translate one field that is written later: return its own name and value."""
    return next(iter(translate({name: value}, own).items()), (name, value))


def keeps_base(config: Any) -> bool:
    """Whether a LoRA leaves its base unchanged; PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA and KaSA change it."""
    start = getattr(config, "init_lora_weights", True)
    beside = isinstance(start, bool) or str(start).lower() in ("gaussian", "eva", "orthogonal", "mica")
    return beside and getattr(config, "kasa_config", None) is None


def _set(result: dict[str, Any], ours: str, value: Any, theirs: str, given: Any) -> None:
    if result.get(ours) not in (None, value) and not (ours == "dropout" and result[ours] == 0):
        raise ValueError(
            f"Got both {ours}={result[ours]} and {theirs}={given}, which is {ours}={value}: keep `{ours}`, which is "
            "this method's name."
        )
    result[ours] = value


def _other_method_message(name: str, value: Any, meaning: str) -> str:
    return (
        f"{name}={value!r} asks for {meaning}. That belongs to LoRA, and Dual LoRA does not have it: leave it out, or "
        "keep LoraConfig."
    )

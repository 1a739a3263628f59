"""Fine-tuning methods by name: any that the installed PEFT knows, "full", and "module:name" for one of your own."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch
from peft import get_peft_model

from dual_lora._warning import warn
from dual_lora.lab.errors import UserError, described, memory_full, suggest
from dual_lora.lab.model.bounds import check_config
from dual_lora.lab.model.names import ALIASES, FUSED, OURS
from dual_lora.lab.permission import import_allowed
from dual_lora.lab.recipe.schema import normalised_name
from dual_lora.method import lora_fields
from dual_lora.method.patterns import explained_targets

if TYPE_CHECKING:
    from peft import PeftConfig

    from dual_lora.lab.model.load import Loaded
    from dual_lora.lab.recipe.schema import ModelSection

RAMP_SHARE = 0.1  # of the optimizer steps, for a method with warm-up whose recipe leaves it out
# Fields that PEFT leaves None, with an example.
NEEDED = {"num_virtual_tokens": 20, "adapter_len": 10, "adapter_layers": 2}


def method_names() -> list[str]:
    """Every name that ``method.name`` may have."""
    return sorted([kind.lower() for kind in _config_classes()] + list(ALIASES) + ["full"])


def method_fields(name: str) -> list[str]:
    """The fields that a recipe may set for a method."""
    kind, _ = _resolve(name)
    if kind == "full":
        return []
    own = [f.name for f in dataclasses.fields(_config_classes()[kind]) if f.init and f.name not in OURS]
    taken = sorted(lora_fields.names() - {*own} - OURS) if kind == "DUAL_LORA" else []
    return own + taken + ["fused"] * (kind.lower() in FUSED)


def method_config(method: dict[str, Any], head: str, steps: int, fresh: list[str]) -> PeftConfig | None:
    """The PEFT configuration that a recipe's ``method`` part describes; None for full fine-tuning.

    head: "causal", "classification" or "regression". steps: optimizer steps of the run (for ramps). fresh: modules with
    new weights, which are trained and saved whole. Raises UserError for unknown methods and fields (nearest name
    suggested).
    """
    kind, preset = _resolve(str(method["name"]))
    settings = {**preset, **{key: value for key, value in method.items() if key != "name"}}
    if kind == "full":
        if settings:
            raise UserError(f"method full takes no settings, got {', '.join(settings)}.")
        return None
    factory = _config_classes()[kind]
    known = method_fields(str(method["name"]))
    for key in map(str, settings):
        if key not in known:
            raise UserError(f"method {method['name']} has no field {key!r}.{suggest(key, [*known, 'name'])}")
    fused = settings.pop("fused", False)
    if not isinstance(fused, bool):
        raise UserError(f"method {method['name']}: fused is true or false, got {fused!r}.")
    if "target_modules" in known:
        settings.setdefault("target_modules", "all-linear")
    if kind == "DUAL_LORA" and settings.get("init_weights") == "paper" and settings.get("warmup_steps") is None:
        settings["warmup_steps"] = max(1, round(RAMP_SHARE * steps))
    if kind == "ADALORA":
        settings.setdefault("total_step", steps)
        if "init_r" in settings:  # PEFT's own ratio of 12 to 8; with its 8 a smaller init_r fails in training
            settings.setdefault("target_r", max(1, settings["init_r"] * 2 // 3))
    if settings.get("init_lora_weights") == "eva":
        raise UserError(
            f"method {method['name']}: EVA's start needs a pass over the data before training (PEFT's "
            "initialize_lora_eva_weights). This command makes none, so it would train plain LoRA. Leave "
            "init_lora_weights out, or train it with transformers' Trainer."
        )
    if settings.get("init_lora_weights") == "lora_ga":
        from peft.tuners.lora.config import LoraGAConfig

        try:
            settings["lora_ga_config"] = LoraGAConfig(**(settings.get("lora_ga_config") or {}))
        except (TypeError, ValueError) as error:
            raise UserError(f"method {method['name']}: lora_ga_config: {error}") from error
    if fresh and "modules_to_save" in known:
        # A part of a head is not kept next to the whole of it: PEFT adds classifier and score, and could load neither.
        whole = {*fresh, "classifier", "score"}
        outer = {name for name in fresh if not any(name.startswith(f"{other}.") for other in whole)}
        settings["modules_to_save"] = sorted({*(settings.get("modules_to_save") or []), *outer}) or None
    try:
        config = factory(task_type="CAUSAL_LM" if head == "causal" else "SEQ_CLS", **settings)
    except Exception as error:  # PEFT checks little, and what is of another kind fails anywhere
        raise UserError(f"method {method['name']}: {described(error, ValueError, TypeError)}") from error
    _check_needed(str(method["name"]), config)
    config._fused = fused  # type: ignore[attr-defined]
    return config


def _check_needed(name: str, config: PeftConfig) -> None:
    """Raises UserError where the method has no size of its own: PEFT leaves it None, and fails in its arithmetic."""
    if missing := [field for field in NEEDED if getattr(config, field, 0) is None]:
        raise UserError(
            f"method {name} needs {' and '.join(missing)}, to which PEFT gives no value: set it in the recipe's "
            f"method, or by {' '.join(f'--method.{field} {NEEDED[field]}' for field in missing)}."
        )


def fuse_if_requested(model: Any, config: PeftConfig) -> Any:
    """The model; PEFT's layers by this package's product (`dual_lora.fuse`) where the recipe says `fused: true`."""
    if getattr(config, "_fused", False):
        from dual_lora import fuse

        fuse(model)
    return model


def apply_method(loaded: Loaded, config: PeftConfig | None, base: ModelSection, seed: int) -> Any:
    """The model with trainable weights of the method; ``base`` is what the adapter remembers as its base.

    Raises UserError when nothing would be trained or the method does not fit the model.
    """
    if config is None:
        for parameter in loaded.model.parameters():
            parameter.requires_grad_(True)
        return loaded.model
    check_config(config, loaded.model, "method")
    _warn_of_missing(loaded.model, getattr(config, "target_modules", None))
    torch.manual_seed(seed)
    if getattr(config, "one_group", False) and not config.direction_seed:  # type: ignore[attr-defined]
        config.direction_seed = seed  # type: ignore[attr-defined]
    try:
        with explained_targets(config, loaded.model):
            model = get_peft_model(loaded.model, config, revision=base.revision)
        model = fuse_if_requested(model, config)
    except Exception as error:
        if memory_full(error):
            raise
        reason = described(error, ValueError, NotImplementedError)
        raise UserError(f"The method does not fit the model: {reason}") from error
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("The method left no trainable parameters: check method.target_modules.")
    model.peft_config["default"].base_model_name_or_path = base.path
    return model


def missing_targets(asked: Any, names: list[str]) -> list[str]:
    """Return the target modules, of a list of names or of their ends, that no module of these names is."""
    wanted = asked if isinstance(asked, list) else sorted(asked) if isinstance(asked, set) else []
    return [target for target in wanted if not any(f".{name}".endswith(f".{target}") for name in names)]


def _warn_of_missing(model: Any, asked: Any) -> None:
    """Say which of the target modules the model has not: PEFT leaves them out without a warning if another is there."""
    here = [name for name, _ in model.named_modules()]
    if missing := missing_targets(asked, here):
        near = suggest(missing[0], sorted({h.rsplit(".", 1)[-1] for h in here if h}))
        warn(f"method.target_modules names {', '.join(missing)}, which no module is.{near}", stacklevel=3)


def is_kind(config: PeftConfig | None, kind: str) -> bool:
    """Whether a configuration is that of the PEFT type ``kind``."""
    return config is not None and getattr(config.peft_type, "value", config.peft_type) == kind


def plain_config(config: Any) -> dict[str, Any]:
    """The method's configuration, every default included, in plain values."""
    if config is None:
        return {"name": "full"}
    plain = json.dumps(config.to_dict(), default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    return dict(json.loads(plain))


def plain_name(name: str) -> str:
    """A method's name as PEFT writes it. Of `module:name` the module is imported, if allowed: that registers it."""
    module, colon, plain = name.rpartition(":")
    if colon:
        import_allowed(module, f"method {name!r}")
    return normalised_name(plain)


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """PEFT's name of a method and the settings that its alias stands for."""
    plain = plain_name(name)
    preset = dict(ALIASES.get(plain, {}))
    kind = preset.pop("name", plain)
    if kind == "full":
        return kind, preset
    if kind.upper() not in _config_classes():
        raise UserError(f"There is no method {name!r}.{suggest(plain, method_names())}")
    return kind.upper(), preset


def _config_classes() -> dict[str, type[PeftConfig]]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    import dual_lora  # noqa: F401  (registers its method with PEFT)

    return {str(kind.value): factory for kind, factory in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

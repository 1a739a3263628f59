"""Does a recipe fit its real model? Built on the meta device from the published configuration: nothing is fetched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study.budget import adapted_model, empty_model


@dataclass(frozen=True)
class Fit:
    """Adapted layers by the last part of their name, and numbers of parameters (a fresh head is trained too)."""

    layers: dict[str, int]
    trainable: int
    all_parameters: int


def fit(recipe: Recipe, classes: int = 2) -> Fit:
    """Put the recipe's method on its empty model. classes: of a classification head, which the data would tell.

    Raises UserError for a model whose configuration is not known here, for a method that does not fit, and for a name
    among the target modules that no layer has.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from dual_lora.lab.model.methods import method_config

    base = empty_model(recipe.model, {"classification": classes, "regression": 1}.get(recipe.model.head))
    config = method_config(recipe.method, recipe.model.head, recipe.train.steps or 1000, [])
    size = sum(p.numel() for p in base.parameters())
    if config is None:
        return Fit({}, size, size)
    model = adapted_model(recipe, base, config)
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    targets = recipe.method.get("target_modules")
    if isinstance(targets, list):
        idle = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in names)]
        if idle:
            raise UserError(f"{recipe.model.path} has no layer {', '.join(idle)} (method.target_modules).")
    return Fit(
        dict(Counter(name.rpartition(".")[2] for name in names)),
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        sum(p.numel() for p in model.parameters()),
    )

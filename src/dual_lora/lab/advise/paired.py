"""The study behind an advice: LoRA, Dual LoRA and Dual LoRA without Sign on one recipe, of equal size.

What the recipe's own `method` says about LoRA or Dual LoRA holds for that one; its rank, alpha, dropout, modules and
biases hold for all three, also where they are a layer's own.
"""

from pathlib import Path
from typing import Any, NamedTuple

from dual_lora.lab.cost.options import SHARED
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.methods import method_config
from dual_lora.lab.recipe.read import read_recipe
from dual_lora.lab.recipe.schema import Recipe, normalised_name
from dual_lora.lab.study import metrics
from dual_lora.lab.study.budget import planned_steps
from dual_lora.lab.study.cell import rank_field
from dual_lora.lab.study.read import build_study
from dual_lora.lab.study.study import Study
from dual_lora.method.config import ALPHA
from dual_lora.method.lora_fields import LORA_ALPHA, scaled
from dual_lora.method.ranks import ranks_of

LORA, DUAL, NO_SIGN = "LoRA", "Dual LoRA", "Dual LoRA without Sign"
SPREAD = 3.0  # between two of the three learning rates that are tried; the recipe's own is in the middle
TUNING_SEEDS = 2  # of each rate that is tried; the worse of them decides
EXTEND = 1  # more rates, where the best is the first or the last
RANK = 16  # where the recipe's method has none
HELD_OUT = (16, 400)  # validation records, least and most, where the recipe has none: a tenth of its training records
# The difference that is too small to matter. Shipped studies have smaller ones (`margins.yaml`), which take more seeds
# than a short advice has. An mse has a unit of its own.
MARGINS = {
    "accuracy": 0.01, "f1": 0.01, "matthews": 0.03, "exact_match": 0.01, "choice": 0.01, "loss": 0.02, "bleu": 1.0,
    "pearson": 0.01,
}  # fmt: skip


class Length(NamedTuple):
    """The size of a study: how many final seeds each method gets, and how many optimizer steps each of its runs."""

    seeds: int
    steps: int


def recipe_of(source: str | Path) -> tuple[str, Recipe]:
    """The recipe, and a name for it that holds in any working folder."""
    path = Path(source)
    path = path / "recipe.yaml" if path.is_dir() else path
    return (str(path.resolve()) if path.is_file() else str(source)), read_recipe(source)


def paired_study(
    source: str | Path, metric: str | None = None, margin: float | None = None, level: float = 0.05
) -> Study:
    """The study, with the recipe's own number of steps and five seeds: see `with_length`.

    Raises UserError for a recipe without test records, or whose metric needs a margin from the user.
    """
    name, recipe = recipe_of(source)
    there = {"train": recipe.data.train, "test": recipe.data.test or recipe.data.tests}
    if missing := [name for name, records in there.items() if not records]:
        options = " and ".join({"train": "--data FILE", "test": "--test FILE"}[name] for name in missing)
        raise UserError(
            f"{source}: advise needs training records, and test records that no run trains on. The recipe names no "
            f"data.{' and no data.'.join(missing)}: add it, or give {options}. If all records are in one file, split "
            "it first."
        )
    metric = metric or metrics.default_metric(recipe.evaluate.tasks, recipe.model.head)
    metrics.evaluation(metric, recipe.model.head)
    margin = MARGINS.get(metric) if margin is None else margin
    if margin is None:
        raise UserError(
            f"{metric} is in the unit of your data: give --margin, the difference that is too small to matter."
        )
    rate = recipe.train.learning_rate
    over: dict[str, Any] = {"train": {"steps": planned_steps(recipe, fetch=True)}}
    if recipe.train.validate_every:
        over["train"]["validate_every"] = None  # nobody reads it here, and it takes time
        if recipe.train.patience or recipe.train.keep_best:  # which go by it
            over["train"] |= {"patience": None, "keep_best": False}
        if recipe.train.arguments.get("eval_on_start"):
            over["train"]["arguments"] = {"eval_on_start": False}
    if recipe.evaluate.forgetting is not None:
        over["evaluate"] = {"forgetting": None}  # one question
    by = "mse" if recipe.model.head == "regression" else "loss"
    values = {
        "name": f"advise-{recipe.name.lstrip('.')}",
        "question": f"Is Dual LoRA worth it on {recipe.name}?",
        "tasks": {recipe.name: {"recipe": name, "metric": metric}},
        "overrides": over,
        "methods": methods_of(recipe),
        "reference": LORA,
        "budget": {"match": "parameters", "like": LORA},
        "search": {
            "space": {"learning_rate": [float(f"{rate / SPREAD:.2g}"), rate, float(f"{rate * SPREAD:.2g}")]},
            "extend": EXTEND,
            "metric": by,
            "why": "" if by == metric else "A loss tells rates apart by fewer records than the metric does.",
            "seeds": TUNING_SEEDS,
            "decide": "worst",
            "holdout": _held_out(recipe),
        },
        "seeds": 5,
        "level": level,
        "margin": {metric: margin},
        "cost": False,
    }
    return build_study(values, f"the advice on {source}")


def with_length(study: Study, length: Length) -> Study:
    """The study with so many seeds and steps. A ramp that a method writes down is cut with the steps."""
    values = study.model_dump(mode="json")
    share = length.steps / values["overrides"]["train"]["steps"]
    values["overrides"]["train"]["steps"] = length.steps
    values["seeds"] = list(range(1, length.seeds + 1))
    for method in values["methods"].values():
        if method.get("warmup_steps"):
            method["warmup_steps"] = max(1, round(method["warmup_steps"] * share))
    return build_study(values)


def length_of(study: Study) -> Length:
    """Return the seeds and steps of such a study."""
    return Length(len(study.seeds), study.overrides["train"]["steps"])


def methods_of(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The three methods, as a study writes them; LoRA has the rank, the others' are solved for.

    Raises UserError for fields that the recipe's method does not have, and for ranks that Dual LoRA cannot have.
    """
    method_config(recipe.method, recipe.model.head, steps=10**6, fresh=[])  # raises for a wrong field
    own = {key: value for key, value in recipe.method.items() if value is not None}
    kind = normalised_name(own.pop("name"))
    shared = {key: own[key] for key in SHARED if key in own}
    alpha, dropout = own.get("lora_alpha"), own.get("lora_dropout", own.get("dropout"))
    if kind == "lora":
        from peft import LoraConfig

        alpha = alpha or LoraConfig().lora_alpha
    elif alpha is None and own.get("alpha"):
        alpha = own["alpha"] / (LORA_ALPHA if kind == "dual_lora" else 1)  # LoRA's, at equal strength
    field = rank_field(str(recipe.method["name"]))
    field = field if field in ("r", "init_r") else "r"  # others are no ranks
    r, r1, r2 = (own.pop(key, None) for key in (field, "r1", "r2"))
    r1, r2 = (r - r2 if r and r2 and r1 is None else r1), (r - r1 if r and r1 and r2 is None else r2)
    whole = r1 + r2 if isinstance(r1, int) and isinstance(r2, int) else None
    rank = r if r is not None else whole or (8 if kind in ("lora", "dual_lora") else RANK)  # PEFT's default
    if type(rank) is not int or rank < 2:
        raise UserError(
            f"method.{field}: {kind} has rank {rank!r}. Give a whole number of 2 or more: Dual LoRA has a rank for the "
            "magnitude and one for the direction, and is compared with as many parameters."
        )
    if kind != "dual_lora" and rank % 2:  # as many parameters, of unequal parts
        r1, r2, whole = rank - rank // 2, rank // 2, rank
    lora: dict[str, Any] = {"lora_alpha": alpha or "2r", **({"lora_dropout": dropout} if dropout else {})}
    dual: dict[str, Any] = {"alpha": LORA_ALPHA * alpha if alpha else "4r", **({"dropout": dropout} if dropout else {})}
    for_lora, for_dual = _layer_options(kind, own)
    lora, dual = lora | for_lora, dual | for_dual
    if kind == "lora":
        lora = own
    elif kind == "dual_lora":
        dual = own
        dual.pop("direction_activation", None)
    if whole:
        dual |= {"r1": f"{r1}r/{whole}", "r2": f"{r2}r/{whole}"}
    return {
        LORA: {"name": "lora", "r": rank, **shared, **lora},
        DUAL: {"name": "dual_lora", **shared, **dual},
        NO_SIGN: {"name": "dual_lora", **shared, **dual, "direction_activation": "identity"},
    }


def _layer_options(kind: str, own: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a method's options for single layers and biases, for LoRA and for Dual LoRA at equal ranks and
    strengths."""
    alphas, ranks, bias = (own.get(key) or {} for key in ("alpha_pattern", "rank_pattern", "bias"))
    ranks = {name: sum(ranks_of(rank)) if isinstance(rank, list) else rank for name, rank in ranks.items()}
    has_alpha = any(own.get(key) for key in ("alpha", "lora_alpha"))
    if kind == "dual_lora":
        alphas = scaled(alphas, 1 / LORA_ALPHA) if own.get("alpha") else alphas
        if not has_alpha:  # each layer's default goes by its own rank
            alphas = {name: ALPHA / LORA_ALPHA * rank for name, rank in ranks.items()} | alphas
    both = {"rank_pattern": ranks, "bias": bias if bias in ("none", "all") else bias and "lora_only"}
    return tuple(  # type: ignore[return-value]
        {key: value for key, value in {**both, "alpha_pattern": pattern}.items() if value}
        for pattern in (alphas, scaled(alphas, LORA_ALPHA))
    )


def _held_out(recipe: Recipe) -> int | None:
    if recipe.data.validation or recipe.data.holdout:
        return None
    least, most = HELD_OUT
    return min(most, max(least, len(load_split(recipe.data, "train")) // 10))

"""A study, written down: which methods are compared on what, at which budget, with how much search and how many seeds.

    name: activations
    question: Do ReLU and Sign each earn their place?
    tasks: [boolq-smollm2]                  # recipes: shipped names or files
    methods:
      lora: {r: 16, lora_alpha: 32}
      dual_lora: {}
      no ReLU: {name: dual_lora, magnitude_activation: identity}
    reference: dual_lora
    budget: {match: parameters, like: lora} # ranks of all others are solved for
    search: {trials: 3, space: {learning_rate: [3.0e-4, 1.0e-3, 3.0e-3]}}
    seeds: 5

A method is any that the installed PEFT offers, "full", or a preset below; every key that is not one of `MethodEntry`'s
own is a field of the method's PEFT configuration. This file holds the typed fields and what can be checked without
a model; `plan` turns a study into runs.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from dual_lora.lab.errors import suggest
from dual_lora.lab.patterns import compiled
from dual_lora.lab.read import parse_yaml, repeated
from dual_lora.lab.recipe.schema import NAME, Recipe, Section
from dual_lora.lab.study.metrics import METRICS
from dual_lora.lab.study.search import MOST_AXES, MOST_RUNS, MetricName, Search, dotted

# Methods that need more than a PEFT configuration, besides those that `methods.ALIASES` knows.
PRESETS: dict[str, dict[str, Any]] = {
    "loraplus": {"name": "lora", "train": {"optimizer": "loraplus"}},
    "galore": {
        "name": "full",
        "unmatched": True,
        "train": {"optimizer": "galore_adamw", "arguments": {"optim_target_modules": "all-linear"}},
    },
    "apollo": {
        "name": "full",
        "unmatched": True,
        "train": {"optimizer": "apollo_adamw", "arguments": {"optim_target_modules": "all-linear"}},
    },
    "full": {"name": "full", "unmatched": True},
}


# `search: thorough`, as arXiv 2602.04998 asks for: four rates a decade over 2.5 decades and further where the best lies
# at an end, three seeds each, the worst of which decides. Each rank of a sweep is a method, and so has its own search.
THOROUGH: dict[str, Any] = {
    "space": {"learning_rate": [float(f"{10 ** (k / 4 - 4.5):.2g}") for k in range(11)]},
    "extend": 4,
    "seeds": 3,
    "decide": "worst",
}


def usual_margins() -> dict[str, Any]:
    """Return the content of margins.yaml: one margin a metric with its reason, and which studies had another before."""
    file = Path(__file__).with_name("margins.yaml")
    return dict(parse_yaml(file.read_text(encoding="utf-8"), file.name))


class MethodEntry(BaseModel):
    """One method of a study. Keys beyond these are fields of the method's PEFT configuration (`fields`)."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    name: str = Field("", description="Method or preset; left out: the entry's own key.")
    about: str = Field("", description="One sentence for tables and reports.")
    train: dict[str, Any] = Field(default_factory=dict, description="Fields of the recipe's train part.")
    search: dict[str, Any] = Field(
        default_factory=dict, description="The method's own search space, with the same number of trials."
    )
    unmatched: bool = Field(
        False, description="Run outside the budget, and marked so in the results, e.g. full fine-tuning."
    )
    freeze: dict[str, float] = Field(
        default_factory=dict,
        description="Regular expression of parameter names: share of the steps after which they are frozen.",
    )
    round: dict[str, Literal["bfloat16", "float16", "int8"]] = Field(
        default_factory=dict,
        description="Regular expression of parameter names: precision that they are rounded to after every step.",
    )

    @field_validator("freeze", "round")
    @classmethod
    def _patterns(cls, value: dict[str, Any]) -> dict[str, Any]:
        for pattern, what in value.items():
            compiled(pattern)
            if isinstance(what, float) and not 0 <= what <= 1:
                raise ValueError(f"{pattern!r}: {what:g} is no share of the steps, expected 0 to 1")
        return value

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of the PEFT configuration."""
        return dict(self.model_extra or {})


class TaskEntry(Section):
    """One task: a recipe and fields that override it."""

    recipe: str = Field(description="Shipped recipe or recipe file.")
    metric: MetricName | None = Field(
        None, description=f"One of {', '.join(METRICS)}; left out: the recipe's first evaluation."
    )
    model: dict[str, Any] = Field(default_factory=dict, description="Fields that override the recipe's model part.")
    data: dict[str, Any] = Field(default_factory=dict, description="Fields that override the recipe's data part.")
    train: dict[str, Any] = Field(default_factory=dict, description="Fields that override the recipe's train part.")
    evaluate: dict[str, Any] = Field(
        default_factory=dict, description="Fields that override the recipe's evaluate part."
    )


class Budget(Section):
    """The budget that the study makes equal for all methods."""

    match: Literal["parameters", "time", "memory", "none"] = Field(
        "none",
        description="parameters, memory: the study computes each rank; time: it computes the number of steps; none: as "
        "written.",
    )
    like: str | None = Field(None, description="The method that sets the budget; it keeps its rank and steps.")
    value: float | None = Field(
        None, gt=0, description="Instead of `like`: trainable parameters, seconds of training, or bytes of peak memory."
    )
    tolerance: float = Field(0.05, gt=0, lt=1, description="Largest relative mismatch that still counts as matched.")
    max_rank: int = Field(2048, ge=2, description="Ranks above this are not tried.")

    @model_validator(mode="after")
    def _has_a_measure(self) -> Budget:
        if self.match != "none" and (self.like is None) == (self.value is None):
            raise ValueError(f"match: {self.match} needs either like: METHOD or value: NUMBER, and not both")
        return self


class Study(Section):
    """A complete comparison."""

    name: str = Field(pattern=NAME, description="Name of the study and of its default output folder.")
    question: str = Field("", description="The question that the study asks, in one sentence.")
    tasks: dict[str, TaskEntry] = Field(description="Recipes: a list of names, or name: {recipe: , metric: , ...}.")
    models: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Name: fields that override the recipe's ({model: {path: ...}}); empty: the recipe's model.",
    )
    overrides: dict[str, Any] = Field(default_factory=dict, description="Fields that override every recipe's.")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto",
        description="The precision that `auto` means in the recipes. auto: the faster one on the device that begins "
        "the study.",
    )
    methods: dict[str, MethodEntry] = Field(description="Name: the method and its fields.")
    sweep: dict[str, list[Any]] = Field(
        default_factory=dict, description="train.X or method.X: values; the study runs every method with each of them."
    )
    reference: str = Field("", description="The method that all others are compared with; left out: the first.")
    pairs: Literal["reference", "all"] = Field(
        "reference", description="Which comparisons are made and corrected for: with the reference, or of all pairs."
    )
    budget: Budget = Field(
        default_factory=lambda: Budget.model_validate({}),
        description="The budget that the study makes equal for all methods.",
    )
    seeds: list[int] = Field(default=[1, 2, 3, 4, 5], description="Seeds of the final runs: a list, or how many.")
    subsets: Literal["one", "own"] = Field(
        "one",
        description="one: all final runs train on the same data.train_limit records. own: each seed draws its own "
        "(data.seed is the seed), so that the intervals hold for other training sets too.",
    )
    search: Search | None = Field(None, description="Tuning before the final runs, or `thorough`; left out: none.")
    margin: dict[str, float] = Field(
        default_factory=dict,
        description="Metric: the difference that is too small to matter; one number for all metrics but forgetting; or "
        "`usual`.",
    )
    level: float = Field(0.05, gt=0, lt=0.5, description="Probability of any false alarm in the whole study.")
    power: float = Field(0.8, gt=0.5, lt=1, description="Power at which the minimum detectable effect is computed.")
    cost: bool = Field(True, description="Measure merge time and inference slow-down on each method's first seed.")

    @field_validator("tasks", mode="before", json_schema_input_type=str | list[str] | dict[str, str | TaskEntry])
    @classmethod
    def _names_are_tasks(cls, value: Any) -> Any:
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list):
            names = [Path(str(name)).stem for name in value]
            if (twice := repeated(names)) is not None:
                raise ValueError(f"two tasks are called {twice!r}: write them as NAME: RECIPE, each with its own name")
            return {name: {"recipe": str(recipe)} for name, recipe in zip(names, value, strict=True)}
        return (
            {k: {"recipe": v} if isinstance(v, str) else v for k, v in value.items()}
            if isinstance(value, dict)
            else value
        )

    @field_validator("overrides")
    @classmethod
    def _parts_of_a_recipe(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            part, _, field = name.partition(".")
            if field and part in Recipe.model_fields:
                raise ValueError(f"{name!r} is written {part}: {{{field}: …}} here")
            if name not in Recipe.model_fields:
                raise ValueError(f"{name!r} is no part of a recipe.{suggest(name, Recipe.model_fields)}")
        return value

    @field_validator("methods", mode="before", json_schema_input_type=list[str] | dict[str, MethodEntry | None])
    @classmethod
    def _names_are_methods(cls, value: Any) -> Any:
        if isinstance(value, list):
            value = {str(name): {} for name in value}
        return {k: v or {} for k, v in value.items()} if isinstance(value, dict) else value

    @field_validator("seeds", mode="before", json_schema_input_type=int | list[int])
    @classmethod
    def _count_is_seeds(cls, value: Any) -> Any:
        if not isinstance(value, int) or isinstance(value, bool):
            return value
        if value > MOST_RUNS:
            raise ValueError(f"{value:,} seeds, expected at most {MOST_RUNS:,}")
        return list(range(1, value + 1))

    @field_validator("search", mode="before", json_schema_input_type=Literal["thorough"] | Search | None)
    @classmethod
    def _preset(cls, value: Any) -> Any:
        return THOROUGH if value == "thorough" else value

    @field_validator("margin", mode="before", json_schema_input_type=float | Literal["usual"] | dict[str, float])
    @classmethod
    def _one_margin(cls, value: Any) -> Any:
        if value == "usual":
            return {metric: entry["margin"] for metric, entry in usual_margins()["margins"].items()}
        return (
            dict.fromkeys((m for m in METRICS if m != "forgetting"), value) if isinstance(value, int | float) else value
        )

    @model_validator(mode="after")
    def _is_consistent(self) -> Study:
        if not self.tasks or not self.methods:
            raise ValueError("a study needs at least one task and one method")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds {self.seeds}: expected at least one, all different, none negative")
        tuned_with = range(self.search.seed, self.search.seed + self.search.seeds) if self.search else ()
        if known := sorted(set(tuned_with) & set(self.seeds)):
            raise ValueError(f"search.seed {known[0]} is one of the final seeds, and those must be new to the tuning")
        for metric, margin in self.margin.items():
            if metric not in METRICS:
                raise ValueError(f"margin for the unknown metric {metric!r}.{suggest(metric, METRICS)}")
            if margin <= 0:
                raise ValueError(f"margin {margin} for {metric}: expected a positive number, in the metric's unit")
        if self.budget.like is not None and self.budget.like not in self.methods:
            raise ValueError(f"budget.like is {self.budget.like!r}.{suggest(self.budget.like, self.methods)}")
        self._check_size()
        variants = self.variants()
        if self.reference and self.reference not in variants:
            raise ValueError(
                f"reference {self.reference!r} is no method of the study.{suggest(self.reference, variants)}"
            )
        if self.search:
            for name, entry in self.methods.items():
                try:
                    self.search.points(entry.search or None)
                except ValueError as error:
                    raise ValueError(f"methods.{name}.search: {error}; every method gets the same number") from None
        return self

    def _check_size(self) -> None:
        """Raise ValueError where few lines ask for more than can be written down; `plan` has bounds of what is run."""
        if len(self.sweep) > MOST_AXES:
            raise ValueError(f"the sweep varies {len(self.sweep):,} settings, expected at most {MOST_AXES}")
        methods = len(self.methods) * math.prod(map(len, self.sweep.values()))
        if (cells := methods * self.scenarios) > MOST_RUNS:
            of = f"methods times tasks times models are {cells:,}"
            raise ValueError(f"{of}, expected at most {MOST_RUNS:,}: make several studies of it")

    @property
    def recipes(self) -> set[str]:
        """The recipes of the tasks."""
        return {task.recipe for task in self.tasks.values()}

    @property
    def scenarios(self) -> int:
        """Return how many tasks there are, each with each model."""
        return len(self.tasks) * max(1, len(self.models))

    @property
    def baseline(self) -> str:
        """The method that the others are compared with."""
        return self.reference or next(iter(self.variants()))

    def variants(self) -> dict[str, MethodEntry]:
        """The methods, each once for every point of the sweep."""
        return {
            variant: with_settings(self.methods[name], settings, name)
            for variant, (name, settings) in self._expanded().items()
        }

    def origin(self, variant: str) -> str:
        """The method that a variant comes from."""
        return self._expanded()[variant][0]

    def _expanded(self) -> dict[str, tuple[str, dict[str, Any]]]:
        """Variant -> the method that it comes from, and the settings of the sweep that it has."""
        short = {key: {"learning_rate": "lr"}.get(last := key.rpartition(".")[2], last) for key in self.sweep}
        expanded = {}
        for name, *point in itertools.product(self.methods, *self.sweep.values()):
            settings = dict(zip(self.sweep, point, strict=True))
            expanded[" ".join([name, *(f"{short[key]}={value}" for key, value in settings.items())])] = name, settings
        return expanded


def with_settings(entry: MethodEntry, settings: dict[str, Any], key: str) -> MethodEntry:
    """The method with settings {train.X or method.X: value} laid over it (learning_rate is train.learning_rate)."""
    values = entry.model_dump() | {"name": entry.name or key}
    for name, value in settings.items():
        part, _, field = dotted(name).partition(".")
        if part == "train":
            values["train"] = {**values["train"], field: value}
        else:
            values[field] = value
    return MethodEntry.model_validate(values)

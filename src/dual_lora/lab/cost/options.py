"""The subject of an estimate: a model, a method and the shape of a training step."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.model import precision
from dual_lora.lab.model.empty import load_config
from dual_lora.lab.recipe.schema import Precision, Quantize

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from dual_lora.lab.recipe.schema import Recipe

Quantisation = Quantize
Device = Literal["cpu", "gpu"]
Head = Literal["causal", "classification"]
# What a method says of a model's layers, which another method in its place says too.
SHARED = (
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save",
    "target_parameters", "trainable_token_indices", "fan_in_fan_out", "layer_replication", "ensure_weight_tying",
)  # fmt: skip
# Bytes of optimizer state: times the bytes of the trained parameters, and more for each of them. 8-bit states have a
# 4-byte scale for every 256 values, twice. Adafactor keeps a row and a column of each matrix, next to nothing.
STATES = {
    "adamw": (2.0, 0.0),
    "adamw_8bit": (0.0, 2.0 + 2 * 4 / 256),
    "lion": (1.0, 0.0),
    "sgd": (0.0, 0.0),
    "momentum": (1.0, 0.0),
    "adafactor": (0.0, 0.0),
}


@dataclass(frozen=True)
class StepOptions:
    """One training step. length: tokens of a row; logits: positions whose logits are computed (None: all).

    method: as a recipe holds it, {"name": "dual_lora", "r": 16, ...}. on: the kind of device that the step runs on.
    """

    name: str
    config: PreTrainedConfig = field(repr=False, compare=False)
    head: Head = "causal"
    classes: int = 2
    method: dict[str, Any] = field(default_factory=lambda: {"name": "dual_lora", "r": 16})
    dtype: str = "bfloat16"
    batch: int = 8
    length: int = 512
    logits: int | None = None
    accumulate: int = 1
    checkpointing: bool = False
    optimizer: str = "adamw"
    quantisation: Quantisation = "none"
    autocast: str = "none"
    attention: str | None = None
    on: Device = "cpu"

    def __post_init__(self) -> None:
        for name in ("batch", "length", "accumulate", "classes", "logits"):
            if (number := getattr(self, name)) is not None and number < 1:
                raise UserError(f"{name} is {number}, expected at least 1.")
        longest = getattr(self.config, "max_position_embeddings", None)
        if longest and self.length > longest:
            raise UserError(f"length is {self.length}, but {self.name} takes at most {longest} tokens.")
        known = {"dtype": get_args(Precision), "optimizer": tuple(STATES), "quantisation": get_args(Quantisation)}
        for name, values in known.items():
            if (value := getattr(self, name)) not in values:
                raise UserError(f"{name} is {value!r}.{suggest(str(value), values)}")

    @property
    def layers(self) -> int:
        """Number of the model's blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def rank(self) -> int:
        """The method's total rank, 0 for full fine-tuning."""
        if (name := self.method["name"]) == "full":
            return 0
        both = self.method.get("r1", 0) + self.method.get("r2", 0)
        return int(self.method.get(_rank_field(name)) or both or (12 if name == "adalora" else 8))

    def with_rank(self, rank: int) -> StepOptions:
        """The same step at another total rank."""
        kept = {k: v for k, v in self.method.items() if k not in ("r1", "r2")}
        return replace(self, method=kept | {_rank_field(self.method["name"]): rank})

    def with_method(self, name: str) -> StepOptions:
        """The same step with another method of the same rank on the same modules."""
        if name == self.method["name"]:
            return self
        if name == "full":
            return replace(self, method={"name": "full"})
        from dual_lora.lab.model.methods import method_fields

        known = method_fields(name)
        shared: dict[str, Any] = {k: self.method[k] for k in SHARED if k in self.method and k in known}
        return replace(self, method={"name": name, _rank_field(name): self.rank or 16, **shared})


def _rank_field(name: str) -> str:
    """Return the field of a method's rank. AdaLoRA begins with init_r, of which it keeps a part; its r is not read."""
    return "init_r" if name == "adalora" else "r"


def from_recipe(recipe: Recipe, **changes: Any) -> StepOptions:
    """The training step of a recipe, with every row as long as data.max_length. changes: fields of StepOptions."""
    if precision.is_auto(recipe):
        recipe = precision.with_trained_in_full(recipe)
        gpu = changes.get("on") == "gpu"
        recipe = precision.with_precision(recipe, "bf16" if gpu else precision.fast_precision("cpu").precision)
    part = recipe.train
    known = {
        "head": "causal" if recipe.model.head == "causal" else "classification",
        "method": dict(recipe.method),
        "dtype": recipe.model.dtype,
        "attention": recipe.model.attention,
        "quantisation": recipe.model.quantize,
        "batch": part.batch_size,
        "length": recipe.data.max_length,
        "accumulate": part.accumulate,
        "checkpointing": part.gradient_checkpointing,
        "optimizer": _optimizer(part.optimizer),
        "autocast": part.autocast,
    }
    if recipe.model.head == "regression":
        changes["classes"] = 1
    config, _ = model_config(recipe.model.path)
    return StepOptions(recipe.model.path, config, **{**known, **changes})


def from_model(path: str, **changes: Any) -> StepOptions:
    """A step of the model at `path` (folder, package:NAME, GGUF file, or a published name such as llama-3-8b)."""
    config, head = model_config(path)
    values: dict[str, Any] = {"head": head, **changes}
    longest = getattr(config, "max_position_embeddings", None)
    if "length" not in changes and longest:
        values["length"] = min(512, longest)
    return StepOptions(path, config, **values)


def model_config(path: str) -> tuple[PreTrainedConfig, Head]:
    """The configuration of a model and the head that it is usually trained with; nothing is downloaded.

    Raises UserError for what is neither a folder, nor a package's model, nor a published name.
    """
    from dual_lora.lab.model.location import is_here
    from dual_lora.lab.recipe.published import known_name, published_family, published_names
    from dual_lora.lab.recipe.read import shipped_recipes

    if not is_here(path):
        if known_name(path) is None:
            known = [*published_names(), *shipped_recipes()]
            lists = "`dual-lora estimate --models` and `dual-lora recipes` list names."
            near = suggest(path.rsplit("/", 1)[-1].lower(), known, lists)
            raise UserError(f"{path!r} is neither a recipe, a model folder nor a built-in model.{near}")
        return load_config(path), published_family(path).head
    config = load_config(path)
    if not hasattr(config, "num_hidden_layers"):
        raise UserError(
            f"{path} is a model of several parts ({config.model_type}), and an estimate knows one stack of blocks: "
            "give a folder with the configuration of its text model alone, or a name from --models."
        )
    names = " ".join(getattr(config, "architectures", None) or [])
    causal = "CausalLM" in names or "LMHead" in names or not names
    return config, "causal" if causal else "classification"


def _optimizer(name: str) -> str:
    """The optimizer of an estimate that takes as much memory as that of a recipe."""
    if name.startswith(("adamw_8bit", "adamw_bnb", "paged_adamw_8bit")):
        return "adamw_8bit"
    return next((known for known in ("adafactor", "sgd", "lion") if name.startswith(known)), "adamw")

"""Parameters that several commands have, each with one help text; every field of a recipe as a flag."""

from collections.abc import Container
from typing import Annotated, Any, Literal

from cyclopts import Group, Parameter
from pydantic import BaseModel, Field, create_model

from dual_lora.lab.commands.plain import Folded
from dual_lora.lab.model.device import check_device_name
from dual_lora.lab.read import parse_yaml
from dual_lora.lab.recipe.schema import Precision, Recipe

# Fields that other commands have as options of their own: there the same short names hold.
SHORT = {"dtype": "--dtype", "quantize": "--quantize", "gradient_checkpointing": "--gradient-checkpointing"}
Json = Annotated[bool, Parameter(help="End with one line of JSON on standard output.")]
DryRun = Annotated[bool, Parameter(help="Check everything and show runs, sizes and time, but run nothing.")]
Source = Annotated[str, Parameter(help="Run folder, adapter folder, or a model by folder, name or package:NAME.")]
ReportTo = Annotated[
    tuple[Literal["wandb", "mlflow", "tensorboard", "trackio"], ...],
    Parameter(
        help="Service that gets the logs. Most of these are on the network, so only this option turns them on.",
        show_default=False,
    ),
]
Base = Annotated[str | None, Parameter(help="Folder or name of the adapter's base model, if it has moved.")]
Dtype = Annotated[Precision | None, Parameter(help="Precision of the base weights. [default: the run's, else float32]")]
AutoDtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    Parameter(
        help="Precision of the base weights; auto: bfloat16 where the device is faster with it, else float32. "
        "[default: the run's, else auto]"
    ),
]
Device = Annotated[
    str | None,
    Parameter(
        help="Device to compute on: cpu, cuda, cuda:1, mps. [default: the best available]",
        validator=lambda _, device: check_device_name(device),
    ),
]


# The fields of a recipe that `train --help` shows; the others are in panels that --help-all shows.
MODEL, DATA, TRAINING = (
    Group(name, sort_key=number) for number, name in enumerate(("Model and method", "Data", "Training"), 1)
)
COMMON = {
    **dict.fromkeys(("model.path", "model.head", "model.dtype", "model.quantize", "method"), MODEL),
    **dict.fromkeys(
        ("data.train", "data.test", "data.validation", "data.holdout", "data.fields", "data.max_length"), DATA
    ),
    **dict.fromkeys(
        (f"train.{name}" for name in ("epochs", "steps", "batch_size", "learning_rate", "gradient_checkpointing")),
        TRAINING,
    ),
    **dict.fromkeys((f"train.{name}" for name in ("validate_every", "patience", "keep_best", "seed")), TRAINING),
}
FURTHER = {
    name: Folded(title, sort_key=number)
    for number, (name, title) in enumerate(
        {
            "model": "Model: more",
            "data": "Data: more",
            "train": "Training: more",
            "evaluate": "Evaluation",
            "": "The recipe itself",
        }.items(),
        4,
    )
}


def flags(model: type[BaseModel] = Recipe, only: Container[str] | None = None, within: str = "") -> type[BaseModel]:
    """``model`` with every field optional: what may be given as a flag over a recipe file. only: of these fields.

    within: the part of a recipe that it is. Of a whole recipe the rarer fields are folded away.
    """
    whole = model is Recipe or bool(within)
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        if only is not None and name not in only:
            continue
        kind: Any = field.annotation
        text = field.description or ""
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = flags(kind, within=name if model is Recipe else "")
        elif not field.is_required():
            default = field.get_default(call_default_factory=True)
            text += "" if default in (None, "", {}, []) else f" [default: {default}]"
        given: Any = kind | None
        if name in SHORT:
            given = Annotated[given, Parameter(name=(name.replace("_", "-"), SHORT[name]))]
        if whole and not (isinstance(kind, type) and issubclass(kind, BaseModel)):
            path = f"{within}.{name}" if within else name
            given = Annotated[given, Parameter(group=COMMON.get(path, FURTHER.get(within, FURTHER[""])))]
        fields[name] = (given, Field(None, description=text))
    return create_model(model.__name__, **fields)


def flag_values(given: BaseModel | None) -> dict[str, Any]:
    """The flags that were given, as overrides.

    Values of free mappings are read as YAML (``8`` is a number), their names with dashes or underscores, as all flags.
    """
    if given is None:
        return {}
    values = given.model_dump(exclude_unset=True)
    for holder, key in ((values, "method"), (values.get("train", {}), "arguments")):
        if key in holder:
            holder[key] = {
                name.replace("-", "_"): parse_yaml(value, f"--{key}.{name}") if isinstance(value, str) else value
                for name, value in holder[key].items()
            }
    return values

"""A run, written down: typed fields whose help serves the YAML file, the flags, ``--help`` and the documentation.

A recipe has five parts: model, method, data, train, evaluate. ``dual-lora recipes show NAME`` prints a complete one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from dual_lora.lab.errors import UserError, suggest

Precision = Literal["float32", "bfloat16", "float16"]
Task = Literal["exact_match", "choice", "classification", "regression", "loss", "bleu", "nlg"]


FAMILIES = "paper"  # the folder of recipes that are written as families
LISTING = "`dual-lora recipes` lists those that are shipped."


class Part(BaseModel):
    """A part of a recipe: unknown fields are errors, so that a typing mistake never runs silently."""

    model_config = ConfigDict(extra="forbid", validate_default=True)


class ModelPart(Part):
    path: str = Field(
        description="Folder, hub name, GGUF file, or package:NAME for a model inside an installed package."
    )
    head: Literal["causal", "classification", "regression"] = Field(
        "causal", description="Language model, or an encoder with a fresh head for classes or for one number."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "float32",
        description="Precision of the base weights (factors of Dual LoRA stay float32). auto: bfloat16 where this "
        "device is faster with it, float32 elsewhere; chosen once, when the run starts.",
    )
    attention: str | None = Field(
        None, description="Attention implementation of transformers, for example sdpa or eager."
    )


class DataPart(Part):
    train: str | None = Field(
        None,
        description="Training records: a .json, .jsonl, .tsv, .csv or .txt file, or hub:NAME[,SUBSET][:SPLIT]. "
        "Relative paths are sought in the working folder, then in $DUAL_LORA_DATA (default ../shared/data). "
        "Several sources are joined by ' + '.",
    )
    test: str | None = Field(None, description="Test records, named in the same way.")
    tests: dict[str, str] = Field(
        default_factory=dict,
        description="In place of test: several test sets by name. Each is measured apart, and their mean is given.",
    )
    validation: str | None = Field(None, description="Validation records, named in the same way.")
    holdout: int = Field(
        0, ge=0, description="With no validation records: take so many out of the training records, always the same."
    )
    format: Literal["auto", "chat", "instruction", "prompt", "facts", "text"] = Field(
        "auto",
        description="chat: messages; instruction: instruction, input, output[, answer]; prompt: prompt, answer; "
        "facts: facts||sentence lines; text: text[, text_pair], label.",
    )
    columns: list[str] | None = Field(
        None, description="Names of the columns of a .tsv or .csv file without a header line, in their order."
    )
    fields: dict[str, str] = Field(
        default_factory=dict, description="Our field name: the name in the file, e.g. {text: sentence}."
    )
    template: Literal["auto", "chat", "alpaca", "llm-adapters", "plain"] = Field(
        "auto",
        description="How a prompt is written: the tokenizer's chat template, Alpaca's text, the same as LLM-Adapters "
        "and DoRA write it (indented), or nothing around it.",
    )
    learn_prompt: bool = Field(False, description="The loss counts the prompt's tokens too, not the answer's alone.")
    choices: list[str] | None = Field(
        None,
        description="Possible answers for the choice task; left out: the record's, or its 'Answer format: a/b' line.",
    )
    answers: Literal["label", "text"] = Field(
        "label",
        description="Tasks whose prompt lists 'Answer1: ... Answer2: ...': answer with the label as it stands, or ask "
        "the question alone and answer with the text that the label stands for.",
    )
    max_length: int = Field(512, ge=4, description="Longest example in tokens; longer ones are left out and counted.")
    train_limit: int | None = Field(None, ge=1, description="Use only so many training records (seeded choice).")
    test_limit: int | None = Field(
        None, ge=1, description="Use only so many test or validation records (seeded choice)."
    )
    test_prompts: int | None = Field(
        None, ge=1, description="The same for different prompts, each with all its answers (references)."
    )
    seed: int = Field(0, description="Seed of holdout and limits; independent of the training seed.")


class TrainPart(Part):
    steps: int | None = Field(None, ge=1, description="Optimizer steps; left out: computed from epochs.")
    epochs: float = Field(1.0, gt=0, description="Passes over the training records, unless steps is given.")
    batch_size: int = Field(8, ge=1, description="Examples per device and forward pass.")
    accumulate: int = Field(1, ge=1, description="Forward passes per optimizer step.")
    learning_rate: float = Field(1e-3, gt=0, description="Peak learning rate.")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's weight decay.")
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = Field(
        "linear", description="Course of the learning rate."
    )
    lr_warmup: float = Field(0.05, ge=0, le=1, description="Share of the steps over which the learning rate rises.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradient norm is cut to this; 0 for never.")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Share of the target spread over the vocabulary.")
    autocast: Literal["auto", "none", "bf16", "fp16"] = Field(
        "none",
        description="Mixed precision of the training loop. auto: bf16 where this device is faster with it, none "
        "elsewhere.",
    )
    seed: int = Field(0, ge=0, description="Seed of the factors, the data order and dropout.")
    optimizer: str = Field(
        "adamw_torch", description="An optim name of transformers (adamw_torch, galore_adamw, ...) or loraplus."
    )
    loraplus_ratio: float = Field(
        16.0, gt=0, description="optimizer loraplus: learning rate of B (and D) divided by that of A (and C)."
    )
    rates: dict[str, float] = Field(
        default_factory=dict,
        description="Regular expression of parameter names: multiple of the learning rate; the first that fits counts.",
    )
    gradient_checkpointing: bool = Field(False, description="Recompute activations in backward to save memory.")
    log_every: int = Field(5, ge=1, description="Steps between two lines of metrics.jsonl.")
    checkpoint_every: int = Field(100, ge=1, description="Steps between two checkpoints.")
    keep_checkpoints: int = Field(1, ge=1, description="Newest complete checkpoints that are kept.")
    validate_every: int | None = Field(None, ge=1, description="Steps between two validation losses.")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="Any further field of transformers.TrainingArguments."
    )

    @field_validator("rates")
    @classmethod
    def _patterns_and_factors(cls, value: dict[str, float]) -> dict[str, float]:
        for pattern, factor in value.items():
            check_regex(pattern)
            if not factor > 0:
                raise ValueError(f"{pattern}: {factor} is no multiple of a learning rate, expected a number above 0")
        return value


class EvaluatePart(Part):
    tasks: list[Task] = Field(
        default_factory=list,
        description="exact_match (generation), choice (likelihood), classification, regression (Pearson, Spearman), "
        "loss, bleu, nlg (BLEU, NIST, METEOR, ROUGE-L, CIDEr); empty: loss or classification.",
    )
    split: Literal["test", "validation", "train"] = Field("test", description="Which records of data are evaluated.")
    base: bool = Field(True, description="Evaluate the untrained model as well, side by side.")
    batch_size: int = Field(16, ge=1, description="Rows per forward pass.")
    max_new_tokens: int = Field(64, ge=1, description="Longest generated answer.")
    beams: int = Field(1, ge=1, description="Beams of the search for a generated answer; 1: greedy.")
    length_penalty: float = Field(1.0, description="Beam search: above 0 favours longer answers.")
    no_repeat_ngram: int = Field(0, ge=0, description="No n-gram of this length occurs twice in an answer; 0: any may.")
    extract: str | None = Field(
        None,
        description="exact_match: regular expression; its first match in the generated text is the answer. "
        "commonsense: the first label of the right answer's kind (true/false, answer1-5, ...).",
    )
    compare: Literal["text", "json"] = Field("text", description="exact_match: equal text, or equal JSON value.")
    per_token: bool = Field(False, description="choice: mean instead of summed log-likelihood of a choice's tokens.")

    @field_validator("tasks", mode="before")
    @classmethod
    def _one_task_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("extract")
    @classmethod
    def _can_be_searched_for(cls, value: str | None) -> str | None:
        check_regex(value or "")
        return value


def check_regex(pattern: str) -> None:
    """Raise ValueError where a pattern cannot be compiled."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


class Origin(Part):
    """Where a recipe's settings come from, and which figures others report for the same run."""

    sources: dict[str, str] = Field(
        default_factory=dict, description="Name of a source: its kind (paper, predecessor, ours) and what it is."
    )
    settings: dict[str, list[str]] = Field(
        default_factory=dict, description="Name of a source: the settings that it gives, e.g. train.learning_rate."
    )
    reported: dict[str, dict[str, float | str]] = Field(
        default_factory=dict, description="Name of a source: metric: the figure that it reports."
    )

    def source_of(self, setting: str) -> str | None:
        """The source of a setting like ``train.learning_rate``; None if it is the laboratory's default."""
        return next((name for name, given in self.settings.items() if setting in given), None)


class Recipe(Part):
    """A complete fine-tuning run."""

    name: str = Field("run", pattern=r"^[\w.\-]+$", description="Name of the recipe and of its default output folder.")
    about: str = Field("", description="One sentence on what the recipe shows.")
    model: ModelPart = Field(description="The model to start from.")
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "dual_lora", "r": 16},
        description="name: dual_lora, lora, dora, hira, ... (any PEFT method) or full; "
        "every other key is a field of that method's PEFT configuration, e.g. --method.r 8.",
    )
    data: DataPart = Field(default_factory=DataPart, description="Records and how they become prompts.")
    train: TrainPart = Field(default_factory=TrainPart, description="The training loop.")
    evaluate: EvaluatePart = Field(default_factory=EvaluatePart, description="What is measured afterwards.")
    origin: Origin | None = Field(None, description="Who said each setting, and what others report.")

    @field_validator("method")
    @classmethod
    def _method_has_a_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return value if "name" in value else {"name": "dual_lora", **value}

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def read_recipe(source: str | Path, overrides: dict[str, Any] | None = None) -> Recipe:
    """The recipe in a YAML file, or the shipped one of that name, with ``overrides`` laid over it.

    Raises UserError for a missing file, broken YAML, and unknown or mistyped fields (nearest name suggested).
    """
    path, text = recipe_text(source)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        found = "is empty" if values is None else f"holds {type(values).__name__}"
        raise UserError(f"{path} {found}, expected a mapping with model, method, data, train.")
    return build_recipe(_restamped(merged(values, overrides or {}), overrides or {}), str(path))


def recipe_text(source: str | Path) -> tuple[str, str]:
    """Where the recipe lies and its text: a file if there is one, else the shipped recipe of that name."""
    path = Path(source)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        path = path / "recipe.yaml"
    if not path.is_file():
        shipped = shipped_recipes()
        if str(source) in shipped:
            path = shipped[str(source)]
            if path.parent.name == FAMILIES:
                from dual_lora.lab.recipe.families import family

                return f"{path} ({source})", family(path)[str(source)].text
        elif path.suffix in {".yaml", ".yml"} or "/" in str(source):
            raise UserError(f"There is no recipe file {source}. {LISTING}")
        else:
            raise UserError(f"There is no recipe {str(source)!r}.{suggest(str(source), shipped, LISTING)}")
    try:
        return str(path), path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a text file in UTF-8.") from None


def shipped_recipes() -> dict[str, Path]:
    """Name → file of the recipes that the package carries; those of a family share its file."""
    from dual_lora.lab.recipe.families import family

    folder = Path(__file__).parent / "shipped"
    alone = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    return alone | {name: path for path in sorted((folder / FAMILIES).glob("*.yaml")) for name in family(path)}


def build_recipe(values: dict[str, Any], where: str = "the recipe") -> Recipe:
    """Validated recipe from plain values; every problem is named, with the nearest known field or value."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {problems(error)}") from None


def problems(error: ValidationError) -> str:
    """What is wrong in a recipe, field by field, in sentences."""
    return " ".join(_problem(item) for item in error.errors())


def merged(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """``overrides`` laid over ``values``, mapping by mapping.

    A new method name drops the old method's fields, and data.test the recipe's data.tests (and the other way round).
    """
    result = dict(values)
    for key, value in overrides.items():
        old = result.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            renamed = key == "method" and value.get("name", old.get("name")) != old.get("name")
            result[key] = value if renamed else merged(old, value)
            for given, other in (("test", "tests"), ("tests", "test")) if key == "data" else ():
                if value.get(given) and other not in value:
                    result[key].pop(other, None)
        else:
            result[key] = value
    return result


def _restamped(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings that the user has changed are no longer those of their source."""
    settings = (values.get("origin") or {}).get("settings")
    if not settings or "origin" in overrides:
        return values
    changed = {f"{part}.{key}" for part, over in overrides.items() if isinstance(over, dict) for key in over}
    kept = {name: [s for s in given if s not in changed] for name, given in settings.items()}
    more = {"yours": sorted(changed)} if changed else {}
    sources = values["origin"].get("sources", {}) | ({"yours": "ours: set by you"} if changed else {})
    return {**values, "origin": {**values["origin"], "sources": sources, "settings": kept | more}}


def flags(model: type[BaseModel] = Recipe) -> type[BaseModel]:
    """``model`` with every field optional: what may be given as a flag over a recipe file."""
    fields: dict[str, Any] = {}
    for name, field in model.model_fields.items():
        kind: Any = field.annotation
        text = field.description or ""
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            kind = flags(kind)
        elif not field.is_required() and (default := field.get_default(call_default_factory=True)) not in (
            None,
            "",
            {},
            [],
        ):
            text += f" [default: {default}]"
        fields[name] = (kind | None, Field(None, description=text))
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
                name.replace("-", "_"): yaml.safe_load(value) if isinstance(value, str) else value
                for name, value in holder[key].items()
            }
    return values


# Fields that came after the first studies: left out of a job's identity while they have their default, so that runs
# finished before stay finished.
_LATER = {
    "data": ("tests", "learn_prompt", "test_prompts"),
    "train": ("label_smoothing", "rates"),
    "evaluate": ("beams", "length_penalty", "no_repeat_ngram"),
}


def identity(recipe: Recipe) -> dict[str, Any]:
    """What makes two runs the same run: the recipe's values, without where they come from."""
    values = recipe.model_dump(mode="json", exclude={"origin"})
    for part, names in _LATER.items():
        for name in names:
            field = type(getattr(recipe, part)).model_fields[name]
            if values[part][name] == field.get_default(call_default_factory=True):
                del values[part][name]
    return values


def _problem(item: Any) -> str:
    place = ".".join(str(p) for p in item["loc"])
    if item["type"] == "extra_forbidden":
        parent, wrong = _part_at(item["loc"][:-1]), str(item["loc"][-1])
        everywhere = [f"{part}.{f}" for part in Recipe.model_fields for f in _names(_part_at((part,)))]
        known = _names(parent)
        hint = suggest(wrong, known)
        if not hint.startswith(" Did"):
            hint = suggest(wrong, everywhere) if suggest(wrong, everywhere).startswith(" Did") else hint
        return f"unknown field {place!r}.{hint}"
    if item["type"] == "missing":
        return f"field {place!r} is missing."
    if item["type"] in ("dict_type", "model_type", "model_attributes_type"):
        key = {"model": "path", "method": "name", "data": "train"}.get(place)
        if key is None or not isinstance(item["input"], str):
            return f"{place} is {item['input']!r}, expected a mapping of fields to values."
        value = item["input"]
        return f"{place} is {value!r}, expected {place}: {{{key}: {value}}}, or as a flag --{place}.{key} {value}."
    if item["type"] == "literal_error":
        return f"{place} is {item['input']!r}, expected {item['ctx']['expected']}.{_near_literal(item)}"
    text = item["msg"].removeprefix("Value error, ")
    return f"{place} is {item['input']!r}: {text[0].lower()}{text[1:]}."


def _near_literal(item: Any) -> str:
    options = item["ctx"]["expected"].replace(" or ", ", ").replace("'", "").split(", ")
    hint = suggest(str(item["input"]), options)
    return hint if hint.startswith(" Did") else ""


def _part_at(loc: tuple[Any, ...]) -> type[BaseModel] | None:
    part: Any = Recipe
    for name in loc:
        part = part.model_fields[name].annotation
        part = next((a for a in get_args(part) if isinstance(a, type) and issubclass(a, BaseModel)), part)
    return part if isinstance(part, type) and issubclass(part, BaseModel) else None


def _names(part: type[BaseModel] | None) -> list[str]:
    return list(part.model_fields) if part else []

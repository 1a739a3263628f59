"""A run, written down: typed fields whose help serves the YAML file, the flags, ``--help`` and the documentation.

A recipe has five parts: model, method, data, train, evaluate. ``dual-lora recipes show NAME`` prints a complete one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import ConfigDict, Field, field_validator, model_validator

from dual_lora.lab import yaml_text
from dual_lora.lab.patterns import compiled
from dual_lora.lab.recipe.objective import ObjectiveSection
from dual_lora.lab.recipe.section import MOST, laid_over
from dual_lora.lab.recipe.section import Origin as Origin
from dual_lora.lab.recipe.section import Section as Section
from dual_lora.lab.recipe.training import TrainSection as TrainSection

NAME = r"^\.?[\w\-][\w.\-]*$"  # of a default folder: "." and ".." are other folders, not names
ATTENTION = r"^[\w|]+$"  # a "/" names code on the hub
IN_WORDS = {
    NAME: "letters, digits, '_', '-' and '.' alone, because it names a folder",
    ATTENTION: "letters, digits and '_' alone, such as sdpa or eager",
}
"""What a field's pattern asks for."""

Precision = Literal["float32", "bfloat16", "float16"]
Quantize = Literal["none", "nf4", "fp4", "int8", "torchao-int8"]


Task = Literal["exact_match", "choice", "classification", "regression", "loss", "bleu", "nlg"]


class ModelSection(Section):
    path: str = Field(
        description="Folder, hub name, GGUF file, or package:NAME for a model inside an installed package."
    )
    revision: str | None = Field(
        None, description="Branch, tag or commit of a model on the hub; left out: the main branch."
    )
    head: Literal["causal", "classification", "regression"] = Field(
        "causal", description="Language model, or an encoder with a new head for classes or for one number."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="Precision of the base weights (factors of Dual LoRA stay float32). auto: bfloat16 where this "
        "device is faster with it, float32 elsewhere and for method full, whose weights are trained; chosen once, when "
        "the run starts.",
    )
    quantize: Quantize = Field(
        "none",
        description="Quantise the base's linear layers while it is loaded: nf4, fp4 and int8 by bitsandbytes, "
        "torchao-int8 by torchao. Merging uses the unquantised base.",
    )
    attention: str | None = Field(
        None,
        pattern=ATTENTION,
        description="Attention implementation of transformers, for example sdpa or eager.",
    )

    @classmethod
    def merged(cls, values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        """Merge as any section does; another path drops the revision, which was the old one's."""
        result = super().merged(values, over)
        if over.get("path") and over["path"] != values.get("path") and "revision" not in over:
            result.pop("revision", None)
        return result


class DataSection(Section):
    in_place = (("test", "tests"), ("tests", "test"), ("holdout", "validation"))

    train: str | None = Field(
        None,
        description="Training records: .json, .jsonl, .tsv, .csv, .parquet or .txt, or hub:NAME[,SUBSET][:SPLIT]. "
        "Relative paths are sought in the working folder, then in $DUAL_LORA_DATA (default ../shared/data). "
        "Several sources are joined by ' + '.",
    )
    test: str | None = Field(
        None, description="Test records, named as those of train; for a data set on the hub, name the split."
    )
    tests: dict[str, str] = Field(
        default_factory=dict,
        description="Instead of test: several test sets by name. Each has its own score, and the mean is given too.",
    )
    validation: str | None = Field(None, description="Validation records, named as those of test.")
    holdout: int = Field(
        0,
        ge=0,
        description="Without validation records: how many to take out of the training records, always the same.",
    )
    group: str | None = Field(
        None,
        description="What holdout keeps in one set. prompt: all records with the same prompt or text, and a "
        "conversation with those that go on from it. A field of the "
        "records, e.g. document: all records with the same value in it. Left out: every record by itself.",
    )
    overlap: int | Literal["all"] = Field(
        0,
        description="How many records of one set (train, validation, test) may have a prompt, text or group that "
        "another set has too. If there are more, a study raises an error and a run warns. all: no limit, for tasks of "
        "memorisation.",
    )
    format: Literal["auto", "chat", "instruction", "prompt", "facts", "text", "document", "preference"] = Field(
        "auto",
        description="chat: messages (or conversations); instruction: instruction, input, output[, answer]; prompt: "
        "prompt, answer (or completion); facts: facts||sentence lines; text: text[, text_pair], label; document: text "
        "alone; preference: prompt, chosen, rejected.",
    )
    columns: list[str] | None = Field(
        None, description="Names of the columns of a .tsv or .csv file without a header line, in their order."
    )
    fields: dict[str, str] = Field(
        default_factory=dict,
        description="Fields that have another name in the file, e.g. {text: sentence}, or as a flag "
        "--data.fields.text sentence, where the column of the text is called sentence.",
    )
    template: Literal["auto", "chat", "alpaca", "llm-adapters", "plain"] = Field(
        "auto",
        description="How a prompt is written: chat: by the tokenizer's chat template; alpaca: Alpaca's text; "
        "llm-adapters: Alpaca's text indented, as LLM-Adapters and DoRA have it; plain: the prompt and a line break; "
        "auto: chat, or plain if the tokenizer has no template.",
    )
    learn_prompt: bool = Field(
        False, description="The training loss counts the prompt's tokens as well as the answer's. Evaluation does not."
    )
    choices: list[str] | None = Field(
        None,
        description="Possible answers for the choice task; left out: the record's choices, or its 'Answer format: a/b' "
        "line.",
    )
    answers: Literal["label", "text"] = Field(
        "label",
        description="For prompts that list 'Answer1: ... Answer2: ...'. label: the prompt with its list, answered by "
        "the label; text: the question without the list, answered by the text of that label.",
    )
    max_length: int = Field(
        512,
        ge=4,
        le=MOST,
        description="Longest example in tokens; longer ones are left out (a classifier's texts are cut) and counted.",
    )
    train_limit: int | None = Field(None, ge=1, description="Use at most this many training records, chosen by seed.")
    test_limit: int | None = Field(
        None, ge=1, description="Use at most this many test or validation records, chosen by seed."
    )
    test_prompts: int | None = Field(
        None,
        ge=1,
        description="Use at most this many different prompts of the test records, each with all its answers "
        "(references).",
    )
    seed: int = Field(0, description="Seed for holdout and limits; independent of the training seed.")

    @field_validator("fields")
    @classmethod
    def _fields_exist(cls, value: dict[str, str]) -> dict[str, str]:
        for ours in value:
            if ours not in FIELDS:
                raise ValueError(
                    f"no format reads a field {ours!r}; expected OURS: THEIRS with one of {', '.join(FIELDS)}"
                )
        return value

    @model_validator(mode="after")
    def _what_judges_names_its_split(self) -> DataSection:
        """A hub's data set without one is its split `train`, on which no test shall silently run."""
        named = {"validation": self.validation, "test": self.test, **{f"tests.{k}": v for k, v in self.tests.items()}}
        for field, source in named.items():
            for one in (source or "").split(" + "):
                if (name := one.strip()).startswith("hub:") and ":" not in name.removeprefix("hub:"):
                    raise ValueError(
                        f"data.{field}: {name} names no split: write {name}:test (or :train, if you mean it)"
                    )
        return self


FIELDS = (
    "messages", "conversations", "tools", "instruction", "input", "output", "prompt", "answer", "completion", "chosen",
    "rejected", "text", "text_pair", "label", "choices", "line",
)  # fmt: skip
"""What records are read for; `data.fields` gives them the names that a file has."""


def normalised_name(name: str) -> str:
    """A method's name in the one spelling that it has here: dual-lora and Dual_LoRA are dual_lora."""
    return name if ":" in name else name.lower().replace("-", "_")


def method_in(method: Mapping[str, Any]) -> Any:
    """The method's name, `normalised_name`; what is no name is left as it is."""
    name = method.get("name", "dual_lora")
    return normalised_name(name) if isinstance(name, str) else name


class EvaluateSection(Section):
    tasks: list[Task] = Field(
        default_factory=list,
        description="exact_match (generation), choice (likelihood), classification, regression (Pearson, Spearman), "
        "loss, bleu, nlg (BLEU, NIST, METEOR, ROUGE-L, CIDEr); empty: loss or classification.",
    )
    split: Literal["test", "validation", "train"] = Field("test", description="Which records of data are evaluated.")
    base: bool = Field(True, description="Evaluate the untrained model as well.")
    batch_size: int = Field(16, ge=1, le=MOST, description="Rows per forward pass.")
    max_new_tokens: int = Field(64, ge=1, le=MOST, description="Longest generated answer.")
    beams: int = Field(
        1, ge=1, le=1000, description="Beams of the beam search; 1: greedy, whatever the model's own settings."
    )
    length_penalty: float = Field(1.0, description="Beam search: above 0 favours longer answers.")
    no_repeat_ngram: int = Field(
        0,
        ge=0,
        le=MOST,
        description="No n-gram of this length occurs twice in an answer (n-grams of the prompt may); 0: no limit.",
    )
    extract: str | None = Field(
        None,
        description="exact_match: regular expression; its first match in the generated text is the answer. "
        "If it has groups, the last one that matched counts. It is applied to the expected answer too, unless the "
        "record has a field for the answer alone. "
        "commonsense: the first label of the right answer's kind (true/false, answer1-5, ...).",
    )
    compare: Literal["text", "json"] = Field(
        "text", description="exact_match: equal text, or equal JSON value (1,000.0 is 1000)."
    )
    forgetting: str | None = Field(
        None,
        description="Texts that do not belong to the task (the lines of a .txt file, or records with a field text). "
        "Measures how much their loss rises from the base to the adapter. Language models only.",
    )
    per_token: bool = Field(False, description="choice: use the mean log-likelihood of a choice's tokens, not the sum.")

    @field_validator("tasks", mode="before", json_schema_input_type=Task | list[Task])
    @classmethod
    def _one_task_is_a_list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("tasks")
    @classmethod
    def _each_once(cls, value: list[Task]) -> list[Task]:
        return list(dict.fromkeys(value))

    @field_validator("extract")
    @classmethod
    def _can_be_searched_for(cls, value: str | None) -> str | None:
        compiled(value or "")
        return value


class Recipe(Section):
    """A complete fine-tuning run."""

    model_config = ConfigDict(validate_assignment=True)

    name: str = Field(
        "run",
        pattern=NAME,
        description="Name of the recipe and of its default output folder. Without one it is the file's.",
    )
    about: str = Field("", description="One sentence on what the recipe shows.")
    model: ModelSection = Field(description="The model to start from.")
    method: dict[str, Any] = Field(
        default_factory=lambda: {"name": "dual_lora", "r": 16},
        description="name: dual_lora, lora, dora, hira, ... (any PEFT method) or full; "
        "every other key is a field of that method's PEFT configuration, e.g. --method.r 8. hira and loha also take "
        "fused: true, which computes PEFT's layers by this package's product (same numbers, faster).",
    )
    data: DataSection = Field(default_factory=DataSection, description="Records and how they become prompts.")
    train: TrainSection = Field(default_factory=TrainSection, description="The training loop.")
    objective: ObjectiveSection = Field(
        default_factory=ObjectiveSection, description="What training optimizes: answers, preferences or rewards."
    )
    evaluate: EvaluateSection = Field(default_factory=EvaluateSection, description="What is measured afterwards.")
    origin: Origin | None = Field(None, description="The source of each setting, and results that others report.")

    @field_validator("method")
    @classmethod
    def _method_has_a_name(cls, value: dict[str, Any]) -> dict[str, Any]:
        return {"name": method_in(value), **{key: field for key, field in value.items() if key != "name"}}

    @model_validator(mode="after")
    def _forgetting_is_a_language_models(self) -> Recipe:
        if self.evaluate.forgetting is not None and self.model.head != "causal":
            raise ValueError(f"evaluate.forgetting needs a language model, and model.head is {self.model.head}")
        return self

    @model_validator(mode="after")
    def _what_is_packed_is_not_trained(self) -> Recipe:
        if self.model.quantize != "none" and self.method["name"] == "full":
            raise ValueError(
                f"model.quantize is {self.model.quantize}, and method full trains the base's weights, which would stay "
                "packed: take an adapter, or leave model.quantize out"
            )
        return self

    @classmethod
    def merged(cls, values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
        """Lay settings over others, each part by its own rules. A new method name drops the old method's fields."""
        result = values | over
        for part in values.keys() & over.keys():
            old, given = values[part], over[part]
            if not isinstance(old, dict) or not isinstance(given, dict):
                continue
            if part == "method":
                renamed = method_in({**old, **given}) != method_in(old)
                result[part] = given if renamed else laid_over(old, given)
            else:
                result[part] = SECTIONS.get(part, Section).merged(old, given)
        return result

    def over(self, changes: dict[str, Any]) -> Recipe:
        """Return this recipe with changes laid over it. Only the parts that they name are written out and checked
        again.

        Raises pydantic's ValidationError (see `read.changed`).
        """
        return self.replaced(**self.merged(self.model_dump(mode="json", include=set(changes)), changes))

    def replaced(self, **parts: Any) -> Recipe:
        """Return this recipe with other parts instead of its own, which are checked."""
        made = self.model_copy()
        for part, value in parts.items():
            setattr(made, part, value)
        return made

    def to_yaml(self) -> str:
        """The recipe with every default written out."""
        return yaml_text.dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


SECTIONS: dict[str, type[Section]] = {
    "model": ModelSection, "data": DataSection, "train": TrainSection, "objective": ObjectiveSection,
    "evaluate": EvaluateSection,
}  # fmt: skip

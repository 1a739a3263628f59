"""Evaluate a model, base and adapter side by side, and keep the result of every item."""

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.data.encode import IGNORED, VALUE, Encoded, Prompter
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import NotFinite, UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import json_text, make_folder, text_of_json, write_output
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.opened import Tuned, open_tuned
from dual_lora.lab.model.weights import folder_digest
from dual_lora.lab.progress import Bar
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection, Recipe, Task
from dual_lora.lab.run import scoring
from dual_lora.lab.run.choice import score_choice
from dual_lora.lab.run.figures import figures
from dual_lora.lab.run.scoring import Asked, Rows, loss_rows

FORGETTING = "forgetting"
LONGEST = 768  # tokens of a text for forgetting, as in PEFT's comparison
_ENCODER = ("classification", "regression")
_TASKS: dict[Task, Callable[[Asked], Rows]] = {
    "loss": scoring.score_loss,
    "choice": score_choice,
    "exact_match": scoring.score_exact_match,
    "bleu": scoring.score_texts,
    "nlg": scoring.score_texts,
    "classification": scoring.score_classification,
    "regression": scoring.score_regression,
}


@dataclass
class EvalResult:
    """Figures by variant ("base", "tuned") and metric; ``items`` holds one row an example, task and variant."""

    source: str
    split: str
    examples: int
    cut: int  # examples whose text had to be cut or is longer than data.max_length
    metrics: dict[str, dict[str, float]]
    seconds: dict[str, float]
    items: list[dict[str, Any]] = field(repr=False)
    file: str | None = None
    reported: dict[str, dict[str, float | str]] = field(default_factory=dict)  # by the recipe's sources, see Origin
    other: dict[str, Any] = field(default_factory=dict)  # settings that are not those of the run's recipe
    weights: dict[str, str] = field(default_factory=dict)  # a print of what the run held, so that a card knows it again

    @contextmanager
    def timed(self, variant: str) -> Iterator[None]:
        """Add the time spent inside the block to the variant's seconds."""
        start = time.perf_counter()
        yield
        self.seconds[variant] += round(time.perf_counter() - start, 3)

    def add(self, variant: str, task: Task, rows: list[dict[str, Any]], examples: list[Example]) -> None:
        """Add a variant's figures for a task. A figure whose name is taken gets the task as a prefix."""
        known = self.metrics[variant]
        for name, value in figures(task, rows, examples).items():
            known[f"{task}_{name}" if name in known else name] = value
        where = ["" if task in ("bleu", "nlg") else example.where for example in examples]
        about = {"variant": variant, "task": task}
        self.items += [{**about, "item": i, "where": where[i], **row} for i, row in enumerate(rows)]

    def summary(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        names = ("source", "split", "examples", "cut", "metrics", "seconds", "file")
        reported = {"reported": self.reported} if self.reported else {}
        more = {name: value for name in ("other", "weights") if (value := getattr(self, name))}
        return {k: getattr(self, k) for k in names} | reported | more

    def scores(self, variant: str, task: str) -> list[float]:
        """One number an item, in the order of the records: 1/0 for correct, mean nats for loss."""
        rows = [i for i in self.items if i["variant"] == variant and i["task"] == task]
        return [float(r["correct"]) if "correct" in r else r["nats"] / r.get("tokens", 1) for r in rows]


def evaluate(
    source: str | Path | Tuned,
    data: DataSection | None = None,
    spec: EvaluateSection | None = None,
    *,
    examples: list[Example] | None = None,
    variants: list[str] | None = None,
    progress: bool = True,
) -> EvalResult:
    """Evaluate a run, an adapter, a model, or one that is open already (``RunResult.tuned``, ``open_tuned``).

    data, spec: taken from the run's recipe where left out. examples: evaluate these instead of a split of ``data``.
    variants: "base" and "tuned"; left out, what ``spec.base`` says. A run keeps the result; what was measured with
    other settings than its recipe's is kept apart, and is no score of its card. Raises UserError for tasks that do not
    fit.
    """
    tuned = source if isinstance(source, Tuned) else open_tuned(source)
    if data is None and tuned.recipe is None:
        raise UserError("No recipe came with this model: give the data to evaluate it on by --recipe or --data.test.")
    data = data or tuned.recipe.data  # type: ignore[union-attr]
    spec = spec or (tuned.recipe.evaluate if tuned.recipe else EvaluateSection())
    given = {} if examples is None else _custom_examples(examples, data, spec)
    examples = load_split(data, spec.split) if examples is None else examples
    if not examples:
        raise UserError("There are no examples to evaluate.")
    tasks = _tasks(list(spec.tasks), examples, tuned)
    chosen = variants or [v for v in tuned.variants if spec.base or v != "base" or tuned.variants == ["base"]]
    prompter = Prompter(tuned.tokenizer, data.template)
    if tuned.recipe is not None and examples[0].messages:
        _check_template(prompter, Prompter(tuned.tokenizer, tuned.recipe.data.template))
    long = _count_long(examples, prompter, data, tuned)
    result = EvalResult(
        tuned.source, spec.split, len(examples), long, {v: {} for v in chosen}, dict.fromkeys(chosen, 0.0), []
    )
    for variant in chosen:
        with tuned.as_variant(variant) as model, quiet():
            for task in tasks:
                with result.timed(variant), Bar(f"{task} · {variant}", len(examples), progress) as bar:
                    asked = Asked(model, examples, prompter, spec, tuned.classes, data.max_length, bar.advance)
                    with _clear_not_finite(tuned, variant):
                        rows = _TASKS[task](asked)
                        _check_numbers(rows)
                result.add(variant, task, rows, examples)
    if spec.forgetting is not None and "tuned" in chosen:
        with result.timed("tuned"):
            rows = forgetting_rows(tuned, spec)
        result.metrics["tuned"] |= forgetting_figures(rows)
        result.items += [{"variant": "tuned", "task": FORGETTING, "item": i, **row} for i, row in enumerate(rows)]
    other = (changed_settings(tuned.recipe, data, spec) if tuned.recipe else {}) | _changed_model(tuned) | given
    if tuned.recipe is not None and tuned.recipe.origin is not None and not other:
        result.reported = tuned.recipe.origin.reported
    if tuned.run is not None:
        result.other = other
        result.weights = folder_digest(held) if (held := RunFolder(tuned.run).result) else {}
        apart = [hashlib.sha256(json_text(result.other).encode()).hexdigest()[:8]] if result.other else []
        result.file = str(write_result(result, tuned.run / "evaluation" / "-".join([spec.split, *tasks, *apart])))
    return result


def _check_template(asked: Prompter, trained: Prompter) -> None:
    """Say that prompts are written in another way than the adapter has learned them."""
    if asked.kind != trained.kind:
        warn(
            f"The run learned prompts of the template {trained.kind}, and is asked by {asked.kind}: for its own, give "
            f"data.template: {trained.template}.",
            stacklevel=3,
        )


def mean_losses(
    tuned: Tuned, data: DataSection, examples: list[Example], variants: list[str], spec: EvaluateSection, progress: bool
) -> dict[str, float]:
    """Return the loss that training minimises, by variant: nats a token or a text, of a regression the squared
    error."""
    head = tuned.recipe.model.head if tuned.recipe else "causal"
    tasks: dict[str, Task] = {"causal": "loss", "classification": "classification", "regression": "regression"}
    spec = spec.model_copy(update={"tasks": [tasks[head]]})
    found = evaluate(tuned, data, spec, examples=examples, variants=variants, progress=progress).metrics
    return {variant: figures["mse" if head == "regression" else "loss"] for variant, figures in found.items()}


def _custom_examples(examples: list[Example], data: DataSection, spec: EvaluateSection) -> dict[str, str]:
    """Return a digest of examples that are not those of the split; {} for those that are."""
    try:
        if examples == load_split(data, spec.split):
            return {}
    except UserError:  # there is no such split
        pass
    return {"examples": hashlib.sha256(repr(examples).encode()).hexdigest()[:8]}


def changed_settings(recipe: Recipe, data: DataSection, spec: EvaluateSection) -> dict[str, Any]:
    """Return the settings that differ from the recipe's and change scores; tasks and split may differ."""
    free = {"tasks", "split", "base", "batch_size"}
    parts = ("data", data, recipe.data), ("evaluate", spec, recipe.evaluate)
    return {
        f"{part}.{name}": value
        for part, ours, theirs in parts
        for name, value in ours
        if name not in free and value != getattr(theirs, name)
    }


def _changed_model(tuned: Tuned) -> dict[str, str]:
    """Return the requested base and precision if they are not the recipe's."""
    part = tuned.recipe.model if tuned.recipe else None
    known = {"base": part.path, "dtype": part.dtype} if part else {}
    return {name: value for name, value in tuned.given.items() if value != known.get(name)}


def write_result(result: EvalResult, folder: Path) -> Path:
    """Write items.jsonl with every item and result.json with the figures; returns the latter's path."""
    make_folder(folder)
    lines = "".join(json_text(item) + "\n" for item in result.items)
    write_output(folder / "items.jsonl", lines)
    result.file = str(folder / "result.json")
    write_output(folder / "result.json", text_of_json(result.summary()))
    return folder / "result.json"


@contextmanager
def _clear_not_finite(tuned: Tuned, variant: str) -> Iterator[None]:
    """Turn NotFinite into a UserError that says that the model has no score."""
    try:
        yield
    except NotFinite as error:
        raise UserError(
            f"{tuned.source} ({variant}) computes NaN or infinity {error}, so it has no score. Its training has "
            "diverged, or its weights do not fit into the precision (--dtype float32)."
        ) from error


def _check_numbers(rows: Rows) -> None:
    """A model of NaN gives every item its first class or choice, which may well be right: look at what it chose by."""
    bad = sum(not all(map(_is_number, (r.get("nats"), r.get("predicted"), *r.get("scores", ())))) for r in rows)
    if bad:
        raise NotFinite(f"on {bad} of {len(rows)} examples")


def _is_number(value: Any) -> bool:
    """Whether a score is a number. For a choice -infinity is one: a likelihood of 0."""
    return not isinstance(value, float) or (math.isfinite(value) or value == -math.inf)


def _tasks(asked: list[Task], examples: list[Example], tuned: Tuned) -> list[Task]:
    """The tasks, where none are asked for the usual one. Raises UserError for one that does not fit records or head."""
    encodes = bool(examples[0].text)
    if odd := next((example for example in examples if bool(example.text) != encodes), None):
        raise UserError(
            f"{odd.where} and {examples[0].where} are not of one kind: one has a text and a label, the other a prompt "
            "and an answer. No task measures both: evaluate them apart."
        )
    head: Task = "regression" if tuned.classes == [VALUE] else "classification"
    tasks: list[Task] = asked or [head if encodes else "loss"]
    for task in tasks:
        if (task in _ENCODER) != encodes:
            found = "text and label" if encodes else "prompt and answer"
            raise UserError(f"The task {task} does not fit the records, which hold {found}.")
        if task != "loss" and examples[0].whole:
            raise UserError(f"The task {task} needs prompts, and {examples[0].where} has none: measure loss.")
        if task in _ENCODER and not tuned.classes:
            raise UserError(
                f"{tuned.source} has no classes: only a run or its adapter with head classification can be evaluated."
            )
        if task in _ENCODER and task != head:
            raise UserError(f"The task {task} does not fit {tuned.source}, which has a head for {head}.")
    return tasks


def _count_long(examples: list[Example], prompter: Prompter, data: DataSection, tuned: Tuned) -> int:
    """Count the examples longer than data.max_length; texts were cut to it, prompts were not."""
    if examples[0].text:
        return sum(len(tuned.tokenizer(*e.text).input_ids) > data.max_length for e in examples)
    examples = [e for e in examples if not e.whole]  # which are cut into rows
    lengths = (len(prompter.prompt_ids(e.prompt, e.tools)) + len(prompter.answer_ids(e.answer)) for e in examples)
    return sum(length > data.max_length for length in lengths)


def forgetting_rows(tuned: Tuned, spec: EvaluateSection) -> Rows:
    """Text that is not the task's: for each its tokens, and its summed loss (nats) with the base and with the adapter.

    As PEFT's method comparison measures what a run has forgotten: over whole texts, each cut to 768 tokens. Raises
    UserError for an encoder, and for records without a text.
    """
    assert spec.forgetting is not None
    if tuned.classes or (tuned.recipe is not None and tuned.recipe.model.head != "causal"):
        raise UserError("evaluate.forgetting needs a language model: an encoder has no loss on plain text.")
    longest = min(LONGEST, getattr(tuned.model.config, "max_position_embeddings", None) or LONGEST)
    texts = _encoded_texts(spec.forgetting, tuned.tokenizer, longest)
    size = spec.batch_size
    with tuned.as_variant("tuned") as model:
        after = loss_rows(model, tuned.tokenizer, texts, size)
    with tuned.as_variant("base") as model:
        before = loss_rows(model, tuned.tokenizer, texts, size)
    return [
        {"where": text.where, "tokens": b["tokens"], "base_nats": a["nats"], "nats": b["nats"]}
        for text, a, b in zip(texts, before, after, strict=True)
    ]


def forgetting_figures(rows: Rows) -> dict[str, float]:
    """forgetting: the rise of the mean loss a token, in nats. text_loss: that loss with the adapter."""
    tokens = sum(row["tokens"] for row in rows)
    after, before = (sum(row[key] for row in rows) / tokens for key in ("nats", "base_nats"))
    return {FORGETTING: after - before, "text_loss": after}


def _encoded_texts(source: str, tokenizer: Any, longest: int) -> list[Encoded]:
    """The texts of a file, every token but the first as a label; those of one token say nothing and are left out."""
    found = []
    for record in read_records(source):
        text = record.values.get("text", record.values.get("line"))
        if not isinstance(text, str):
            raise UserError(
                f"{record.where}: a text for evaluate.forgetting is missing, found "
                f"{', '.join(map(str, record.values))}; expected a field text, or a .txt file with one text a line."
            )
        ids = tokenizer(text, truncation=True, max_length=longest).input_ids
        if len(ids) > 1:
            found.append(Encoded(record.where, ids, [IGNORED, *ids[1:]]))
    if not found:
        raise UserError(f"{source} holds no text of two tokens or more.")
    return found

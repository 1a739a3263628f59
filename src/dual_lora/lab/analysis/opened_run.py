"""A run's surroundings, made again from its recipe: the model as it started, its first batches, held-out records."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dual_lora.lab.analysis.measures import squared_norm
from dual_lora.lab.analysis.updates import LayerUpdate, adapted_layers, base_matrix, snapshot
from dual_lora.lab.data.batches import collator, mean_loss
from dual_lora.lab.data.classes import classes_of
from dual_lora.lab.data.encode import IGNORED, rows_digest
from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError, damaged
from dual_lora.lab.files.folder import RunFolder, run_at
from dual_lora.lab.model.methods import apply_method, method_config
from dual_lora.lab.model.note import checked_classes
from dual_lora.lab.model.opened import Tuned, load_base
from dual_lora.lab.model.weights import weights_digest
from dual_lora.lab.read import read_object
from dual_lora.lab.recipe.schema import EvaluateSection, Recipe
from dual_lora.lab.run.evaluate import mean_losses
from dual_lora.lab.run.longer import ends_of
from dual_lora.lab.run.prepare import in_order, show_gradients, wants_gradients
from dual_lora.lab.run.resume import check_same_inputs, recipe_of_run
from dual_lora.method.layer import DualLoraLayer


@dataclass
class OpenedRun:
    """One run as it stood before its first step.

    origin: the effect at the start of layers whose base weight the method changed there (PiSSA, OLoRA); an update is
    what came since.
    """

    path: Path
    recipe: Recipe
    record: dict[str, Any]
    model: Any
    tokenizer: Any
    classes: list[str]
    origin: dict[str, LayerUpdate] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        """Whether the run trained all weights."""
        return bool(self.recipe.method["name"] == "full")

    @cached_property
    def step_batches(self) -> list[dict[str, Any]]:
        """The micro-batches of the first optimizer step, as training got them; "items" counts all their labels."""
        part, examples = self.recipe.train, load_split(self.recipe.data, "train")
        ready = in_order(
            self.recipe,
            examples,
            self.tokenizer,
            self.classes,
            _count(self.record, "processes"),
            ends_of(self.record),
        )
        check_same_inputs(RunFolder(self.path), {"rows": rows_digest(ready.rows)})
        collate = collator(self.tokenizer, bool(self.classes), self.model)
        wanted = ready.order[: ready.rows_a_step]
        spans = [wanted[i : i + part.batch_size] for i in range(0, len(wanted), part.batch_size)]
        batches = [collate([ready.rows[i] for i in span]) for span in spans]
        causal = self.recipe.model.head == "causal"  # nothing predicts the first token: Trainer does not count it
        items = sum(int(((b["labels"][:, 1:] if causal else b["labels"]) != IGNORED).sum()) for b in batches)
        return [{**batch, "items": items} for batch in batches]

    def loss_of_batch(self, model: Any, batch: dict[str, Any]) -> Tensor:
        """Training's loss of a micro-batch, divided by the step's number of labels."""
        device = next(model.parameters()).device
        inputs = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}
        items, labels = inputs.pop("items"), inputs.pop("labels")
        return mean_loss(model(**inputs), labels, items, self.recipe.train.label_smoothing)

    def held_out_loss(self, limit: int) -> Callable[[Any], float] | None:
        """A function: the model's mean loss on the first `limit` validation records, or test records if none.

        None if the recipe names neither.
        """
        data = self.recipe.data
        if not (data.validation or data.holdout or data.test or data.tests):
            return None
        split: Literal["validation", "test"] = "validation" if data.validation or data.holdout else "test"
        examples = load_split(data, split)[:limit]
        spec = EvaluateSection(split=split, batch_size=8)
        tuned = Tuned(self.model, self.tokenizer, str(self.path), self.recipe, self.classes)
        return lambda _: mean_losses(tuned, data, examples, ["tuned"], spec, progress=False)["tuned"]

    @contextmanager
    def at_full_strength(self) -> Iterator[None]:
        """Dual LoRA's layers with λ = 1, as after the warm-up."""
        layers = [m for m in adapted_layers(self.model).values() if isinstance(m, DualLoraLayer)]
        left = [m.left("default").clone() for m in layers]
        for layer in layers:
            layer.set_left("default", 0)
        try:
            yield
        finally:
            for layer, count in zip(layers, left, strict=True):
                layer.set_left("default", count)


def open_run(path: str | Path, device: str | None = None) -> OpenedRun:
    """Build a run's model as it was before its first step. Raises UserError for folders that are no runs.

    The same seed gives the same factors; the base model is read from where the recipe says.
    """
    folder = run_at(path)
    recipe = recipe_of_run(folder.path)
    record = _record(folder)
    with damaged(f"The record {folder.record}"):
        classes = checked_classes(record.get("classes") or [])
    if recipe.model.head != "causal" and not classes:
        classes = classes_of(recipe.model.head, load_split(recipe.data, "train"))
    check_same_inputs(folder, {"weights": weights_digest(recipe.model)})
    loaded = load_base(recipe.model, recipe.train.seed, len(classes) or None, device)
    config = method_config(recipe.method, recipe.model.head, _count(record, "total_steps"), loaded.fresh)
    if config is None:
        return OpenedRun(folder.path, recipe, record, loaded.model, loaded.tokenizer, classes)
    before = _sizes(loaded.model)
    if wants_gradients(config):  # those of the same first rows, or the method would start elsewhere
        ready = in_order(
            recipe,
            load_split(recipe.data, "train"),
            loaded.tokenizer,
            classes,
            _count(record, "processes"),
            ends_of(record),
        )
        collate = collator(loaded.tokenizer, bool(classes), loaded.model)
        show_gradients(loaded.model, config, ready, recipe.train.batch_size, collate)
    model = apply_method(loaded, config, recipe.model, recipe.train.seed)
    changed = {name for name, size in _sizes(model).items() if size != before.get(name, size)}
    origin = {name: found for name, found in snapshot(model).items() if name in changed}
    return OpenedRun(folder.path, recipe, record, model, loaded.tokenizer, classes, origin)


def _count(record: dict[str, Any], name: str) -> int:
    """A number of a run's record, as of the processes that trained together; 1 where it says none. Raises UserError
    for what is none."""
    value = record.get(name, 1)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(
            f"The run's record.json has {name} {value!r:.100}, expected a whole number of at least 1: take the record "
            "from a copy, or make the run again."
        )
    return value


def _sizes(model: Any) -> dict[str, float]:
    """Sum of squares of each linear layer's base weight, to notice methods that change it."""
    layers = adapted_layers(model) or {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    found = {name: base_matrix(layer) for name, layer in layers.items()}
    return {name: squared_norm(matrix) for name, matrix in found.items() if matrix is not None}


def _record(folder: RunFolder) -> dict[str, Any]:
    try:
        return read_object(folder.record)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The record {folder.record} could not be read ({error}); the run has to be made again."
        ) from None

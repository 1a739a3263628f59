"""How large is a method on a model, and which rank makes it as large as another? Counted on an empty model."""

import bisect
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.empty import adapted, count_of, empty_base, load_config, new_modules
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.recipe.schema import DataSection, ModelSection, Recipe, spelled

# The field that sets a method's size, where it is not "r".
RANK_FIELDS = {
    "adalora": "init_r",
    "fourierft": "n_frequency",
    "waveft": "n_frequency",
    "prompt_tuning": "num_virtual_tokens",
    "prefix_tuning": "num_virtual_tokens",
    "p_tuning": "num_virtual_tokens",
    "cpt": "num_virtual_tokens",
    "adaption_prompt": "adapter_len",
}
_LINEAR = ("Linear", "Conv1D")  # torch's and transformers' names
_SHAPELESS = {"ste", "magnitude_activation", "direction_activation"}  # Dual LoRA's fields that no tensor's shape needs


@dataclass(frozen=True)
class Size:
    """Parameters that train (those of a frozen group are not among them), and all of the base model's."""

    trainable: int
    base: int
    multiplied: int = 0  # weights of linear layers: what costs arithmetic; embeddings do not
    width: int = 0  # of the model


def rank_field(method: str) -> str | None:
    """The field of a method that sets its size, None if it has none."""
    from dual_lora.lab.model.methods import method_fields

    field = RANK_FIELDS.get(spelled(method), "r")
    return field if field in method_fields(method) else None


def classes_of(recipe: Recipe) -> int | None:
    """Number of classes of the recipe's training records; None for a language model."""
    from dual_lora.lab.data.encode import class_names
    from dual_lora.lab.data.examples import load_split

    if recipe.model.head != "classification":
        return 1 if recipe.model.head == "regression" else None
    return len(class_names(load_split(recipe.data, "train")))


def planned_steps(recipe: Recipe, fetch: bool = False) -> int:
    """Optimizer steps of a recipe in one process; of epochs, by the training records that data.max_length leaves.

    A text is cut for a classifier, not left out. Without the model (a plan for another machine) all records count;
    fetch: its tokenizer is fetched instead, if that is possible.
    """
    if recipe.train.steps:
        return recipe.train.steps
    part = recipe.train
    from dual_lora.lab.model.load import is_here
    from dual_lora.lab.model.weights import folder_here
    from dual_lora.lab.study.job import fingerprint

    model, held = recipe.model, tuple(fingerprint(recipe).items())
    here = fetch or is_here(model.path) or folder_here(model.path, model.revision) is not None
    by, records = model.model_dump_json() if here and model.head == "causal" else "", recipe.data.model_dump_json()
    try:
        rows = _rows(by, records, held)
    except UserError:  # of a model on the hub its configuration may be all that is here
        rows = _rows("", records, held)
    return math.ceil(rows * part.epochs / (part.batch_size * part.accumulate))


@functools.lru_cache(maxsize=64)
def _rows(model: str, data: str, held: tuple[tuple[str, str], ...]) -> int:
    """Training records that are not left out as too long; without a model, all of them.

    held: what the files hold, so that changed ones are read again.
    """
    from dual_lora.lab.data.encode import Prompter, encode_all
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.load import load_tokenizer, locate

    records = DataSection.model_validate_json(data)
    examples = load_split(records, "train")
    if not model:
        return len(examples)
    part = ModelSection.model_validate_json(model)
    tokenizer = load_tokenizer(part.path, locate(part.path, part.revision))
    return len(encode_all(examples, Prompter(tokenizer, records.template, records.learn_prompt), records.max_length)[0])


class Scale:
    """Counts methods on models; each model is built once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str | None, str, int | None], Any] = {}
        self._sizes: dict[str, Size] = {}

    def size(
        self,
        recipe: Recipe,
        classes: int | None,
        frozen: Iterable[str] = (),
        named: Mapping[str, Iterable[str]] | None = None,
    ) -> Size:
        """What would train under the recipe. frozen: regular expressions of parameters that never move.

        named: field -> its regular expressions, which have to fit a trainable parameter. Raises UserError otherwise.
        """
        from dual_lora.lab.model.methods import method_config

        still, named = list(frozen), {field: list(patterns) for field, patterns in (named or {}).items()}
        model, method = recipe.model, recipe.method
        if method["name"] == "dual_lora":
            method_config(method, model.head, recipe.train.steps or 100, [])  # is what is left out of the key right?
            method = {field: value for field, value in method.items() if field not in _SHAPELESS}
        values = [model.path, model.revision, model.head, classes, method, still, named]
        asked = json.dumps(values, sort_keys=True)
        if asked not in self._sizes:
            self._sizes[asked] = self._count(recipe, classes, still, named)
        return self._sizes[asked]

    def _count(
        self, recipe: Recipe, classes: int | None, frozen: list[str], named: Mapping[str, Iterable[str]]
    ) -> Size:
        from dual_lora.lab.run.loop import check_patterns

        part = recipe.model
        base = self._base(part, classes)
        multiplied = sum(m.weight.numel() for m in base.modules() if type(m).__name__ in _LINEAR) + _routed(base)
        fresh = new_modules(base) if part.head != "causal" else []
        model = adapted(base, recipe.method, part.head, part.path, recipe.train.steps or 100, fresh)
        for field, patterns in named.items():
            check_patterns(field, patterns, model)
        still = [Pattern(text, "freeze") for text in frozen]
        trained = ((n, p) for n, p in model.named_parameters() if p.requires_grad)
        trainable = sum(p.numel() for n, p in trained if not any(s.search(n) for s in still))
        return Size(trainable, count_of(base), multiplied, getattr(base.config.get_text_config(), "hidden_size", 0))

    def _base(self, part: ModelSection, classes: int | None) -> Any:
        key = (part.path, part.revision, part.head, classes)
        if key not in self._models:
            labels = {"num_labels": classes} if classes else {}
            self._models[key] = empty_base(load_config(part.path, part.revision, **labels), part.head, part.path)
        return self._models[key]


def _routed(base: Any) -> int:
    """Weights of experts that a token meets, where all experts of a layer are one parameter."""
    config = base.config.get_text_config()
    names = ("num_experts_per_tok", "moe_topk", "top_k_experts")
    chosen = next((value for name in names if (value := getattr(config, name, None))), 1)
    chosen = max(chosen) if isinstance(chosen, list) else chosen  # of each layer
    experts = [p for name, p in base.named_parameters() if p.ndim == 3 and ".experts." in name]
    return sum(p.numel() // p.shape[0] * min(chosen, p.shape[0]) for p in experts)


def solve_rank(size: Callable[[int], int], target: float, step: int, top: int) -> int:
    """The rank (a multiple of `step`, at most `top`) whose size is nearest to the target.

    size has to rise or fall with the rank all the way (RandLoRA's falls).
    """
    at = functools.cache(lambda multiple: size(multiple * step))
    high = max(1, top // step)
    first, slope = at(1), at(min(2, high)) - at(1)
    sign = 1 if slope >= 0 else -1

    def reached(multiple: int) -> bool:
        return multiple > 0 and (multiple > high or sign * at(multiple) >= sign * target)

    # Sizes are nearly linear in the rank, so the line through two of them almost always hits; halving never fails.
    near = min(max(1, round(1 + (target - first) / slope)), high) if slope else 1
    if at(near) == target:
        return near * step
    upper = near if reached(near) else near + 1
    if reached(upper - 1) or not reached(upper):
        upper = bisect.bisect_left(range(high + 1), True, lo=1, key=reached)
    near_ones = {1, max(1, upper - 1), min(upper, high)}
    return step * min(near_ones, key=lambda multiple: (abs(at(multiple) - target), multiple))

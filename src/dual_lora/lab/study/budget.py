"""How large is a method on a model, and which rank makes it as large as another? Counted on the meta device.

The model is built from its configuration without weights, the method is put on it by PEFT itself, and what would
train is counted: no formula of ours that could differ from what PEFT does.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.patterns import Pattern
from dual_lora.lab.recipe.schema import ModelPart, Recipe

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
# Fields that draw or decompose weights at the start: without meaning on the meta device, and without parameters.
UNCOUNTED = {"init_lora_weights": False}
_LINEAR = ("Linear", "Conv1D")  # torch's and transformers' names
_REAL_LIMIT = 1_000_000_000  # parameters up to which a model is built for real, if a method cannot start on meta


@dataclass(frozen=True)
class Size:
    """Parameters that train (those of a frozen group are not among them), and all of the base model's."""

    trainable: int
    base: int
    multiplied: int = 0  # weights of linear layers: what costs arithmetic; embeddings do not


def rank_field(method: str) -> str | None:
    """The field of a method that sets its size, None if it has none."""
    from dual_lora.lab.model.methods import method_fields

    plain = method.lower().replace("-", "_")
    field = RANK_FIELDS.get(plain, "r")
    return field if field in method_fields(method) else None


def classes_of(recipe: Recipe) -> int | None:
    """Number of classes of the recipe's training records; None for a language model."""
    from dual_lora.lab.data.encode import class_names
    from dual_lora.lab.data.examples import load_split

    if recipe.model.head != "classification":
        return 1 if recipe.model.head == "regression" else None
    return len(class_names(load_split(recipe.data, "train")))


class Scale:
    """Counts methods on models; each model is built once."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str, int | None], Any] = {}
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
        still, named = list(frozen), {field: list(patterns) for field, patterns in (named or {}).items()}
        model = recipe.model
        asked = json.dumps([model.path, model.head, classes, recipe.method, still, named], sort_keys=True)
        if asked not in self._sizes:
            self._sizes[asked] = self._count(recipe, classes, still, named)
        return self._sizes[asked]

    def _count(
        self, recipe: Recipe, classes: int | None, frozen: list[str], named: Mapping[str, Iterable[str]]
    ) -> Size:
        from dual_lora.lab.model.methods import method_config
        from dual_lora.lab.run.loop import check_patterns

        base = self._base(recipe.model, classes)
        total = _numbers_in(base)
        multiplied = sum(m.weight.numel() for m in base.modules() if type(m).__name__ in _LINEAR)
        method = {k: UNCOUNTED.get(k, v) for k, v in recipe.method.items()}
        steps = recipe.train.steps or 100
        config = method_config({**method, **_counting(str(method["name"]))}, recipe.model.head, steps, [])
        adapted = base if config is None else adapted_model(recipe, base, config)
        for field, patterns in named.items():
            check_patterns(field, patterns, adapted)
        still = [Pattern(text, "freeze") for text in frozen]
        trained = ((n, p) for n, p in adapted.named_parameters() if p.requires_grad)
        return Size(sum(p.numel() for n, p in trained if not any(s.search(n) for s in still)), total, multiplied)

    def _base(self, part: ModelPart, classes: int | None) -> Any:
        key = (part.path, part.head, classes)
        if key not in self._models:
            self._models[key] = empty_model(part, classes)
        return self._models[key]


def adapted_model(recipe: Recipe, base: Any, config: Any) -> Any:
    """A copy of an empty model with the recipe's method on it, on the meta device where the method allows that.

    Raises UserError when the method does not fit the model.
    """
    import torch
    from peft import get_peft_model

    from dual_lora.lab.model.bounds import check_config

    check_config(config, base, f"The method {recipe.method['name']}")
    try:
        with torch.device("meta"):
            return get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True)
    except Exception as on_meta:  # some methods look at values when they start, which meta tensors have not
        if _numbers_in(base) > _REAL_LIMIT:
            raise _misfit(recipe, on_meta) from on_meta
    try:
        real = copy.deepcopy(base).to_empty(device="cpu")
        for tensor in real.parameters():
            torch.nn.init.normal_(tensor, std=0.02)
        return get_peft_model(real, config)
    except Exception as error:
        raise _misfit(recipe, error) from error


def _misfit(recipe: Recipe, error: Exception) -> UserError:
    message = " ".join(str(error).split())
    return UserError(f"The method {recipe.method['name']} does not fit {recipe.model.path}: {message}")


def _numbers_in(model: Any) -> int:
    return sum(p.numel() for p in model.parameters())


def _counting(method: str) -> dict[str, Any]:
    """Settings under which an alias that decomposes weights at the start can be counted."""
    return {"init_lora_weights": False} if method.lower() in ("pissa", "olora", "lora_ga") else {}


def empty_model(part: ModelPart, classes: int | None) -> Any:
    """The model of a recipe without weights, on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    from dual_lora.lab.model.load import locate, quiet
    from dual_lora.lab.recipe.published import known_name, published_config

    more = {"num_labels": classes} if classes else {}
    try:
        with quiet():
            if known_name(part.path) and not Path(part.path).exists():  # written down in code: nothing is fetched
                config = published_config(part.path, **more)
            else:
                place = locate(part.path)
                config = AutoConfig.from_pretrained(place.name, **place.arguments(), **more)
    except (OSError, ValueError) as error:
        raise UserError(
            f"The configuration of {part.path!r} could not be read: {str(error).splitlines()[0]}"
        ) from error
    factory: Any = AutoModelForCausalLM if part.head == "causal" else AutoModelForSequenceClassification
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        return factory.from_config(config)


def solve_rank(size: Callable[[int], int], target: float, step: int, top: int) -> int:
    """The rank (a multiple of `step`, at most `top`) whose size is nearest to the target.

    size has to rise or fall with the rank all the way (RandLoRA's falls).
    """
    known: dict[int, int] = {}

    def at(multiple: int) -> int:
        rank = multiple * step
        if rank not in known:
            known[rank] = size(rank)
        return known[rank]

    low, upper, high = 1, None, max(1, top // step)
    rising = at(min(2, high)) >= at(1)
    guess = _crossing(1, at(1), min(2, high), at(min(2, high)), target)
    while low < high and (upper is None or upper - low > 1):
        # Sizes are nearly linear in the rank, so the line through two of them almost always hits; halving never fails.
        middle = (low + (upper or high)) // 2 if len(known) > 8 else guess
        at_most = high if upper is None else upper - 1
        tried = min(max(middle, low + 1), at_most)
        if (at(tried) < target) == rising:
            low = tried
        else:
            upper = tried
        guess = _crossing(1, at(1), tried, at(tried), target)
    return min(known, key=lambda rank: (abs(known[rank] - target), rank))


def _crossing(a: int, size_a: int, b: int, size_b: int, target: float) -> int:
    """Where the line through two sizes meets the target."""
    return b if size_a == size_b else round(a + (target - size_a) * (b - a) / (size_b - size_a))

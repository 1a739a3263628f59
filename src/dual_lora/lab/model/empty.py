"""The one way to build a model without weights: tensors that have shapes and no data.

transformers and PEFT themselves build it on the meta device, so no formula of ours counts its parameters. To simulate a
step (`lab/cost`) it becomes fake CPU tensors, on which operators choose their kernels as on real ones: a meta tensor
would get the slow attention that keeps every score.
"""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.errors import UserError, described, memory_full
from dual_lora.lab.read import expanded
from dual_lora.lab.recipe.schema import method_in

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses import FakeTensorMode
    from transformers import PreTrainedConfig

    from dual_lora.lab.model.location import Location
    from dual_lora.lab.recipe.schema import Recipe

_AT_START = ("pissa", "olora", "lora_ga")  # aliases of LoRA that decompose weights before the first step
_REAL_LIMIT = 1_000_000_000  # parameters up to which a model is built for real, if a method cannot start on meta


def load_config(path: str, revision: str | None = None, **more: Any) -> PreTrainedConfig:
    """The configuration of the model at `path`; of a published name nothing is fetched. more: values laid over it.

    path: a folder, its config.json, a GGUF file, package:NAME, or a name that is published or on the hub.
    """
    from transformers import AutoConfig

    from dual_lora.lab.model.load import quiet
    from dual_lora.lab.model.location import Location, check_settings, locate
    from dual_lora.lab.model.own_code import own_code_hint, unasked
    from dual_lora.lab.recipe.published import known_name, published_config

    here = expanded(path, "model")
    try:
        with quiet(), unasked():
            if known_name(path) and not here.exists():
                return published_config(path, **more)
            location = Location(str(here)) if here.name == "config.json" else locate(path, revision)
            if location.gguf_file:
                file = Path(location.name, location.gguf_file).stat()
                return copy.deepcopy(_gguf_config(location, (file.st_size, file.st_mtime_ns), **more))
            check_settings(location)
            config: PreTrainedConfig = AutoConfig.from_pretrained(location.name, **location.arguments(), **more)
            return config
    except Exception as error:  # readers of foreign files raise whatever comes: struct.error, KeyError
        if isinstance(error, UserError) or memory_full(error):
            raise
        raise UserError(
            f"The configuration of {path!r} could not be read: {described(error, Exception, lines=1)}"
            f"{own_code_hint(error)}"
        ) from error


@functools.lru_cache(maxsize=4)
def _gguf_config(location: Location, stamp: tuple[int, int], **more: Any) -> PreTrainedConfig:
    """Read the configuration in a GGUF file that is as large and as old as `stamp` says: its whole vocabulary is read
    each time (seconds)."""
    from transformers import AutoConfig

    from dual_lora.lab.model.load import quick_reading

    with quick_reading(location):
        config: PreTrainedConfig = AutoConfig.from_pretrained(location.name, **location.arguments(), **more)
    return config


def shortened(config: Any, layers: int | None) -> Any:
    """A copy of the configuration with so many blocks."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def empty_base(config: Any, head: str, name: str, dtype: str = "float32", attention: str | None = None) -> Any:
    """The untrained model on the meta device. name: how errors call it. Raises UserError where it lacks the head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from dual_lora.lab.model.load import gather_for_head, quiet
    from dual_lora.lab.model.own_code import own_code, own_code_hint, unasked

    factory: Any = AutoModelForCausalLM if head == "causal" else AutoModelForSequenceClassification
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet(), unasked(), torch.device("meta"):
        try:
            base = factory.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention, **own_code())
        except (ValueError, KeyError) as error:
            why = f"{described(error, Exception, lines=1)}{own_code_hint(error)}"
            raise UserError(f"{name} has no {head} head: {why}") from error
    gather_for_head(base)
    return base


def adapted(
    base: Any, method: dict[str, Any], head: str, name: str, steps: int = 100, fresh: Sequence[str] = ()
) -> Any:
    """A copy of an empty model with a recipe's method on it; the model itself for full fine-tuning.

    On the meta device where the method allows that, else on the CPU. Raises UserError where it does not fit.
    """
    import torch
    from peft import get_peft_model

    from dual_lora.lab.model.bounds import check_config
    from dual_lora.lab.model.load import quiet
    from dual_lora.lab.model.methods import fuse_if_requested, method_config

    config = method_config(_without_start(method), head, steps, list(fresh))
    if config is None:
        return base
    check_config(config, base, f"The method {method['name']}")
    with quiet():
        try:
            with torch.device("meta"):
                return fuse_if_requested(get_peft_model(copy.deepcopy(base), config, low_cpu_mem_usage=True), config)
        except Exception as on_meta:  # some methods look at values when they start, which meta tensors have not
            if count_of(base) > _REAL_LIMIT:
                raise _misfit(method, name, on_meta) from on_meta
        try:
            real = copy.deepcopy(base).to_empty(device="cpu")
            for tensor in real.parameters():
                torch.nn.init.normal_(tensor, std=0.02)
            return fuse_if_requested(get_peft_model(real, config), config)
        except Exception as error:
            raise _misfit(method, name, error) from error


def _without_start(method: dict[str, Any]) -> dict[str, Any]:
    """The method without a start that draws or decomposes weights, which an empty model has not."""
    starts = "init_lora_weights" in method or method_in(method) in _AT_START
    return {**method, "init_lora_weights": False} if starts else method


def _misfit(method: dict[str, Any], name: str, error: Exception) -> UserError:
    return UserError(f"The method {method['name']} does not fit {name}: {described(error, Exception)}")


def new_modules(model: Any) -> list[str]:
    """Modules of a classifier's head, which a pretrained checkpoint does not hold."""
    body = model.base_model_prefix + "."
    return sorted(
        name
        for name, m in model.named_modules()
        if not (name + ".").startswith(body) and list(m.parameters(recurse=False))
    )


def count_of(model: Any) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class Fit:
    """Adapted layers by the last part of their name, and numbers of parameters (a fresh head is trained too)."""

    layers: dict[str, int]
    trainable: int
    all_parameters: int


def fit(recipe: Recipe, classes: int = 2) -> Fit:
    """Put the recipe's method on its empty model. classes: of a classification head, which the data would tell.

    Raises UserError for a model whose configuration is not known here, for a method that does not fit, and for a name
    among the target modules that no layer has.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    from dual_lora.lab.model.methods import missing_targets

    part, method = recipe.model, recipe.method
    labels = {"classification": {"num_labels": classes}, "regression": {"num_labels": 1}}.get(part.head, {})
    base = empty_base(load_config(part.path, part.revision, **labels), part.head, part.path)
    fresh = new_modules(base) if part.head != "causal" else []
    model = adapted(base, method, part.head, part.path, recipe.train.steps or 1000, fresh)
    names = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if idle := missing_targets(method.get("target_modules"), names):
        raise UserError(f"{part.path} has no layer {', '.join(idle)} (method.target_modules).")
    layers = dict(Counter(name.rpartition(".")[2] for name in names))
    return Fit(layers, sum(p.numel() for p in model.parameters() if p.requires_grad), count_of(model))


def become_fake(model: nn.Module, mode: FakeTensorMode) -> None:
    """Turn every parameter, buffer and strength into a fake CPU tensor, in place; tied ones stay tied.

    The count of warm-up steps stays on the meta device: a layer reads it where it can, and no product uses it.
    """
    import torch
    from torch._subclasses import FakeTensor

    made: dict[int, Any] = {}

    def fake(tensor: Any) -> Any:
        if id(tensor) not in made:
            data: Any = FakeTensor(mode, tensor.detach().to("meta"), torch.device("cpu"))
            if isinstance(tensor, torch.nn.Parameter):
                data = torch.nn.Parameter(data, requires_grad=tensor.requires_grad)
            made[id(tensor)] = data
            made[id(data)] = data
        return made[id(tensor)]

    kept = []  # the replaced tensors, so that no identity is used twice
    for name, module in model.named_modules():
        for tensors in (module._parameters, module._buffers, getattr(module, "dual_lora_scale", {})):
            for key, tensor in list(tensors.items()):
                if tensor is not None and not name.endswith(("dual_lora_left", "dual_lora_seed")):
                    kept.append(tensor)
                    tensors[key] = fake(tensor)
        frozen = getattr(module, "dual_lora_keys", {})
        for key, made_of in list(frozen.items()):
            kept.extend(made_of[:2])
            frozen[key] = made_of._replace(C=fake(made_of.C), D=fake(made_of.D))

"""A model with its method, as tensors that have shapes and no data.

Built on the meta device by transformers and PEFT themselves, then turned into fake CPU tensors, on which operators
choose their kernels as on real ones (a meta tensor would get the slow attention that keeps every score).
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.study.budget import UNCOUNTED

if TYPE_CHECKING:
    from torch import nn
    from torch._subclasses import FakeTensorMode

    from dual_lora.lab.cost.options import Setting

# A GPU's fused attention drops inside; the CPU's, which is simulated, would fall back to keeping every score.
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


def empty_model(setting: Setting, layers: int | None = None) -> nn.Module:
    """The adapted model on the meta device, in training mode. layers: only so many of its blocks.

    Raises UserError where the method does not fit the model.
    """
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    from dual_lora.lab.model.bounds import check_config
    from dual_lora.lab.model.load import gather_for_head, quiet
    from dual_lora.lab.model.methods import method_config

    config = shortened(setting.config, layers)
    _prepare(config, setting)
    factory: Any = AutoModelForCausalLM
    if setting.head == "classification":
        factory, config.num_labels = AutoModelForSequenceClassification, setting.classes
    with quiet(), torch.device("meta"):
        try:
            base = factory.from_config(
                config, dtype=getattr(torch, setting.dtype), attn_implementation=setting.attention
            )
        except (ValueError, KeyError) as error:
            raise UserError(f"{setting.name} has no {setting.head} head: {str(error).splitlines()[0]}") from error
        gather_for_head(base)
        method = {k: UNCOUNTED.get(k, v) for k, v in setting.method.items()}
        adapter = method_config(method, setting.head, 100, _fresh(base) if setting.head == "classification" else [])
        if adapter is None:
            return base.train()
        check_config(adapter, base, "method")
        try:
            return get_peft_model(base, adapter, low_cpu_mem_usage=True).train()
        except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
            message = " ".join(str(error).split())
            raise UserError(f"The method {method['name']} does not fit {setting.name}: {message}") from error


def shortened(config: Any, layers: int | None) -> Any:
    """A copy of the configuration with so many blocks."""
    config = copy.deepcopy(config)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config


def _prepare(config: Any, setting: Setting) -> None:
    config.use_cache = False  # as Trainer sets it
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if setting.on == "gpu":
        for name in _ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
    if hasattr(config, "num_experts"):  # the loop over experts looks at the routing, which empty tensors do not have
        config._experts_implementation = "grouped_mm"


def _fresh(model: Any) -> list[str]:
    """Modules of the head, which a pretrained checkpoint does not hold."""
    body = model.base_model_prefix + "."
    return sorted(
        name
        for name, m in model.named_modules()
        if not (name + ".").startswith(body) and list(m.parameters(recurse=False))
    )


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
                if tensor is not None and not name.endswith("dual_lora_left"):
                    kept.append(tensor)
                    tensors[key] = fake(tensor)

"""A method of the user's own, which registers itself with PEFT: each layer's output is shifted by a trained bias."""

from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method

from dual_lora.method.registration import add_peft_type


class ShiftLayer(torch.nn.Module, BaseTunerLayer):
    adapter_layer_names = ("shift_bias",)

    def __init__(self, base, name):
        super().__init__()
        self.base_layer, self._active_adapter, self._disable_adapters, self.merged_adapters = base, name, False, []
        self.shift_bias = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.zeros(base.out_features))})

    def forward(self, x, *args, **kwargs):
        y = self.base_layer(x, *args, **kwargs)
        return y if self.disable_adapters else y + sum(self.shift_bias[name] for name in self.active_adapters)


class ShiftModel(BaseTuner):
    prefix, tuner_layer_cls, target_module_mapping = "shift_", ShiftLayer, {}

    def _create_and_replace(self, config, name, target, target_name, parent, **_):
        self._replace_module(parent, target_name, ShiftLayer(target, name), target)


add_peft_type("SHIFT")


@dataclass
class ShiftConfig(PeftConfig):
    target_modules: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = PeftType.SHIFT


register_peft_method(name="shift", config_cls=ShiftConfig, model_cls=ShiftModel)

"""Experts that transformers 5 has in one parameter, under the names that their layers had before.

`target_modules=["gate_proj", "up_proj", "down_proj"]`, Mixtral's "w1", "w2" and "w3", and "all-linear" mean the experts
too. PEFT turns these names to the parameters for LoRA alone, so here it is asked as for LoRA.
"""

import copy
from typing import Any

from peft.utils import PeftType
from torch import nn

from .lora_fields import note_alphas

READ = "_read_from_file"  # whether a configuration is that of a saved adapter, which names what it has


def target_fused_experts(config: Any, model: nn.Module) -> None:
    """Name the parameters in `target_parameters`, in place, as PEFT does it. Two fused matrices have twice the rank.

    A saved adapter keeps what it was trained with.
    """
    if vars(config).get(READ) or not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    asked = copy.copy(config)
    vars(asked).update(peft_type=PeftType.LORA, rank_pattern={}, alpha_pattern={})
    convert_peft_config_for_transformers(asked, model=model, conversions=None)
    if not asked.target_parameters or asked.target_parameters == config.target_parameters:
        return
    vars(config).update(target_modules=asked.target_modules, target_parameters=sorted(asked.target_parameters))
    for pattern, rank in asked.rank_pattern.items():
        times = rank // config.r
        config.rank_pattern[pattern] = times * config.r1 if config.one_group else [times * config.r1, times * config.r2]
        if config.alpha is not None:  # the default follows each layer's ranks
            config.alpha_pattern[pattern] = times * config.alpha
    note_alphas(config)

"""vLLM's loader `dual_lora`: the base model's weights with an adapter composed in.

`vllm serve BASE --load-format dual_lora --model-loader-extra-config '{"adapter": "runs/mine/adapter"}'`. vLLM finds
`register` through its entry point `vllm.general_plugins`, in each of its processes. With several devices each process
composes whole weights and keeps its part.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

LOAD_FORMAT, KEY = "dual_lora", "adapter"


def register() -> None:
    """Tell vLLM of the loader. Called in each process; several times do no harm."""
    from vllm.model_executor.model_loader import get_model_loader, register_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    class ComposingModelLoader(DefaultModelLoader):
        """vLLM's own loader, which composes on the way from the file to the model."""

        def __init__(self, load_config: Any):
            extra = dict(load_config.model_loader_extra_config)
            self.adapter = extra.pop(KEY, None)
            if self.adapter is not None and not isinstance(self.adapter, str):
                raise ValueError(f"{KEY} is {self.adapter!r}, expected an adapter's folder.")
            super().__init__(dataclasses.replace(load_config, load_format="auto", model_loader_extra_config=extra))

        def get_all_weights(self, model_config: Any, model: Any) -> Iterator[Any]:
            from .compose import ComposedWeights

            weights = super().get_all_weights(model_config, model)
            if self.adapter is None:
                return weights
            device = next((p.device for p in model.parameters()), "cpu")
            composed = ComposedWeights(copy.deepcopy(model_config.hf_config), self.adapter, device)
            return composed.stream(weights)

    try:
        from vllm.config.load import LoadConfig

        get_model_loader(LoadConfig(load_format=LOAD_FORMAT))
    except ValueError:
        register_model_loader(LOAD_FORMAT)(ComposingModelLoader)

"""Names that need no library: PEFT's methods under other names, and the fields of a method that a recipe never sets."""

from typing import Any

# Methods that PEFT offers as a setting of another one.
ALIASES: dict[str, dict[str, Any]] = {
    "dora": {"name": "lora", "use_dora": True},
    "rslora": {"name": "lora", "use_rslora": True},
    "pissa": {"name": "lora", "init_lora_weights": "pissa"},
    "olora": {"name": "lora", "init_lora_weights": "olora"},
    "lora_ga": {"name": "lora", "init_lora_weights": "lora_ga", "lora_ga_config": {}},
}

# Filled in by the laboratory.
OURS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "inference_mode",
    "auto_mapping",
    "peft_version",
    "revision",
}

# Methods with one field more, `fused`: their product may be computed as Dual LoRA's is.
FUSED = frozenset({"hira", "loha"})

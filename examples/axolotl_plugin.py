"""Axolotl: this file on PYTHONPATH, `plugins: [axolotl_plugin.DualLoraPlugin]` and `adapter: dual_lora` in its YAML.

`lora_r`, `lora_alpha`, `lora_dropout`, `lora_target_modules`, `lora_target_linear` and `lora_model_dir` mean what they
mean for LoRA. `dual_lora:` takes any other option of DualLoraConfig, for example `dual_lora: {ste: surrogate}`.
"""

from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftModel, get_peft_model
from pydantic import BaseModel, Field

from dual_lora import DualLoraConfig, VerifyAdapter


class DualLoraArgs(BaseModel):
    """What the plugin adds to Axolotl's configuration."""

    dual_lora: dict = Field(default_factory=dict, description="Options of DualLoraConfig.")


class DualLoraPlugin(BasePlugin):
    """Adds the adapter that `adapter: dual_lora` asks for."""

    def get_input_args(self):
        return "axolotl_plugin.DualLoraArgs"

    def get_adapter_capabilities(self):
        return [AdapterCapabilities(name="dual_lora")]

    def load_adapter(self, model, cfg, inference=False, config_only=False):
        if cfg.adapter != "dual_lora":
            return None
        options = {
            "r": cfg.lora_r,
            "lora_alpha": cfg.lora_alpha,
            "dropout": cfg.lora_dropout or 0.0,
            "target_modules": "all-linear" if cfg.lora_target_linear else cfg.lora_target_modules,
            "modules_to_save": cfg.lora_modules_to_save or None,
            "task_type": "CAUSAL_LM",
        }
        config = DualLoraConfig(**(options | dict(cfg.dual_lora or {})))
        if config_only:
            return None, config
        if cfg.lora_model_dir:
            return PeftModel.from_pretrained(model, cfg.lora_model_dir, is_trainable=not inference), config
        return get_peft_model(model, config), config

    def add_callbacks_pre_trainer(self, cfg, model):
        return [VerifyAdapter()]  # warns where an adapter does not learn, or is another one when it is loaded anew

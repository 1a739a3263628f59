"""LLaMA-Factory on an adapter made beforehand: `python examples/llama_factory.py train.yaml`.

LLaMA-Factory makes LoRA and OFT adapters only, but continues whatever PEFT can load. So this makes the untrained
adapter, names it in the arguments (`adapter_name_or_path`) and hands over to `llamafactory-cli train`. `VerifyAdapter`
warns where an adapter does not learn, or is another one when it is loaded anew.
"""

from pathlib import Path

import yaml
from peft import get_peft_model
from transformers import AutoModelForCausalLM

from dual_lora import DualLoraConfig, VerifyAdapter

CARRIED = {"lora_target", "lora_rank", "lora_alpha", "lora_dropout"}
# Of LLaMA-Factory's options for LoRA, those that say nothing of the adapter that is made here.
OTHERS = {"additional_target", "use_rslora", "use_dora", "pissa_init", "loraplus_lr_ratio", "create_new_adapter"}


def start(arguments: dict, folder: Path) -> dict:
    """Save an untrained adapter in `folder`; the arguments that make LLaMA-Factory train it."""
    unknown = sorted(name for name in OTHERS & arguments.keys() if arguments[name])
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: not carried over to the adapter made here, which knows {sorted(CARRIED)}."
        )
    base = AutoModelForCausalLM.from_pretrained(arguments["model_name_or_path"])
    targets = arguments.get("lora_target", "all")
    config = DualLoraConfig(
        r=arguments.get("lora_rank", 8),
        lora_alpha=arguments.get("lora_alpha"),
        dropout=arguments.get("lora_dropout", 0.0),
        target_modules="all-linear" if targets == "all" else [name.strip() for name in targets.split(",")],
        task_type="CAUSAL_LM",
    )
    get_peft_model(base, config).save_pretrained(folder)
    return {**arguments, "finetuning_type": "lora", "adapter_name_or_path": str(folder)}


def main(arguments: Path, folder: Path = Path("runs/llama-factory-start")) -> None:
    """Train with the arguments of a YAML file."""
    from llamafactory.train.tuner import run_exp

    run_exp(start(yaml.safe_load(arguments.read_text()), folder), callbacks=[VerifyAdapter()])


if __name__ == "__main__":
    import cyclopts  # LLaMA-Factory does not bring it

    cyclopts.run(main, result_action="return_value")

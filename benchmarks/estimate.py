"""Estimates beside measurements: the peak memory of real training runs, each in a fresh process on one thread.

    python -m benchmarks estimate

The runs are shipped recipes for two steps. Measured is what the resident memory has grown by at the highest moment of
the second one, and the weights that stood before; estimated is the same step by
`dual_lora.lab.estimate`. growth leaves the weights out of both. The gate: 15 % on the whole.

glibc keeps freed blocks in its heap when they are smaller than a threshold that grows with use, up to 32 MiB. The
gated runs fix it (MALLOC_MMAP_THRESHOLD_), so that freed memory is returned, as a GPU's allocator would report it; a
run called "ordinary" shows what the habit costs, without a gate.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from . import ledger

AT_MOST = 0.15
STEPS = 2
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # bytes: glibc's own starting value
ORDINARY = "ordinary"
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "SmolLM2-135M bf16, Dual LoRA, returned": ("arc-easy-smollm2", {"method": {"name": "dual_lora", "r": 16}}),
    "SmolLM2-135M bf16, PEFT LoRA": ("arc-easy-smollm2", {"method": {"name": "lora", "r": 16}}),
    "MiniLM fp32, full": ("sst2-minilm", {"method": {"name": "full"}}),
    "MiniLM fp32, Dual LoRA": ("sst2-minilm", {"method": {"name": "dual_lora", "r": 16}}),
    "SmolLM2-135M bf16, Dual LoRA, checkpointing": (
        "arc-easy-smollm2",
        {"method": {"name": "dual_lora", "r": 16}, "train": {"gradient_checkpointing": True}},
    ),
    f"SmolLM2-135M bf16, Dual LoRA, {ORDINARY}": ("arc-easy-smollm2", {"method": {"name": "dual_lora", "r": 16}}),
}


def run(only: list[str], write: bool) -> int:
    """Measure and estimate every run, print the table, append to the ledger; 1 where the gate is missed."""
    source, missed = ledger.provenance(), False
    print(f"{'run':46} {'batch':>9} {'estimated':>10} {'measured':>10} {'error':>7} {'growth':>17} {'s/step':>13}")
    for name in RUNS:
        if only and not any(word in name for word in only):
            continue
        found = _child(name)
        error = found["estimated"] / found["measured"] - 1
        growth = [(found[k] - found["weights"]) / 1e6 for k in ("estimated", "measured")]
        seconds = f"{found['estimated_seconds'] or 0:.2f} / {found['measured_seconds']:.2f}"
        print(
            f"{name:46} {found['batch']:>3}×{found['length']:<5} {found['estimated'] / 1e6:>7.0f} MB "
            f"{found['measured'] / 1e6:>7.0f} MB {error:>+7.1%} {growth[0]:>7.0f} / {growth[1]:<7.0f} {seconds:>13} "
            f"{'–' if ORDINARY in name else '✓' if abs(error) <= AT_MOST else '✗'}",
            flush=True,
        )
        missed |= abs(error) > AT_MOST and ORDINARY not in name
        if write:
            what = {"kind": "estimate", "work": name, "threads": 1, "subject": "estimated", "against": "measured"}
            ledger.append([{**source, **what, "unit": "bytes", "ratio": round(1 + error, 4), **found}])
    return int(missed)


def _child(name: str) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **({} if ORDINARY in name else RETURNED)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.estimate", name],
        cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.estimate {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str) -> dict[str, Any]:
    """Train the run in this process and estimate it afterwards."""
    from transformers import TrainerCallback

    from dual_lora.lab.recipe import read_recipe
    from dual_lora.lab.train import run as train

    from .child import reset_peak, resident

    shipped, changes = RUNS[name]
    recipe = read_recipe(shipped, {**changes, "train": {"steps": STEPS, **changes.get("train", {})}})
    seen: dict[str, Any] = {"shapes": []}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for tensor in model.parameters():
                tensor.detach().float().sum()  # pages of a mapped file become resident
            seen["weights"] = sum({t.data_ptr(): t.nbytes for t in model.parameters()}.values())
            model.register_forward_pre_hook(self.shape, with_kwargs=True)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind would hide a part of the growth
            seen["before"] = resident()[0]

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["shapes"].clear()  # of the last step, which has the optimizer's state as every later one would
            reset_peak()

        def shape(self, model: Any, args: Any, kwargs: Any) -> None:
            seen["shapes"].append((kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep")))

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            seen["peak"] = resident()[1]

    with tempfile.TemporaryDirectory() as folder:
        result = train(recipe, Path(folder) / "run", progress=False, callbacks=[Watch()])
    ((length, logits),) = seen["shapes"]
    measured = seen["peak"] - seen["before"] + seen["weights"]
    estimated, seconds = _estimated(recipe, length, logits)
    return {
        "batch": recipe.train.batch_size,
        "length": length,
        "logits": logits,
        "weights": seen["weights"],
        "measured": measured,
        "estimated": round(estimated),
        "measured_seconds": round(result.seconds / result.steps, 4),
        "estimated_seconds": seconds,
    }


def _estimated(recipe: Any, length: int, logits: int | None) -> tuple[float, float | None]:
    from dual_lora.lab.estimate.calibrate import known_rates, seconds_of
    from dual_lora.lab.estimate.memory import memory_of
    from dual_lora.lab.estimate.setting import from_recipe
    from dual_lora.lab.estimate.simulate import simulate

    setting = from_recipe(recipe, length=length, logits=logits)
    step, rates = simulate(setting), known_rates()
    return memory_of(setting, step).peak, seconds_of(setting, step, rates) if rates else None


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))

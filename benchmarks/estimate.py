"""Estimates against measurements: peak memory and time of real training runs, each in a fresh process on one thread.

    python -m benchmarks estimate [--only "seconds: MiniLM,memory with"]

Memory. The runs are shipped recipes for two steps. Measured is what the resident memory has grown by at the highest
moment of the second one, and the weights that stood before; estimated is the same step by
`dual_lora.lab.cost`. growth leaves the weights out of both. The gate: 15 % on the whole.

glibc keeps freed blocks in its heap when they are smaller than a threshold that grows with use, up to 32 MiB. The
gated runs fix it (MALLOC_MMAP_THRESHOLD_), so that freed memory is returned, as a GPU's allocator would report it; a
run called "ordinary memory" shows what that costs, without a gate.

Time. The same recipes for a few steps with an ordinary heap (returning memory costs page faults). Measured is the
processor time of all steps but the first, which neighbours on the machine disturb through the caches alone; estimated
is the same steps, each at its own length, by the rates of `dual-lora estimate --calibrate`, which is run first. No
gate: a rate is good to what the machine does twice.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import ledger

AT_MOST = 0.15
STEPS = 2
TIMED_STEPS = 5
RETURNED = {"MALLOC_MMAP_THRESHOLD_": "131072"}  # bytes: glibc's own starting value
MEMORY, ORDINARY, SECONDS = "memory", "ordinary", "seconds"
_DUAL, _LORA, _FULL = {"name": "dual_lora", "r": 16}, {"name": "lora", "r": 16}, {"name": "full"}
_AGAIN = {"train": {"gradient_checkpointing": True}}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{MEMORY}: SmolLM2-135M bf16 Dual LoRA": ("arc-easy-smollm2", {"method": _DUAL}),
    f"{MEMORY}: SmolLM2-135M bf16 PEFT LoRA": ("arc-easy-smollm2", {"method": _LORA}),
    f"{MEMORY}: MiniLM fp32 full": ("sst2-minilm", {"method": _FULL}),
    f"{MEMORY}: MiniLM fp32 Dual LoRA": ("sst2-minilm", {"method": _DUAL}),
    f"{MEMORY} with checkpointing: SmolLM2-135M bf16 Dual LoRA": ("arc-easy-smollm2", {"method": _DUAL, **_AGAIN}),
    f"{MEMORY} with checkpointing: SmolLM2-135M bf16 PEFT LoRA": ("arc-easy-smollm2", {"method": _LORA, **_AGAIN}),
    f"{ORDINARY} {MEMORY}: SmolLM2-135M bf16 Dual LoRA": ("arc-easy-smollm2", {"method": _DUAL}),
    f"{SECONDS}: SmolLM2-135M bf16 Dual LoRA": ("arc-easy-smollm2", {"method": _DUAL}),
    f"{SECONDS}: SmolLM2-135M bf16 PEFT LoRA": ("arc-easy-smollm2", {"method": _LORA}),
    f"{SECONDS}: MiniLM fp32 Dual LoRA": ("sst2-minilm", {"method": _DUAL}),
    f"{SECONDS}: MiniLM fp32 PEFT LoRA": ("sst2-minilm", {"method": _LORA}),
    f"{SECONDS}: MiniLM fp32 full": ("sst2-minilm", {"method": _FULL}),
}


def run(only: list[str], write: bool) -> int:
    """Measure and estimate every run, print the table, append to the ledger; 1 where the gate is missed."""
    source, missed = ledger.provenance(), False
    names = [name for name in RUNS if not only or any(word in name for word in only)]
    if any(name.startswith(SECONDS) for name in names):
        print("calibrating (a minute)", file=sys.stderr)
        _child("calibrate")
    print(f"{'run':58} {'batch':>9} {'estimated':>10} {'measured':>10} {'error':>7}   {'growth':>13}")
    for name in names:
        found = _child(name)
        error = found["estimated"] / found["measured"] - 1
        timed, gated = name.startswith(SECONDS), name.startswith(MEMORY)
        if timed:
            figures, growth = [f"{found[k]:.2f} s " for k in ("estimated", "measured")], ""
        else:
            figures = [f"{found[k] / 1e6:.0f} MB" for k in ("estimated", "measured")]
            growth = " / ".join(f"{(found[k] - found['weights']) / 1e6:.0f}" for k in ("estimated", "measured"))
        print(
            f"{name:58} {found['batch']:>3}×{found['length']:<5} {figures[0]:>10} {figures[1]:>10} {error:>+7.1%}   "
            f"{growth:>13} {'–' if not gated else '✓' if abs(error) <= AT_MOST else '✗'}",
            flush=True,
        )
        missed |= abs(error) > AT_MOST and gated
        if write:
            what = {"kind": "estimate", "work": name, "threads": 1, "subject": "estimated", "against": "measured"}
            unit = "s" if timed else "bytes"
            ledger.append([{**source, **what, "unit": unit, "ratio": round(1 + error, 4), **found}])
    return int(missed)


def _child(name: str) -> dict[str, Any]:
    heap = RETURNED if name.startswith(MEMORY) else {}
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **heap}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.estimate", name],
        cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.estimate {name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str) -> dict[str, Any]:
    """Train the run in this process and estimate it afterwards; "calibrate" measures the machine."""
    if name == "calibrate":
        return _rates()
    return _measure_seconds(name) if name.startswith(SECONDS) else _measure_bytes(name)


def _rates() -> dict[str, Any]:
    from dual_lora.lab.cost.calibrate import calibrate

    return calibrate()


class _Seen:
    """What every run tells: the shape of each batch of the present step."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, int | None]] = []

    def watch(self, model: Any) -> None:
        model.register_forward_pre_hook(self._shape, with_kwargs=True)

    def _shape(self, model: Any, args: Any, kwargs: Any) -> None:
        self.shapes.append((kwargs["input_ids"].shape[1], kwargs.get("logits_to_keep")))


def _train(name: str, steps: int, callback: Any) -> Any:
    """The recipe of a run, trained for so many steps."""
    from dual_lora.lab.recipe.read import read_recipe
    from dual_lora.lab.run.train import run as train

    shipped, changes = RUNS[name]
    dtype = "bfloat16" if "bf16" in name else "float32"  # as its name says, wherever it runs
    recipe = read_recipe(
        shipped, {**changes, "model": {"dtype": dtype}, "train": {"steps": steps, **changes.get("train", {})}}
    )
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder) / "run", progress=False, callbacks=[callback])
    return recipe


def _measure_bytes(name: str) -> dict[str, Any]:
    from transformers import TrainerCallback

    from dual_lora.lab.cost.memory import memory_of

    from .child import reset_peak, resident

    seen = _Seen()
    found: dict[str, int] = {}

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            for tensor in model.parameters():
                tensor.detach().float().sum()  # pages of a mapped file become resident
            found["weights"] = sum({t.data_ptr(): t.nbytes for t in model.parameters()}.values())
            seen.watch(model)
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what loading has left behind would hide a part of the growth
            found["before"] = resident()[0]

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            seen.shapes.clear()  # of the last step, which has the optimizer's state as every later one would
            reset_peak()

        def on_train_end(self, *args: Any, **kwargs: Any) -> None:
            found["peak"] = resident()[1]

    recipe = _train(name, STEPS, Watch())
    ((length, logits),) = seen.shapes
    options, step = _simulated(recipe, length, logits)
    return {
        "batch": recipe.train.batch_size,
        "length": length,
        "logits": logits,
        "weights": found["weights"],
        "measured": found["peak"] - found["before"] + found["weights"],
        "estimated": round(memory_of(options, step).peak),
    }


def _measure_seconds(name: str) -> dict[str, Any]:
    from transformers import TrainerCallback

    from dual_lora.lab.cost.calibrate import known_rates, seconds_of

    seen = _Seen()
    passed: list[float] = []
    wall: list[float] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            seen.watch(model)

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.start, self.wall = time.process_time(), time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            passed.append(time.process_time() - self.start)
            wall.append(time.perf_counter() - self.wall)

    recipe = _train(name, TIMED_STEPS, Watch())
    rates = known_rates()
    assert rates is not None  # `run` has seen to it
    estimated = [seconds_of(*_simulated(recipe, *shape), rates) or 0.0 for shape in seen.shapes[1:]]
    lengths = [length for length, _ in seen.shapes[1:]]
    return {
        "batch": recipe.train.batch_size,
        "length": round(_mean(lengths)),
        "measured": round(_mean(passed[1:]), 4),
        "estimated": round(_mean(estimated), 4),
        "steps": [[n, round(e, 3), round(m, 3)] for n, e, m in zip(lengths, estimated, passed[1:], strict=True)],
        "share_of_cores": round(sum(passed[1:]) / sum(wall[1:]), 3),
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _simulated(recipe: Any, length: int, logits: int | None) -> tuple[Any, Any]:
    """StepOptions and step of a batch."""
    from dual_lora.lab.cost.options import from_recipe
    from dual_lora.lab.cost.simulate import simulate

    options = from_recipe(recipe, length=length, logits=logits)
    return options, simulate(options)


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))

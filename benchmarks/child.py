"""What has to be measured in a process of its own: `python -m benchmarks.child TASK METHOD` prints one number.

memory: growth of the resident memory (bytes) during two steps of `step.py`. import, first-forward, load: processor
seconds.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from .measure import Measured

TASKS = ("memory", "import", "first-forward", "load")


def compare(task: str, rounds: int, methods: tuple[str, ...] = ("dual", "lora")) -> Measured:
    """Run the task for each method in turn, each in a fresh process on one thread."""
    costs: dict[str, list[float]] = {m: [] for m in methods}
    before = os.times()
    for k in range(rounds):
        for method in methods if k % 2 == 0 else methods[::-1]:
            costs[method].append(_child(task, method))
    if task == "memory":
        return Measured(costs, "bytes", 1)
    used = [after - then for after, then in zip(os.times(), before, strict=True)]  # user, system, children's, wall
    return Measured(costs, "s", 1, min((used[2] + used[3]) / used[4], 1.0))


def _child(task: str, method: str) -> float:
    root = Path(__file__).parent.parent
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "benchmarks.child", task, method],
        cwd=root, env=env, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"benchmarks.child {task} {method} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def resident() -> tuple[int, int]:
    """(resident bytes, their peak since `reset_peak`) of this process. Linux."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return tuple(int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def reset_peak() -> None:
    """Start the peak anew at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def _memory(method: str) -> float:
    from .step import Training, base_model, tokens

    training = Training(method, tokens(), base_model())
    reset_peak()
    before, _ = resident()
    for _ in range(2):
        training.step()
    return resident()[1] - before


def _import(method: str) -> float:
    start = time.process_time()
    if method == "dual":
        import dual_lora  # noqa: F401
    import peft  # noqa: F401

    return time.process_time() - start


def _first_forward(method: str) -> float:
    """Put the adapter on a Llama of six SmolLM2 layers and run its first forward."""
    from .layers import adapt
    from .step import TARGETS, base_model, tokens

    model, ids = base_model(num_hidden_layers=6), tokens()["input_ids"]
    start = time.process_time()
    adapt(model, method, TARGETS)(input_ids=ids)
    return time.process_time() - start


def _load(method: str) -> float:
    """A saved adapter of a Llama-7B-shaped model onto that model on the meta device, with low_cpu_mem_usage."""
    import torch
    from peft import PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from .layers import config
    from .step import TARGETS

    def base() -> torch.nn.Module:
        with torch.device("meta"):
            return LlamaForCausalLM(LlamaConfig())  # the configuration's defaults are Llama-7B's

    with tempfile.TemporaryDirectory() as folder:
        model = get_peft_model(base(), config(method, TARGETS, 8), low_cpu_mem_usage=True)
        state = {
            name.replace(".default", ""): torch.zeros(p.shape)
            for name, p in model.named_parameters()
            if p.requires_grad
        }
        model.peft_config["default"].save_pretrained(folder)
        from safetensors.torch import save_file

        save_file(state, Path(folder) / "adapter_model.safetensors")
        target = base()
        start = time.process_time()
        PeftModel.from_pretrained(target, folder, low_cpu_mem_usage=True)
        return time.process_time() - start


def main(task: str, method: str) -> None:
    run = {"memory": _memory, "import": _import, "first-forward": _first_forward, "load": _load}[task]
    print(run(method))


if __name__ == "__main__":
    main(*sys.argv[1:])

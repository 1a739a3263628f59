"""How fast does this machine train? A minute of small training steps, kept in the user's cache folder.

A rate is the simulated arithmetic of a step divided by its measured seconds: it contains everything that is not a
product as well, for each method and precision apart. Rates grow with the width of a model; between the measured widths
they are interpolated, beyond them the nearest one counts.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.estimate.setting import Setting
from dual_lora.lab.estimate.simulate import Step, simulate

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHODS = ("dual_lora", "lora", "dora", "full")
DTYPES = ("float32", "bfloat16")
WIDTHS = {"cpu": (384, 1024), "gpu": (1024, 4096)}
TOKENS = {"cpu": 512, "gpu": 8192}
SECONDS = 50.0  # for all measurements together
BLOCKS = 2
ROUNDS = 3  # at least


def cache_file() -> Path:
    """Where rates are kept: $XDG_CACHE_HOME/dual-lora/calibration.json, by default under ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dual-lora" / "calibration.json"


def machine() -> str:
    """What rates depend on: the device, its threads and torch."""
    import torch

    from dual_lora.lab.record import device_name

    return f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def known_rates() -> dict[str, Any] | None:
    """The rates of this machine, or None before the first calibration."""
    try:
        return json.loads(cache_file().read_text(encoding="utf-8")).get(machine())
    except (OSError, ValueError):
        return None


def calibrate(say: Callable[[str], None] | None = None, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure the rates of this machine (about a minute) and keep them. say: called before each measurement.

    Returns {"on", "rates": {dtype: {method: [[width, flops a second], ...]}}}.
    """
    import torch

    on = "gpu" if torch.cuda.is_available() else "cpu"
    works = [(d, m, w) for d in DTYPES for w in WIDTHS[on] for m in METHODS]
    rates: dict[str, dict[str, list[list[float]]]] = {d: {m: [] for m in METHODS} for d in DTYPES}
    for dtype, method, width in works:
        if say:
            say(f"{method}, {dtype}, width {width}")
        rates[dtype][method].append([width, _rate(dtype, method, width, on, seconds / len(works))])
    entry = {"on": on, "date": time.strftime("%Y-%m-%d"), "rates": rates}
    _keep(entry)
    return entry


def seconds_of(setting: Setting, step: Step, rates: dict[str, Any]) -> float | None:
    """Seconds of one optimizer step on this machine; None where its method or device was not measured."""
    name = str(setting.method["name"]).lower().replace("-", "_")
    dtype = "bfloat16" if setting.autocast != "none" or setting.dtype == "float16" else setting.dtype
    points = rates["rates"].get(dtype, {}).get(name)
    if not points or rates["on"] != setting.on:
        return None
    return setting.accumulate * step.flops / _at(points, setting.config.hidden_size)


def _at(points: list[list[float]], width: float) -> float:
    """The rate at a width, along a line over its logarithm."""
    points = sorted(points)
    for (w0, r0), (w1, r1) in itertools.pairwise(points):
        if w0 <= width <= w1:
            return r0 + (r1 - r0) * math.log(width / w0) / math.log(w1 / w0)
    return points[0][1] if width < points[0][0] else points[-1][1]


def calibration_setting(dtype: str, method: str, width: int, on: str) -> Setting:
    """The step that is measured: a Llama of two blocks and a small vocabulary."""
    from transformers import LlamaConfig

    config: PreTrainedConfig = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=width // 64,
        vocab_size=8192,
    )
    how: dict[str, Any] = {"name": method} if method == "full" else {"name": method, "r": 16}
    return Setting("calibration", config, method=how, dtype=dtype, batch=TOKENS[on] // 128, length=128, on=on)  # type: ignore[arg-type]


def _rate(dtype: str, method: str, width: int, on: str, seconds: float) -> float:
    import torch

    setting = calibration_setting(dtype, method, width, on)
    step = training_step(setting, "cuda" if on == "gpu" else "cpu")
    step()
    passed: list[float] = []
    start = time.perf_counter()
    while len(passed) < ROUNDS or time.perf_counter() - start < seconds * 0.7:
        began = time.perf_counter()
        step()
        if on == "gpu":
            torch.cuda.synchronize()
        passed.append(time.perf_counter() - began)
    return simulate(setting).flops / statistics.median(passed)


def training_step(setting: Setting, device: str) -> Callable[[], None]:
    """One real optimizer step of a setting's model with random weights."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dual_lora.lab.methods import method_config
    from dual_lora.lab.training.loop import mean_loss

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(setting.config, dtype=getattr(torch, setting.dtype))
    adapter = method_config(setting.method, setting.head, 100, [])
    if adapter is not None:
        model = get_peft_model(model, adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(0, setting.config.vocab_size, (setting.batch, setting.length), device=device)

    def step() -> None:
        loss = mean_loss(model(input_ids=ids, use_cache=False), ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _keep(entry: dict[str, Any]) -> None:
    from dual_lora.lab.folder import write_atomically

    file = cache_file()
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps({**known, machine(): entry}, indent=1))

"""How long does a training step take on this machine? The one model of time, for estimates and for studies:

    seconds of a step = its arithmetic / rate + its adapted and trained weights · cost

`calibrate` measures both numbers in a minute of small steps and keeps them in the user's cache folder; until then
`rough_cost` is a share of a plain product's speed. They are measured for each method and precision apart, on two steps
of few and of many tokens, so that they contain everything that is not a product as well. The second term is what does
not grow with the tokens: composing ΔW and its gradients in Dual LoRA, norms of weights in DoRA, the optimizer. Both
change with the width of a model; between the measured widths they are interpolated, beyond them the nearest one counts.

One thread of a CPU is timed in processor time, which other work on the machine disturbs through the caches alone;
anything else by wall time, so on a machine at rest. The fastest round counts.

A card that is not here (`card`) is taken by its maker's published figures and two assumptions. No time that follows
from these was measured: they serve to plan a study, not to compare methods.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from dual_lora.lab.cache import cached
from dual_lora.lab.cost.options import Device, StepOptions
from dual_lora.lab.cost.simulate import Step, batch_of, simulate
from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import read_object

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

METHODS = ("dual_lora", "lora", "dora", "full")
DTYPES = ("float32", "bfloat16")
WIDTHS = {"cpu": (384, 1024), "gpu": (1024, 4096)}
TOKENS = {"cpu": (128, 512), "gpu": (1024, 8192)}
SECONDS = 50.0  # for all measurements together
ROW = 64  # tokens; several rows, so that attention meets the padding mask that it meets in training
BLOCKS = 2
ROUNDS = 2  # at least
EFFICIENCY = 0.4  # share of a plain product's speed that a small model's training reaches
# Of the published products that small batches of a few thousand tokens reach: an assumption, on the low side.
SHARE = 0.2
PASSES = 16.0  # bytes moved a step for each adapted or trained weight: composing, gradients, the optimizer's state
DECODE_SECONDS = 0.04  # of one generated token: Python starts some thousand kernels for it. An assumption too


class Cost(NamedTuple):
    """The measured rates at one width of a model."""

    width: int
    rate: float  # flops a second
    weight: float  # seconds for each adapted or trained weight

    def seconds(self, flops: float, weights: float) -> float:
        """Return the seconds of a step that computes this many flops and adapts or trains this many weights."""
        return flops / self.rate + weights * self.weight


def cache_file() -> Path:
    """Return the file that keeps the rates."""
    return cached("calibration.json")


def this_device() -> Device:
    """The kind of device that steps run on here."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """Describe what rates depend on: the device, its threads and torch."""
    from dual_lora.lab.run.record import device_name

    return f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def known_rates() -> dict[str, Any] | None:
    """Return the rates that `calibrate` has found on this machine, or None before the first calibration."""
    try:
        entry = read_object(cache_file()).get(machine())
    except (OSError, ValueError):
        return None
    return entry if isinstance(entry, dict) and "costs" in entry else None


def calibrate(say: Callable[[str], None] | None = None, seconds: float = SECONDS) -> dict[str, Any]:
    """Measure the speed of this machine (about a minute) and keep it. say: called before each measurement.

    Returns {"on", "date", "costs": {dtype: {method: [[width, flops a second, seconds a weight], ...]}}}.
    """
    on = this_device()
    works = [(d, m, w) for d in DTYPES for w in WIDTHS[on] for m in METHODS]
    costs: dict[str, dict[str, list[list[float]]]] = {d: {m: [] for m in METHODS} for d in DTYPES}
    for number, (dtype, method, width) in enumerate(works):
        if say:
            left = f"about {seconds * (1 - number / len(works)):.0f} s left"
            say(f"{method}, {dtype}, width {width} ({number + 1} of {len(works)}, {left})")
        costs[dtype][method].append([*_measured_cost(dtype, method, width, on, seconds / len(works))])
    entry = {"on": on, "date": time.strftime("%Y-%m-%d"), "costs": costs}
    _keep(entry)
    return entry


def seconds_of(options: StepOptions, step: Step, known: dict[str, Any]) -> float | None:
    """Seconds of one optimizer step on this machine; None where its method or device, or a packed base, was not
    measured."""
    half = options.autocast != "none" or options.dtype == "float16"
    cost = cost_of(
        known, str(options.method["name"]), "bfloat16" if half else options.dtype, options.config.hidden_size
    )
    if cost is None or known["on"] != options.on or options.quantisation != "none":
        return None
    return options.accumulate * cost.seconds(step.flops, step.worked)


def cost_of(known: dict[str, Any], method: str, dtype: str, width: float) -> Cost | None:
    """Return the measured cost at this width; None for a method or precision that `calibrate` does not measure."""
    points = known["costs"].get(dtype, {}).get(method)
    return _at([Cost(*point) for point in points], width) if points else None


def rough_cost() -> Cost:
    """A guess by the speed of plain products, for a machine that was not calibrated; measured once in a process.

    On a CPU in processor time, one thread times their number: what else runs at this moment does not count.
    """
    return _rough_cost(torch.get_num_threads())


@functools.cache
def _rough_cost(threads: int) -> Cost:
    on_gpu = this_device() == "gpu"
    device, clock = ("cuda", time.perf_counter) if on_gpu else ("cpu", time.process_time)
    try:
        torch.set_num_threads(1)
        a, b = torch.randn(512, 1024, device=device), torch.randn(1024, 1024, device=device)
        (a @ b).sum().item()
        rounds, start = 0, clock()
        while (passed := clock() - start) < 0.3:
            (a @ b).sum().item()
            rounds += 1
    finally:
        torch.set_num_threads(threads)
    return Cost(0, EFFICIENCY * rounds * 2 * 512 * 1024 * 1024 / passed * (1 if on_gpu else threads), 0.0)


def _at(points: list[Cost], width: float) -> Cost:
    """The cost at a width, along a line over its logarithm."""
    points = sorted(points)
    for a, b in itertools.pairwise(points):
        if a.width <= width <= b.width:
            share = math.log(width / a.width) / math.log(b.width / a.width)
            return Cost(*(x + (y - x) * share for x, y in zip(a, b, strict=True)))  # type: ignore[arg-type]
    return points[0] if width < points[0].width else points[-1]


def calibration_options(dtype: str, method: str, width: int, on: Device, tokens: int) -> StepOptions:
    """The step that is measured: a Llama of two blocks and a small vocabulary on padded rows of 64 tokens."""
    from transformers import LlamaConfig

    config: PreTrainedConfig = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=BLOCKS,
        num_attention_heads=width // 64,
        vocab_size=8192,
    )
    how: dict[str, Any] = {"name": method} if method == "full" else {"name": method, "r": 16}
    return StepOptions("calibration", config, method=how, dtype=dtype, batch=tokens // ROW, length=ROW, on=on)


def flops_a_weight(method: Mapping[str, Any], width: int, tokens: float, checkpointing: bool = False) -> float:
    """Flops of a training step for each weight of a linear layer and each token, by two blocks of a model so wide.

    method: its name and rank, as in a recipe, on all linear layers; tokens: of a step. A method whose step cannot be
    simulated counts like LoRA.
    """
    whole = max(64, width // 64 * 64)  # heads of 64, as calibration's model has
    rows = max(1, round(tokens / ROW))
    return _flops_a_weight(tuple(method.items()), whole, rows, max(1, round(tokens / rows)), checkpointing)


@functools.cache
def _flops_a_weight(
    method: tuple[tuple[str, Any], ...], width: int, rows: int, length: int, checkpointing: bool
) -> float:
    from dual_lora.lab.model.load import quiet

    like_lora = replace(calibration_options("float32", "lora", width, "cpu", rows * ROW), length=length)
    like_lora.config.vocab_size = 64  # no head to speak of
    with quiet():
        try:
            step = simulate(replace(like_lora, method=dict(method), checkpointing=checkpointing))
        except Exception:  # PEFT's other methods fail on tensors without data in ways of their own
            step = simulate(replace(like_lora, checkpointing=checkpointing))
    weights: float = step.base_parameters - like_lora.config.vocab_size * width
    return step.flops / (rows * length * weights)


def _measured_cost(dtype: str, method: str, width: int, on: Device, seconds: float) -> Cost:
    few, many = (calibration_options(dtype, method, width, on, tokens) for tokens in TOKENS[on])
    times = [_fastest(options, seconds * share) for options, share in ((few, 0.2), (many, 0.5))]
    steps = [simulate(options) for options in (few, many)]
    return line(steps, times, width)


def line(steps: Sequence[Step], seconds: Sequence[float], width: int) -> Cost:
    """The cost that explains a step of few and one of many tokens; where noise leaves the weights less than nothing,
    nothing.
    """
    few, many = steps
    rate = (many.flops - few.flops) / max(seconds[1] - seconds[0], 1e-9)
    weight = (seconds[0] - few.flops / rate) / few.worked
    return Cost(width, rate, weight) if weight >= 0 else Cost(width, many.flops / seconds[1], 0.0)


def _fastest(options: StepOptions, seconds: float) -> float:
    on_gpu = options.on == "gpu"
    clock = time.process_time if not on_gpu and torch.get_num_threads() == 1 else time.perf_counter
    step = training_step(options, "cuda" if on_gpu else "cpu")
    step()
    passed: list[float] = []
    start = clock()
    while len(passed) < ROUNDS or clock() - start < seconds:
        began = clock()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        passed.append(clock() - began)
    return min(passed)


def training_step(options: StepOptions, device: str) -> Callable[[], None]:
    """One real optimizer step of the options' model with random weights."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dual_lora.lab.data.batches import mean_loss
    from dual_lora.lab.model.methods import method_config

    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(options.config, dtype=getattr(torch, options.dtype))
    adapter = method_config(options.method, options.head, 100, [])
    if adapter is not None:
        model = get_peft_model(model, adapter)
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    batch = {name: tensor.to(device) for name, tensor in batch_of(options, model).items()}
    labels = batch.pop("labels")
    batch["input_ids"].random_(options.config.vocab_size)

    def step() -> None:
        mean_loss(model(**batch), labels).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _keep(entry: dict[str, Any]) -> None:
    from dual_lora.lab.files.write import write_json

    file = cache_file()
    try:
        known = read_object(file)
    except (OSError, ValueError):
        known = {}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**known, machine(): entry})


@dataclass(frozen=True)
class Card:
    """A GPU: flops a second (dense bf16 products with fp32 sums), bytes a second and of memory, as `source` states."""

    name: str
    flops: float
    bandwidth: float
    memory: float
    source: str

    @property
    def cost(self) -> Cost:
        """Return the card's speed in training, in the form of a calibration."""
        return Cost(0, SHARE * self.flops, PASSES / self.bandwidth)

    @property
    def basis(self) -> str:
        """Say in words what an estimate for this card is based on."""
        return (
            f"arithmetic for {self.name} by its published figures ({self.flops / 1e12:,.0f} TFLOP/s bf16, "
            f"{self.bandwidth / 1e12:.2f} TB/s; {self.source}), of which training is taken to reach {SHARE:.0%}; "
            "nothing was measured"
        )


CARDS = (
    Card("a100-80gb", 312e12, 2039e9, 80e9, "NVIDIA A100 80GB datasheet, SXM"),
    Card("h100-80gb", 989e12, 3350e9, 80e9, "NVIDIA H100 datasheet, SXM, without sparsity"),
    Card("h200-141gb", 989e12, 4800e9, 141e9, "NVIDIA H200 datasheet, SXM, without sparsity"),
    Card("l40s", 362e12, 864e9, 48e9, "NVIDIA L40S datasheet, without sparsity"),
    Card("rtx-4090", 165e12, 1008e9, 24e9, "NVIDIA Ada architecture whitepaper, without sparsity"),
)


def card(name: str) -> Card:
    """The card of this name. Raises UserError for one that is not known."""
    known = {card.name: card for card in CARDS}
    if name.lower() not in known:
        raise UserError(f"There is no card {name!r}.{suggest(name.lower(), known)}")
    return known[name.lower()]

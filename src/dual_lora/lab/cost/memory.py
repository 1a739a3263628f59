"""The memory of a training step by what it is for and by phase, on every one of n devices.

standing = weights + trained + optimizer + buffers;
forward, logits, loss, backward: standing + what is held in that part (`simulate`);
step: standing + gradients + what the optimizer uses while it updates. The peak is the largest of these.

| strategy | weights | gradients | optimizer | other memory |
|---|---|---|---|---|
| ddp | whole | whole | whole | buckets as large as the gradients |
| zero1 | whole | whole | 1/n, and fp32 copies of what is trained | a bucket |
| zero2 | whole | 1/n | the same | a bucket |
| zero3 | 1/n | 1/n | the same | up to 10⁹ whole parameters, a bucket |
| fsdp2 | 1/n | 1/n | 1/n | what lies outside the blocks, and three blocks: in use, coming, being unpacked |

Buckets and whole parameters are DeepSpeed's defaults (reduce_bucket_size, stage3_max_live_parameters), which the
shipped accelerate configurations leave as they are. Activations are each device's own: `batch` is that of one device.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from dual_lora.lab.cost.options import STATES, StepOptions
from dual_lora.lab.errors import UserError, suggest

if TYPE_CHECKING:
    from dual_lora.lab.cost.simulate import Step

Strategy = Literal["ddp", "fsdp2", "zero1", "zero2", "zero3"]
BUCKET = 5e8  # elements, DeepSpeed's reduce_bucket_size; allocated whole, however little is trained
MOST_WHOLE = 1e9  # parameters, DeepSpeed's stage3_max_live_parameters
BLOCKS = 3  # that FSDP2 holds whole at a time
# Bytes of one packed weight: 4 bits and a 4-byte scale for every 64 weights; 8 bits (a scale a row is next to nothing).
PACKED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0, "torchao-int8": 1.0}
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the fullest moment of a step, which comes in phase `where`.

    trained: factors, or everything in full fine-tuning. gathered: sharded weights while they are whole, and buffers of
    the communication. phases: the fullest moment of each phase.
    """

    weights: float
    trained: float
    gradients: float
    optimizer: float
    activations: float
    workspace: float
    gathered: float
    where: str
    phases: dict[str, float]

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    def plain(self) -> dict[str, Any]:
        """Return plain values for JSON, in whole bytes."""
        values = asdict(self) | {"peak": self.peak}
        values["phases"] = {k: round(v) for k, v in self.phases.items()}
        return {k: round(v) if isinstance(v, float) else v for k, v in values.items()}


def memory_of(options: StepOptions, step: Step, devices: int = 1, strategy: str = "ddp") -> Memory:
    """The memory of a step on every one of `devices` devices.

    Raises UserError for a strategy that is not known, and for full fine-tuning of a quantised model.
    """
    if options.quantisation != "none" and options.method["name"] == "full":
        raise UserError("Full fine-tuning needs a base that is not quantised: leave --quantize out.")
    shard = shard_of(options, step, devices, strategy)
    more = _dequantised(options, step)
    parts: dict[str, tuple[float, float, float]] = {}  # segment → activations, workspace, gradients
    for name, peak in step.peaks.items():
        gradients = shard.gradients * (step.trained if options.accumulate > 1 else peak.gradients)
        gradients += shard.in_flight * name.startswith("backward")  # whole, until they are reduced
        parts[name] = peak.activations, peak.workspace + more, gradients
    parts["step"] = 0.0, _updating(options, step, shard), step.trained * shard.gradients
    standing = shard.weights + shard.trained + shard.optimizer + shard.buffers
    phases: dict[str, float] = {"standing": standing}
    where, fullest = "standing", (0.0, 0.0, 0.0)
    for name, part in parts.items():
        gathered = 0.0 if name == "step" else shard.gathered
        total = standing + gathered + sum(part)
        phase = name.partition(",")[0]
        if total > max(phases.values()):
            where, fullest = name, part
        phases[phase] = max(total, phases.get(phase, 0.0))
    activations, workspace, gradients = fullest
    return Memory(
        weights=shard.weights,
        trained=shard.trained,
        gradients=gradients,
        optimizer=shard.optimizer,
        activations=activations,
        workspace=workspace,
        gathered=shard.buffers + (0.0 if where in ("step", "standing") else shard.gathered),
        where=where,
        phases=phases,
    )


def _updating(options: StepOptions, step: Step, shard: Shard) -> float:
    """Temporaries of AdamW's update: two of the size of one tensor, or one of all of them where tensors go together."""
    if options.optimizer == "sgd":
        return 0.0
    own = step.trained * shard.updated
    return own if options.on == "gpu" else 2 * min(step.widest, own)


def _packed(options: StepOptions, weights: float, linear: float) -> float:
    """Bytes of weights of which `linear` bytes are quantised."""
    if options.quantisation == "none":
        return weights
    return weights - linear + linear / _ITEM[options.dtype] * PACKED[options.quantisation]


def _dequantised(options: StepOptions, step: Step) -> float:
    """A quantised weight while it is used: Dual LoRA reads rows (and sums dx in fp32), the others unpack one layer."""
    if options.quantisation == "none":
        return 0.0
    if options.method["name"] == "dual_lora":
        return 4.0 * options.batch * options.length * step.widest_input
    return step.largest_layer


@dataclass(frozen=True)
class Shard:
    """Bytes on one device; gradients and updated are shares: of all gradients, and of what its optimizer updates.

    buffers: of the communication, always there; gathered: parameters that are whole during forward and backward;
    in_flight: whole gradients of blocks in backward.
    """

    weights: float
    trained: float
    optimizer: float
    gradients: float = 1.0
    updated: float = 1.0
    buffers: float = 0.0
    gathered: float = 0.0
    in_flight: float = 0.0


def shard_of(options: StepOptions, step: Step, n: int, strategy: str) -> Shard:
    """The share of one device of n. Raises UserError for a strategy that is not known or n < 1."""
    if strategy not in get_args(Strategy):
        raise UserError(f"strategy is {strategy!r}.{suggest(strategy, get_args(Strategy))}")
    if n < 1:
        raise UserError(f"devices is {n}, expected at least 1.")
    trained, item = step.trained, _ITEM[options.dtype]
    weights = _packed(options, step.weights, step.linear)
    block = _packed(options, step.block_weights, step.block_linear) + step.block_trained
    times, each = STATES[options.optimizer]
    optimizer = times * trained + each * step.trained_parameters  # its state after the first step
    if n == 1:
        return Shard(weights, trained, optimizer)
    if strategy == "ddp":
        return Shard(weights, trained, optimizer, buffers=trained)
    if strategy == "fsdp2":
        outside = max(0.0, weights + trained - options.layers * block)
        whole = outside + BLOCKS * block
        reducing = 2 * step.block_trained
        return Shard(weights / n, trained / n, optimizer / n, 1 / n, 1 / n, gathered=whole, in_flight=reducing)
    master = (optimizer + 4 * step.trained_parameters) / n
    bucket = BUCKET * item
    if strategy == "zero1":
        return Shard(weights, trained, master, 1.0, 1 / n, bucket)
    if strategy == "zero2":
        return Shard(weights, trained, master, 1 / n, 1 / n, bucket)
    whole = min(weights + trained, MOST_WHOLE * item + block)
    return Shard(weights / n, trained / n, master, 1 / n, 1 / n, bucket, whole)

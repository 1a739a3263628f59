"""The memory of a training step by what it is for and by phase, on every one of n devices.

standing = weights + trained + optimizer + buffers;
forward, logits, loss, backward: standing + what lives in that part (`simulate`);
step: standing + gradients + what the optimizer uses while it updates. The peak is the largest of these.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dual_lora.lab.cost.sharding import Placement, place
from dual_lora.lab.errors import UserError

if TYPE_CHECKING:
    from dual_lora.lab.cost.options import Setting
    from dual_lora.lab.cost.simulate import Step

# Bytes of optimizer state: times the bytes of the trained parameters, and more for each of them. 8-bit states have a
# 4-byte scale for every 256 values, twice. Adafactor keeps a row and a column of each matrix, next to nothing.
STATES = {
    "adamw": (2.0, 0.0),
    "adamw_8bit": (0.0, 2.0 + 2 * 4 / 256),
    "lion": (1.0, 0.0),
    "sgd": (0.0, 0.0),
    "momentum": (1.0, 0.0),
    "adafactor": (0.0, 0.0),
}
# Bytes of one packed weight: 4 bits and a 4-byte scale for every 64 weights; 8 bits (a scale a row is next to nothing).
PACKED = {"nf4": 0.5 + 4 / 64, "fp4": 0.5 + 4 / 64, "int8": 1.0}
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
        """For JSON: whole bytes."""
        values = asdict(self) | {"peak": self.peak}
        values["phases"] = {k: round(v) for k, v in self.phases.items()}
        return {k: round(v) if isinstance(v, float) else v for k, v in values.items()}


def memory_of(setting: Setting, step: Step, devices: int = 1, strategy: str = "ddp") -> Memory:
    """The memory of a step on every one of `devices` devices.

    Raises UserError for a strategy that is not known, and for full fine-tuning of a quantised model.
    """
    if setting.quantisation != "none" and setting.method["name"] == "full":
        raise UserError("Full fine-tuning needs a base that is not quantised: leave --quantisation out.")
    weights, block = (
        _packed(setting, step.weights, step.linear),
        _packed(setting, step.block_weights, step.block_linear),
    )
    placed = place(
        strategy,
        devices,
        weights=weights,
        trained=step.trained,
        optimizer=optimizer_bytes(setting, step),
        block=block + step.block_trained,
        block_trained=step.block_trained,
        layers=setting.layers,
        parameters=step.trained_parameters,
        item=_ITEM[setting.dtype],
    )
    more = _dequantised(setting, step)
    parts: dict[str, tuple[float, float, float]] = {}  # segment → activations, workspace, gradients
    for name, peak in step.peaks.items():
        gradients = step.trained if setting.accumulate > 1 else peak.gradients
        parts[name] = peak.activations, peak.workspace + more, gradients * placed.gradients + placed.reducing(name)
    parts["step"] = 0.0, _updating(setting, step, placed), step.trained * placed.gradients
    standing = placed.weights + placed.trained + placed.optimizer + placed.buffers
    phases: dict[str, float] = {"standing": standing}
    where, fullest = "standing", (0.0, 0.0, 0.0)
    for name, part in parts.items():
        gathered = 0.0 if name == "step" else placed.gathered
        total = standing + gathered + sum(part)
        phase = name.partition(",")[0]
        if total > max(phases.values()):
            where, fullest = name, part
        phases[phase] = max(total, phases.get(phase, 0.0))
    activations, workspace, gradients = fullest
    return Memory(
        weights=placed.weights,
        trained=placed.trained,
        gradients=gradients,
        optimizer=placed.optimizer,
        activations=activations,
        workspace=workspace,
        gathered=placed.buffers + (0.0 if where in ("step", "standing") else placed.gathered),
        where=where,
        phases=phases,
    )


def optimizer_bytes(setting: Setting, step: Step) -> float:
    """Its state after the first step."""
    times, each = STATES[setting.optimizer]
    return times * step.trained + each * step.trained_parameters


def _updating(setting: Setting, step: Step, placed: Placement) -> float:
    """Temporaries of AdamW's update: two of the size of one tensor, or one of all of them where tensors go together."""
    if setting.optimizer == "sgd":
        return 0.0
    own = step.trained * placed.updated
    return own if setting.on == "gpu" else 2 * min(step.widest, own)


def _packed(setting: Setting, weights: float, linear: float) -> float:
    """Bytes of weights of which `linear` bytes are quantised."""
    if setting.quantisation == "none":
        return weights
    return weights - linear + linear / _ITEM[setting.dtype] * PACKED[setting.quantisation]


def _dequantised(setting: Setting, step: Step) -> float:
    """A quantised weight while it is used: Dual LoRA reads rows (and sums dx in fp32), the others unpack one layer."""
    if setting.quantisation == "none":
        return 0.0
    if setting.method["name"] == "dual_lora":
        return 4.0 * setting.batch * setting.length * step.widest_input
    return step.largest_layer

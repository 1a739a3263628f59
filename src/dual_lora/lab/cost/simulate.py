"""One training step of the empty model: what is held at every moment of it, and its arithmetic.

The step runs operator by operator as the real one would, on tensors without data, so that what autograd keeps is not a
formula of ours but what autograd keeps. Equal blocks of a transformer add the same bytes and the same arithmetic:
models whose last blocks are equal are simulated with a few of those and one more, and each figure goes on along that
line.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from dual_lora.lab.cost.operators import ACTIVATIONS, WORKSPACE, Bytes, MemoryTracker, bytes_of
from dual_lora.lab.errors import UserError, described
from dual_lora.lab.model.empty import adapted, become_fake, empty_base, new_modules, shortened
from dual_lora.lab.verify.logprobs import base_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from dual_lora.lab.cost.options import StepOptions

_FORWARD, _HEAD, _LOSS, _BACKWARD = "forward", "logits", "loss", "backward"
# A GPU's fused attention drops inside; the CPU's, which is simulated, would fall back to keeping every score.
_ATTENTION_DROPOUT = ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop")


@dataclass(frozen=True)
class Step:
    """The needs of a training step on one device; in bytes, but for the numbers of parameters and flops.

    weights: frozen; trained: trainable parameters (factors, and modules that are trained whole); widest: the largest
    trained tensor; block_weights, block_trained, block_linear: of the largest block; largest_layer: the largest
    adapted weight; linear: weights that quantisation would pack, in the base's dtype; worked: the number of adapted
    and trained weights, which a step goes over however few tokens it has; saved: a file of the result.
    kept: what autograd holds when the forward pass ends. peaks: the fullest moment of each part of the step.
    """

    weights: float
    trained: float
    widest: float
    block_weights: float
    block_trained: float
    block_linear: float
    largest_layer: float
    widest_input: float
    linear: float
    worked: float
    saved: float
    kept: Bytes
    peaks: dict[str, Bytes]
    base_parameters: float
    trained_parameters: float
    flops: float

    def line(self, other: Step, times: float) -> Step:
        """Return self + times · (other − self), figure by figure."""
        fixed = {"widest", "largest_layer", "widest_input", "block_weights", "block_trained", "block_linear"}
        names = [f.name for f in fields(self) if f.name not in fixed]
        mine, theirs = ({name: getattr(step, name) for name in names} for step in (self, other))
        return replace(other, **tree_map(lambda a, b: a + times * (b - a), mine, theirs))


def simulate(options: StepOptions, say: Callable[[str], None] | None = None) -> Step:
    """The step that the options describe. say: called with a sentence before every simulation.

    Raises UserError for a method that does not fit, or a model whose computation depends on its data.
    """
    say = say or (lambda _: None)
    total = options.layers
    kinds = getattr(options.config, "layer_types", None) or [""]
    few = len(set(kinds)) + 2
    while len(set(kinds[:few])) < len(set(kinds)):
        few += 1
    if total > few + 1:
        few = max(few, _first_of_equals(options) + 2)
    if total <= few + 1:
        say(f"{options.method['name']}: {total} blocks")
        return _simulate(options, None)
    say(f"{options.method['name']}: {few} blocks")
    shallow = _simulate(options, few)
    say(f"{options.method['name']}: {few + 1} blocks")
    return shallow.line(_simulate(options, few + 1), total - few)


def _first_of_equals(options: StepOptions) -> int:
    """The block from which on all have the same tensors, frozen and trained: experts after dense blocks, patterns of
    targets, ranks of single layers. The number of blocks where they cannot be told apart.
    """
    model = empty_model(options)
    shapes = [[(n, p.shape, p.requires_grad) for n, p in block.named_parameters()] for block in blocks_of(model)]
    if len(shapes) != options.layers:
        return options.layers
    return 1 + max((i for i, shape in enumerate(shapes) if shape != shapes[-1]), default=-1)


def _simulate(options: StepOptions, layers: int | None) -> Step:
    from torch._subclasses import FakeTensorMode
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    model = empty_model(options, layers)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before = log.level
    log.setLevel(logging.CRITICAL)  # it prints what it then raises
    try:
        become_fake(model, mode)
        with mode:
            return _run(options, model)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise UserError(
            f"{options.name} computes by the values of its data ({error.func}), which an estimate does not have."
        ) from error
    except RuntimeError as error:  # what the real step would raise as well: DeBERTa v1 in bf16, say
        raise UserError(
            f"{options.name} does not run in {options.dtype}: {described(error, Exception)}. Try --dtype float32."
        ) from error
    finally:
        log.setLevel(before)


def empty_model(options: StepOptions, layers: int | None = None) -> Any:
    """The adapted model on the meta device, in training mode. layers: only so many of its blocks.

    Raises UserError where the method does not fit the model.
    """
    config = shortened(options.config, layers)
    config.use_cache = False  # as Trainer sets it
    if options.on == "gpu":
        for name in _ATTENTION_DROPOUT:
            if hasattr(config, name):
                setattr(config, name, 0.0)
    if hasattr(config, "num_experts"):  # the loop over experts looks at the routing, which empty tensors do not have
        config._experts_implementation = "grouped_mm"
    if options.head != "causal":
        config.num_labels = options.classes
    base = empty_base(config, options.head, options.name, options.dtype, options.attention)
    fresh = new_modules(base) if options.head != "causal" else []
    model = adapted(base, options.method, options.head, options.name, fresh=fresh).train()
    for module in model.modules():  # PEFT's LoHa and LoKr ask a drawn value whether to leave the layer out
        if not any(getattr(module, "module_dropout", {None: True}).values()):
            module.training = False
    return model


def _run(options: StepOptions, model: Any) -> Step:
    from dual_lora.lab.model.load import quiet

    blocks = blocks_of(model)
    parameters, buffers = list(model.parameters()), list(model.buffers())
    trained = [p for p in parameters if p.requires_grad]
    batch = batch_of(options, model)
    scales = [s for module in model.modules() for s in getattr(module, "dual_lora_scale", {}).values()]
    keys = [k for m in model.modules() for made in getattr(m, "dual_lora_keys", {}).values() for k in made[:2]]
    tracker = MemoryTracker([*parameters, *buffers, *scales, *keys, *batch.values()], options.on)
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.is_gradient(p.grad))
    if blocks:
        _mark(blocks, tracker)
    with quiet():
        if options.checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        kept = _step(options, model, batch, tracker)
    sizes = _sizes(model, blocks, trained)
    return Step(kept=kept, peaks=tracker.peaks, flops=tracker.flops, **sizes)


def _step(options: StepOptions, model: Any, batch: dict[str, Tensor], tracker: MemoryTracker) -> Bytes:
    from dual_lora.lab.data.batches import mean_loss

    labels = batch.pop("labels")
    cast = (
        torch.autocast("cpu", dtype=torch.float16 if options.autocast == "fp16" else torch.bfloat16)
        if options.autocast != "none"
        else contextlib.nullcontext()
    )
    more = {"logits_to_keep": options.logits} if options.logits and options.head == "causal" else {}
    if options.checkpointing and hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()
    with tracker:
        with cast:
            outputs = model(**batch, **more)
        kept = tracker.now()
        tracker.kind, tracker.segment = WORKSPACE, _LOSS
        loss = mean_loss(outputs, labels)
        del outputs  # Trainer holds them no longer either
        tracker.segment = _BACKWARD
        loss.backward()
    return kept


def batch_of(options: StepOptions, model: Any) -> dict[str, Tensor]:
    """Return a batch as the laboratory's collator makes it. Rows of different lengths need a mask; one row alone has no
    padding, and transformers leaves the mask out.
    """
    from dual_lora.lab.data.batches import accepted_arguments

    rows, length = options.batch, options.length
    ids = torch.zeros(rows, length, dtype=torch.long)
    batch = {"input_ids": ids}
    if rows > 1:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][0, 0] = 0
    if options.head == "classification":
        return batch | {"labels": torch.zeros(rows, dtype=torch.long)}
    if "position_ids" in accepted_arguments(model):
        batch["position_ids"] = torch.zeros_like(ids)
    return batch | {"labels": torch.zeros_like(ids)}


def blocks_of(model: Any) -> list[nn.Module]:
    """The transformer's blocks: its longest list of modules of one kind."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and len({type(b) for b in m}) == 1]
    return list(max(lists, key=len, default=[]))


def _mark(blocks: list[nn.Module], tracker: MemoryTracker) -> None:
    """Name the parts of the step: before, first, inner and last block, and after, each forward and backward."""

    def part(k: int) -> str:
        return "first block" if k == 0 else "last block" if k == len(blocks) - 1 else "inner blocks"

    def before(k: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            if tracker.kind == ACTIVATIONS:
                tracker.segment = f"{_FORWARD}, {part(k)}"

        return hook

    def after(k: int) -> Callable[..., None]:
        def reached(_: Any) -> None:
            tracker.segment = f"{_BACKWARD}, {part(k)}"

        def hook(_: Any, __: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if tracker.kind != ACTIVATIONS:
                return  # a checkpointed block that is computed again
            if tensor.requires_grad:
                tensor.register_hook(reached)
            if k == len(blocks) - 1:
                tracker.segment = _HEAD

        return hook

    for k, block in enumerate(blocks):
        block.register_forward_pre_hook(before(k))
        block.register_forward_hook(after(k))


def _sizes(model: Any, blocks: list[nn.Module], trained: Sequence[Tensor]) -> dict[str, float]:
    frozen = [t for t in (*model.parameters(), *model.buffers()) if not t.requires_grad]
    block = max(blocks, key=lambda block: bytes_of(block.parameters()), default=None)
    adapted = {n.removesuffix(".base_layer") for n, _ in model.named_modules() if n.endswith(".base_layer")}
    base_layers = [
        getattr(m.get_base_layer(), getattr(m, "parameter_name", "weight"))
        for n, m in model.named_modules()
        if n in adapted and hasattr(m, "get_base_layer")
    ]
    return {
        "weights": bytes_of(frozen),
        "trained": bytes_of(trained),
        "widest": max((t.numel() * t.element_size() for t in trained), default=0),
        "block_weights": bytes_of(t for t in block.parameters() if not t.requires_grad) if block else 0,
        "block_trained": bytes_of(t for t in block.parameters() if t.requires_grad) if block else 0,
        "block_linear": bytes_of(_packable(block)) if block else 0,
        "largest_layer": max((w.numel() * w.element_size() for w in base_layers), default=0),
        "widest_input": max((w.shape[-1] for w in base_layers), default=0),
        "linear": bytes_of(_packable(model)),
        "worked": _count([*base_layers, *trained]),
        "saved": bytes_of(trained if hasattr(model, "peft_config") else model.parameters()),
        "base_parameters": _count(base_parameters(model).values()),
        "trained_parameters": _count(trained),
    }


def _packable(model: Any) -> Iterable[Tensor]:
    """Weights that quantisation packs: linear layers but the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for name, module in model.named_modules():
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's
        frozen = linear and not module.weight.requires_grad
        if frozen and module is not head and ".modules_to_save." not in name and ".original_module" not in name:
            yield module.weight


def _count(tensors: Iterable[Tensor]) -> int:
    return sum({id(t): t.numel() for t in tensors}.values())

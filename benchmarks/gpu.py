"""What Dual LoRA costs on a GPU, against limits: `python -m benchmarks.gpu`.

First the kernels and the operator are tested, value and every gradient; a wrong one is not timed. Then, interleaved in
one process and paired by round: the operator against PEFT's LoRA with factors in fp32 (what PEFT does by itself) and
in bf16, and against naive autograd, on Llama-3-8B's linear layers in bf16, forward and backward; peak memory; the
compose kernel against a copy of the same bytes; and a training step of an 8B model. Rows go to ledger.jsonl with the
card's name. Where the kernels do not run, that is said, and the operator is measured by PyTorch's own operations.

The limits are an H100's. On another card the ratios are shown and recorded, and only a wrong result fails.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import judge, layers, ledger
from benchmarks.measure import Measured, Ratio
from dual_lora.core import reference
from dual_lora.core.op import dual_lora_linear
from dual_lora.core.reference import Adapter, Factors, Form

NO_GPU = (
    "No GPU is present, so nothing was measured and no gate was met or missed. The kernels are tested without one, in"
    " Triton's interpreter, by `pytest tests/core -k triton`; `--rehearse` walks through this script on the CPU."
)
RANK = layers.RANK
GATED_CARD = "H100"
# Fewest and most rounds, and the seconds after which a measurement ends: some thirty measurements in ten minutes.
ROUNDS, SECONDS = (10, 50), 6.0
CARD_BYTES = 80e9


class Size(NamedTuple):
    """What is measured: O × I of each layer, tokens, and the model that takes a whole step."""

    layers: Mapping[str, tuple[int, int]]
    tokens: Sequence[int]
    model: Mapping[str, int]


FULL = Size(
    layers={"q/o 4096x4096": (4096, 4096), "k/v 1024x4096": (1024, 4096), "gate/up 14336x4096": (14336, 4096),
            "down 4096x14336": (4096, 14336)},
    tokens=(512, 2048, 8192),
    model=dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256),
)  # fmt: skip
REHEARSAL = Size(
    layers={"tiny 48x64": (48, 64)},
    tokens=(32,),
    model=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
               num_key_value_heads=1, vocab_size=64),
)  # fmt: skip
LIMIT_LORA = {2048: 1.45, 8192: 1.25}
LIMIT_NAIVE, LIMIT_MEMORY, LIMIT_COMPOSE = 0.5, 1.0, 1.3


class Row(NamedTuple):
    """Two costs measured together, and the most that their ratio may be on the gated card."""

    gate: str
    shape: Mapping[str, Any]
    measured: Measured
    subject: str
    against: str
    limit: float | None

    @property
    def ratio(self) -> Ratio:
        return self.measured.ratio(self.subject, self.against)


class Card:
    """A GPU, or for a rehearsal the CPU with wall time and no account of memory."""

    def __init__(self, device: str):
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"
        self.name = torch.cuda.get_device_name() if self.is_gpu else "CPU (rehearsal)"

    def times(self, variants: Mapping[str, Callable[[], object]]) -> Measured:
        """Seconds of each variant, round by round, in turned order."""
        costs: dict[str, list[float]] = {name: [] for name in variants}
        for run in variants.values():
            for _ in range(3 if self.is_gpu else 1):  # compile, tune, warm up
                run()
        names, start = list(variants), time.perf_counter()
        for done in range(1, ROUNDS[1] + 1):
            for name in names:
                costs[name].append(self._seconds(variants[name]))
            names = names[1:] + names[:1]
            if done >= ROUNDS[0] and time.perf_counter() - start > SECONDS:
                break
            if not self.is_gpu and done == 2:
                break
        return Measured(costs, "s", threads=1)

    def _seconds(self, run: Callable[[], object]) -> float:
        if not self.is_gpu:
            start = time.perf_counter()
            run()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def peak(self, run: Callable[[], object]) -> int:
        """Bytes allocated at the most during `run` beyond those before it."""
        if not self.is_gpu:
            run()
            return 1
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before


def why_no_kernels(card: Card) -> str:
    """Empty if the kernels run here, right or wrong; else why they do not, as no Triton or one that refuses them."""
    try:
        from dual_lora.core.kernels import launch as triton_launch
        from dual_lora.core.kernels.compose import compose
        from dual_lora.core.kernels.gradient import factor_gradients

        triton_launch.target(card.device)
        factors = Factors(*(f.to(card.device) for f in judge.exact_factors(64, 64, 16, 16)))
        adapter = Adapter(factors, torch.tensor(1.0, device=card.device), Form())
        for dtype in (torch.float32, torch.bfloat16) if card.is_gpu else (torch.float32,):
            W = compose(None, [adapter], dtype)
            factor_gradients(W, W, [adapter])
    except Exception as error:  # whatever a compiler may say
        return (f"{type(error).__name__}: {error}".strip() or "no message").splitlines()[0]
    return ""


def correct(card: Card, shapes: Sequence[tuple[int, int, int]], kernels: bool) -> None:
    """Judge the operator and both kernels by value and every gradient; raise judge.WrongResult. Shapes: T, O, I."""
    # The interpreter's bf16 is wrong, a GPU's is not.
    dtypes = [torch.float32, torch.float16] + ([torch.bfloat16] if card.is_gpu else [])
    for T, O, I in shapes:
        factors = Factors(*(f.to(card.device) for f in judge.exact_factors(O, I, RANK // 2, RANK // 2)))
        scale = torch.tensor(0.5, device=card.device)
        adapter = Adapter(factors, scale, Form())
        for dtype in dtypes:
            x, W, dy = (torch.randn(s, device=card.device).mul_(I**-0.5).to(dtype) for s in ((T, I), (O, I), (T, O)))
            truth = judge.results(x, W, [(factors, scale)], dy, torch.float64)
            plain = judge.results(x, W, [(factors, scale)], dy)
            leaves = [t.detach().requires_grad_() for t in (x, *factors)]
            y = dual_lora_linear(leaves[0], W, None, [adapter._replace(factors=Factors(*leaves[1:]))])
            y.backward(dy)
            ours = {"y": y, **{name: t.grad for name, t in zip(("dx", "dA", "dB", "dC", "dD"), leaves, strict=True)}}
            judge.check({name: t.detach() for name, t in ours.items() if t is not None}, plain, truth)
            if not kernels:
                continue
            from dual_lora.core.kernels.compose import compose
            from dual_lora.core.kernels.gradient import factor_gradients

            for deterministic in (False, True):
                [gradients] = factor_gradients(dy, x, [adapter], deterministic=deterministic)
                judge.check({f"d{k}": g for k, g in gradients._asdict().items()}, plain, truth)
            # P and Q are exact, so the composed weight has to be the very rounding of the fp32 sum.
            want = (W.float() + reference.delta_weight(factors, scale)).to(dtype)
            if not torch.equal(compose(W, [adapter]), want):
                raise judge.WrongResult(f"compose is not the rounding of W + ΔW, {O} × {I} in {dtype}: not timed.")


def step(
    function: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Sequence[Tensor]
) -> Callable[[], None]:
    """Forward and backward with fresh gradients."""

    def run() -> None:
        function(x).backward(dy)
        for p in (x, *parameters):
            p.grad = None

    return run


def layer_rows(card: Card, name: str, O: int, I: int, T: int) -> Iterator[Row]:
    """One linear layer in bf16 as PEFT calls it: ours, LoRA with factors in fp32 and in bf16, and naive autograd."""
    low = torch.bfloat16
    W = torch.randn(O, I, device=card.device).mul_(I**-0.5).to(low)
    x = torch.randn(T, I, device=card.device).to(low).requires_grad_()
    dy = torch.randn(T, O, device=card.device).to(low)
    runs = {}
    for method in ("dual", "lora", "lora bf16", "naive"):
        layer = layers.linear(method.removesuffix(" bf16"), W).to(card.device)
        if method == "dual":
            layers.fill(layer, judge.exact_factors(O, I, RANK // 2, RANK // 2))
        moving = [p for p in layer.parameters() if p.requires_grad]
        for p in moving if method == "lora bf16" else ():
            p.data = p.data.to(low)
        runs[method] = step(layer, x, dy, moving)
    measured, shape = card.times(runs), {"layer": name, "O": O, "I": I, "T": T}
    for method, limit in (("lora", LIMIT_LORA.get(T)), ("lora bf16", None), ("naive", LIMIT_NAIVE)):
        yield Row("forward + backward", shape, measured, "dual", method, limit)
    peaks = Measured({method: [card.peak(run)] for method, run in runs.items()}, "bytes", threads=1)
    yield Row("peak memory", shape, peaks, "dual", "lora", LIMIT_MEMORY)


def compose_row(card: Card, name: str, O: int, I: int) -> Row:
    """The compose kernel against a copy, which reads and writes the same bytes."""
    from dual_lora.core.kernels.compose import compose

    low = torch.bfloat16 if card.is_gpu else torch.float16
    W = torch.randn(O, I, device=card.device).to(low)
    out = torch.empty_like(W)
    factors = Factors(*(f.to(card.device) for f in judge.exact_factors(O, I, RANK // 2, RANK // 2)))
    adapter = Adapter(factors, torch.tensor(2.0, device=card.device), Form())
    measured = card.times({"compose": lambda: compose(W, [adapter], out=out), "copy": lambda: out.copy_(W)})
    shape = {"layer": name, "O": O, "I": I}
    return Row("compose kernel", shape, measured, "compose", "copy", LIMIT_COMPOSE)


def model_row(card: Card, tokens: int, shape: Mapping[str, int]) -> Row:
    """One AdamW step of a Llama with random weights, bf16 and checkpointing: it has to fit, and all factors to move."""
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def run() -> None:
        options: dict[str, Any] = dict(shape)
        with torch.device(card.device):
            model: Any = LlamaForCausalLM(LlamaConfig(**options, max_position_embeddings=tokens))
        model.gradient_checkpointing_enable({"use_reentrant": False})
        adapted: Any = get_peft_model(model, layers.config("dual", "all-linear")).train()
        moving = [p for p in adapted.parameters() if p.requires_grad]
        before = [p.detach().clone() for p in moving]
        optimizer = torch.optim.AdamW(moving, lr=1e-3, weight_decay=0.0)
        ids = torch.randint(0, shape["vocab_size"], (1, tokens), device=card.device)
        loss = adapted(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        if not loss.isfinite() or any(torch.equal(p, old) for p, old in zip(moving, before, strict=True)):
            raise judge.WrongResult(
                f"A step of the whole model gave loss {loss.item()} and left factors where they were."
            )

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # never 32 GB of fp32 weights on the way
    try:
        peak = card.peak(run)
    finally:
        torch.set_default_dtype(default)
    measured = Measured({"dual": [peak], "card": [CARD_BYTES]}, "bytes", threads=1)
    return Row("8B model, one step", {"T": tokens, **shape}, measured, "dual", "card", 1.0)


def rows(card: Card, size: Size, kernels: bool) -> Iterator[Row]:
    for name, (O, I) in size.layers.items():
        if kernels:
            yield compose_row(card, name, O, I)
        for T in size.tokens:
            yield from layer_rows(card, name, O, I, T)
    if card.is_gpu and torch.cuda.get_device_properties(card.device).total_memory < 0.9 * CARD_BYTES:
        print("8B model: left out, the card has less than 80 GB.")
    else:
        yield model_row(card, size.tokens[0], size.model)


def _triton() -> str:
    try:
        return version("triton")
    except PackageNotFoundError:
        return "none"


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every gate that this card has is met; 1: one is missed, a result is wrong, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run every step tiny, on the CPU; records nothing")
    rehearse = parser.parse_args(arguments).rehearse
    if not rehearse and not torch.cuda.is_available():
        print(NO_GPU)
        return 1
    card, size = (Card("cpu"), REHEARSAL) if rehearse else (Card("cuda"), FULL)
    shapes = [(33, 63, 100), (32, 48, 64)] if rehearse else [(63, 100, 577), (2048, 1024, 4096)]
    reason = why_no_kernels(card)
    if reason:
        print(f"The kernels do not run on {card.name}: {reason}. What follows is PyTorch's own operations.")
    try:
        correct(card, shapes, not reason)
        print(f"{card.name}: value and every gradient are right.")
        return report(card, size, not reason)
    except judge.WrongResult as wrong:
        print(f"✗ {wrong}")
        return 1


def report(card: Card, size: Size, kernels: bool) -> int:
    """Measure, print and record everything; 1 if a gate of this card is missed."""
    source = ledger.provenance() | {"device": card.name, "triton": _triton(), "kernels": kernels, "rank": RANK}
    gated, missed = GATED_CARD in card.name, 0
    for row in rows(card, size, kernels):
        ratio = row.ratio
        met = ratio.median <= row.limit if gated and row.limit is not None else None
        missed += met is False
        mark = {True: "✓", False: "✗", None: " "}[met]
        limit = "" if row.limit is None else f"≤ {row.limit:.2f}"
        where = f"{row.shape.get('layer', 'Llama-3-8B')}, T {row.shape.get('T', '–')}"
        print(
            f"{mark} {row.gate:20} {row.against:9} {where:28} {ratio.median:6.2f} ± {ratio.uncertainty:4.0%} {limit}",
            flush=True,
        )
        if card.is_gpu:
            line = ledger.row(source, "gpu", row.gate, dict(row.shape), row.measured, row.subject, row.against)
            ledger.append([line | {"limit": row.limit, "met": met}])
    if not gated:
        print(f"The limits are an {GATED_CARD}'s: on {card.name} no gate is met or missed.")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())

"""One gradient pass over a few batches: what the clip cuts, which group gets how much, where the first step goes.

The full weight gradient G = dyᵀx of a layer is made a block of rows at a time while backward passes the layer; nothing
of a weight's size is kept.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dual_lora.core.reference import product_gradients
from dual_lora.lab.analysis.matrices import Factored, Matrix, blocks
from dual_lora.lab.analysis.updates import GROUPS, adapted_layers, snapshot

Batch = dict[str, Any]
Call = tuple[Tensor, Tensor]  # a layer's input x and its output's gradient dy
LossOf = Callable[[Any, Batch], Tensor]

_GROUP_OF = {kind: group for group, kinds in GROUPS.items() for kind in kinds}


class WeightGradient(Matrix):
    """G = dyᵀ x of one layer, fp32, by rows; of several calls (x, dy) their sum."""

    def __init__(self, *calls: Call):
        self.x, self.dy = (torch.cat([t.detach().flatten(0, -2) for t in side]) for side in zip(*calls, strict=True))
        self.shape, self.device = (self.dy.shape[1], self.x.shape[1]), self.x.device

    def rows(self, start: int, stop: int) -> Tensor:
        return (self.dy[:, start:stop].t() @ self.x).float()


def is_linear(layer: Any) -> bool:
    """Whether y = x Wᵀ, so that the weight's gradient is dyᵀ x: not embeddings, convolutions, attention."""
    inner = layer.get_base_layer()
    return hasattr(inner, "in_features") or type(inner).__name__ == "Conv1D"


@contextmanager
def watched(layers: dict[str, Any], see: Callable[[str, Call], None]) -> Iterator[None]:
    """Call ``see(layer name, (x, dy))`` for every linear layer while backward passes a call of it."""

    def attach(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            x = args[0]
            if torch.is_tensor(output) and output.requires_grad:
                output.register_hook(lambda dy: see(name, (x, dy)))

        return hook

    handles = [layer.register_forward_hook(attach(name)) for name, layer in layers.items() if is_linear(layer)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def gradient_shares(layer: nn.Module) -> dict[str, float]:
    """Share of every group of an adapter's tensors in the squared norm of its gradient, from `.grad`.

    share_magnitude and share_direction for Dual LoRA (A and B, C and D), and one share for each kind of tensor
    (share_dual_lora_A, share_lora_B, …); rms_*: root mean square of the gradient's entries, against which Adam's ε
    (1e-8) has to be small. Empty where no gradient has been taken, or it is zero.
    """
    squares: dict[str, float] = {}
    entries: dict[str, int] = {}
    for name, parameter in layer.named_parameters():
        if parameter.grad is None or name.startswith("base_layer."):
            continue
        size = float(parameter.grad.double().square().sum())
        kind = name.partition(".")[0]
        for key in {kind, _GROUP_OF.get(kind, kind)}:
            squares[key] = squares.get(key, 0.0) + size
            entries[key] = entries.get(key, 0) + parameter.numel()
    total = sum(size for key, size in squares.items() if key not in GROUPS)
    if not total:
        return {}
    shares = {f"share_{key}": size / total for key, size in sorted(squares.items())}
    return shares | {f"rms_{key}": math.sqrt(size / entries[key]) for key, size in sorted(squares.items())}


def gradient_pass(
    model: Any,
    batches: list[Batch],
    loss_of: LossOf,
    names: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Return gradient shares by layer (all, or those named), and for Dual LoRA's Sign estimator how much of H it
    changes.

    cut: share of the entries of H = s G ⊙ ReLU(P) that the estimator changes, cut_moving: the same among entries with
    H ≠ 0; lost: share of Σ|H| that is gone; largest_H: the largest |H|. Under "clip" these are entries beyond ±1, under
    "hardtanh" those with |Q| > 1. The clip acts on each micro-batch, so a batch here should be one of training's.
    The factors' gradients are summed over the batches; the model is left without gradients.
    """
    layers = adapted_layers(model)
    updates = {n: u for n, u in snapshot(model).items() if names is None or n in names}
    tallies: dict[str, Tensor] = {}

    def see(name: str, call: Call) -> None:
        matrix = updates[name].update()
        if isinstance(matrix, Factored) and matrix.adapter.form.direction == "sign":
            tally = _estimator_tally(matrix, WeightGradient(call), updates[name].strength)
            if name in tallies:
                tally[-1] = torch.maximum(tally[-1], tallies[name][-1])
                tally[:-1] += tallies[name][:-1]
            tallies[name] = tally

    model.zero_grad(set_to_none=True)
    with evaluating(model), watched({n: layers[n] for n in updates}, see), torch.enable_grad():
        for batch in batches:
            loss_of(model, batch).backward()
    result = {name: gradient_shares(layers[name]) for name in updates}
    for name, tally in tallies.items():
        cut, moving, total, before, after, largest = tally.tolist()
        result[name] |= {
            "cut": cut / total,
            "cut_moving": cut / moving if moving else 0.0,
            "lost": 1 - after / before if before else 0.0,
            "largest_H": largest,
        }
    model.zero_grad(set_to_none=True)
    return result


def _estimator_tally(matrix: Factored, G: Matrix, strength: float) -> Tensor:
    """Entries cut, entries with H ≠ 0, all entries, Σ|H|, Σ|STE(H)|, max |H|; fp64 [6]."""
    adapter = matrix.adapter.with_mean_square()  # the surrogate is as wide as all of Q is, not as a block of it
    form, scale = adapter.form, strength * adapter.scale
    tally = torch.zeros(6, dtype=torch.float64)
    for g, p, q in blocks(G, matrix.product("magnitude"), matrix.product("direction")):
        H = product_gradients(g, p, q, scale, form._replace(ste="identity"))[1]
        kept = product_gradients(g, p, q, scale, form, mean_square=adapter.mean_square)[1]
        counts = (kept != H).sum(), (H != 0).sum(), torch.tensor(H.numel(), device=H.device)
        tally[:3] += torch.stack(counts).double().cpu()
        tally[3:5] += torch.stack([H.double().abs().sum(), kept.double().abs().sum()]).cpu()
        tally[5] = torch.maximum(tally[5], H.abs().max().double().cpu())
    return tally


def first_step(
    model: Any,
    batch: Batch,
    loss_of: LossOf,
    learning_rate: float,
    names: Collection[str] | None = None,
) -> dict[str, dict[str, float]]:
    """Return by layer where one AdamW step from here takes ΔW, against where full fine-tuning would go.

    gradient_cosine: cosine of the step in ΔW with -G, plain gradient descent's direction; sign_cosine: with -sign(G),
    the first step of AdamW on the weight itself. Linear layers only. The batch passes twice, once for the step and once
    for G, so that no G has to be kept. The model is put back as it was. Give an adapter at full strength: at λ = 0
    nothing moves.
    """
    layers = adapted_layers(model)
    before = {n: u for n, u in snapshot(model).items() if names is None or n in names}
    calls: Counter[str] = Counter()
    seen: dict[str, list[Call]] = defaultdict(list)
    with evaluating(model), torch.enable_grad():
        model.zero_grad(set_to_none=True)
        with watched({n: layers[n] for n in before}, lambda name, _: calls.update([name])):
            loss_of(model, batch).backward()
        trained = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        kept = [p.detach().clone() for p in trained]
        torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0).step()
        after = snapshot(model)
        with torch.no_grad():
            for parameter, old in zip(trained, kept, strict=True):
                parameter.copy_(old)
        result: dict[str, dict[str, float]] = {}

        def see(name: str, call: Call) -> None:
            seen[name].append(call)
            if len(seen[name]) == calls[name]:  # a layer that is called several times has the sum
                G = WeightGradient(*seen.pop(name))
                result[name] = _alignment(before[name].update(), after[name].update(), G)

        model.zero_grad(set_to_none=True)
        with watched({n: layers[n] for n in before}, see):
            loss_of(model, batch).backward()
        model.zero_grad(set_to_none=True)
    return {name: result[name] for name in before if name in result}


def _alignment(old: Matrix, new: Matrix, G: Matrix) -> dict[str, float]:
    along = along_sign = step = gradient = nonzero = 0.0
    for after, before, gradient_rows in blocks(new, old, G):
        move, g = (after - before).double(), gradient_rows.double()
        along -= float((move * g).sum())
        along_sign -= float((move * g.sign()).sum())
        step += float(move.square().sum())
        gradient += float(g.square().sum())
        nonzero += float((g != 0).sum())
    return {
        "gradient_cosine": along / math.sqrt(step * gradient) if step and gradient else math.nan,
        "sign_cosine": along_sign / math.sqrt(step * nonzero) if step and nonzero else math.nan,
    }


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Switch dropout off inside the block: a figure should not depend on a draw."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)

"""A whole training step, forward, backward, AdamW, of models with random weights on random tokens.

The shapes are SmolLM2-135M's, in fp32 and bf16, and MiniLM's, whose layers are small.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from . import judge, layers
from .measure import Measured, interleave

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMOLLM2_135M: dict[str, Any] = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}


ENCODER_TARGETS = ["query", "key", "value", "dense"]
MINILM: dict[str, Any] = {
    "hidden_size": 384,
    "intermediate_size": 1536,
    "num_hidden_layers": 6,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
}


def encoder() -> nn.Module:
    """The BERT of that shape with a head for two labels, seeded random weights, fp32, no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**MINILM, **none)).train()


def base_model(**changes: Any) -> nn.Module:
    """The Llama of that shape with seeded random weights, fp32 if `dtype` is not among the changes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    dtype = changes.pop("dtype", torch.float32)
    return LlamaForCausalLM(LlamaConfig(**{**SMOLLM2_135M, **changes})).to(dtype).train()


class Training:
    """One method's model, optimizer and step."""

    def __init__(self, method: str, inputs: dict[str, Tensor], model: nn.Module, targets: list[str] = TARGETS):
        self.inputs = inputs
        self.model = layers.adapt(model, method, targets)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4)

    def gradients(self) -> Tensor:
        """One forward and backward; returns the loss."""
        loss = self.model(**self.inputs).loss
        loss.backward()
        return loss.detach()

    def step(self) -> None:
        """One optimizer step."""
        self.gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def adapted(self) -> dict[str, Any]:
        """The layers that carry four factors, by their name in the base model."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, layers.Naive) or type(module).__module__ == "dual_lora.method.layer":
                found[name.removeprefix("base_model.model.")] = module
        return found


def tokens(batch: int = 4, length: int = 256) -> dict[str, Tensor]:
    """A batch for the language model."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(0, SMOLLM2_135M["vocab_size"], (batch, length), generator=draw)
    return {"input_ids": ids, "labels": ids}


def encoder_trainings(methods: tuple[str, ...], batch: int, length: int) -> dict[str, Training]:
    """One training of the encoder for each method."""
    draw = torch.Generator().manual_seed(1)
    inputs = {
        "input_ids": torch.randint(0, 30522, (batch, length), generator=draw),
        "labels": torch.randint(0, 2, (batch,), generator=draw),
    }
    return {method: Training(method, inputs, encoder(), ENCODER_TARGETS) for method in methods}


def trainings(methods: tuple[str, ...], inputs: dict[str, Tensor], **changes: Any) -> dict[str, Training]:
    """One training for each method; frozen weights are shared, full fine-tuning has its own."""
    made, shared = {}, base_model(**changes)
    for method in methods:
        model = base_model(**changes)
        if method != "full":
            for (_, parameter), (_, source) in zip(model.named_parameters(), shared.named_parameters(), strict=True):
                parameter.data = source.data
        made[method] = Training(method, inputs, model)
    gc.collect()
    return made


def check(dual: Training, naive: Training) -> None:
    """Loss and every gradient of our model against naive autograd's, from the same factors."""
    ours, plain = dual.adapted(), naive.adapted()
    if ours.keys() != plain.keys() or not ours:
        raise judge.WrongResult(f"Adapted layers differ: {sorted(ours.keys() ^ plain.keys())[:4]}.")
    for k, (name, layer) in enumerate(ours.items()):
        O, I = layer.get_base_layer().weight.shape
        factors = judge.exact_factors(O, I, layers.RANK // 2, layers.RANK // 2, seed=k)
        layers.fill(layer, factors)
        layers.fill(plain[name], factors)
    losses = {"loss": dual.gradients()}, {"loss": naive.gradients()}
    judge.check_close(*losses, 1e-5)
    judge.check_close(_gradients(ours), _gradients(plain), 1e-3)
    for training in (dual, naive):
        training.optimizer.zero_grad()


def check_fused(fused: Training, plain: Training) -> None:
    """Loss and every gradient of PEFT's layers by our product against PEFT's own, from the same factors."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for one, other in zip(fused.model.parameters(), plain.model.parameters(), strict=True):
        if one.requires_grad:
            with torch.no_grad():
                one.copy_(torch.randn(one.shape, generator=draw) * 0.02)
                other.copy_(one)
            found.append((one, other))
    losses = {"loss": fused.gradients()}, {"loss": plain.gradients()}
    judge.check_close(*losses, 1e-5)
    ours, theirs = ({str(k): pair[side].grad for k, pair in enumerate(found)} for side in (0, 1))
    judge.check_close(ours, theirs, 1e-3)
    for training in (fused, plain):
        training.optimizer.zero_grad()


def _gradients(adapted: dict[str, Any]) -> dict[str, Tensor]:
    return {f"{n}.d{k}": f.grad for n, m in adapted.items() for k, f in layers.factors_of(m)._asdict().items()}


def measure(made: dict[str, Training], threads: int, seconds: float, rounds: tuple[int, int] = (3, 15)) -> Measured:
    """Seconds of one step of every method."""
    variants: dict[str, Callable[[], object]] = {m: t.step for m, t in made.items()}
    return interleave(variants, layers.pairs(made), threads, seconds, rounds)


def measure_scaling(dual: Training, lora: Training, threads: int, seconds: float) -> Measured:
    """Wall seconds of one step on one thread and on `threads`, in turn.

    "as LoRA's scales" is one thread's cost times what `threads` threads spare LoRA's step in the same round: the cores
    of a virtual machine may be less than whole.
    """

    def on(training: Training, n: int) -> Callable[[], None]:
        def run() -> None:
            torch.set_num_threads(n)
            training.step()

        return run

    many = f"{'two' if threads == 2 else threads} threads"
    variants = {"one thread": on(dual, 1), many: on(dual, threads), "lora 1": on(lora, 1), "lora": on(lora, threads)}
    pairs, alone = [(many, "one thread"), ("lora", "lora 1")], {"one thread": 1, "lora 1": 1}
    measured = interleave(variants, pairs, threads, seconds, (3, 9), alone)
    costs = dict(measured.costs)
    rounds = zip(costs["one thread"], costs.pop("lora"), costs.pop("lora 1"), strict=True)
    return measured._replace(costs=costs | {"as LoRA's scales": [own * two / one for own, two, one in rounds]})

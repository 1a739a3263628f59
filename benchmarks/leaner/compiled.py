"""torch.compile over a whole training step of a two-layer Llama of SmolLM2-135M's widths: model, backward, AdamW."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from .. import judge, step
from .finding import Finding, compared

SMALL = {"num_hidden_layers": 2, "vocab_size": 2048}


def findings(size: int, seconds: float) -> Iterator[Finding]:
    ids = step.tokens(2, 256) % SMALL["vocab_size"]
    eager, compiled = (step.trainings(("dual",), ids, **SMALL)["dual"] for _ in range(2))
    compiled.model.load_state_dict(eager.model.state_dict())
    compiled.model.forward = torch.compile(compiled.model.forward)  # type: ignore[method-assign]
    update = torch.compile(compiled.optimizer.step)

    def whole() -> None:
        compiled.gradients()
        update()
        compiled.optimizer.zero_grad()

    before = time.process_time()
    judge.check_close({"loss": compiled.gradients()}, {"loss": eager.gradients()}, 1e-5)
    for training in (eager, compiled):
        training.optimizer.zero_grad()
    whole()
    beside = {"compiled": f"{time.process_time() - before:.0f} s of processor time to compile (in this process)"}
    yield from compared({"eager": eager.step, "compiled": whole}, "eager", seconds, beside)

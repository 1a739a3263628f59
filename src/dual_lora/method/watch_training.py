"""Notices an adapter that does not train: the worst failure of such methods makes no noise."""

import weakref
from typing import Any

from torch.optim import Optimizer

from .._warning import warn

# Steps after which something is said. Under the paper's warm-up the first step has gradients of zero by definition.
OWN_STEPS = 4
FOREIGN_STEPS = 10

watches: set["Watch"] = set()


class Watch:
    """Looks at an adapter of a model twice: in the fourth step of an optimizer that holds some of its factors, and in
    the tenth of others.
    """

    def __init__(self, adapter: str, layers: list[Any]):
        self.adapter, self.layers = adapter, [weakref.ref(layer) for layer in layers]
        self.own = self.foreign = 0
        watches.add(self)

    def after_step(self, optimizer: Optimizer, held: set[int]) -> None:
        """Look at the factors after an optimizer's step; `held` are the ids of its parameters."""
        alive = [layer for layer in (one() for one in self.layers) if layer is not None]
        factors = [f for a in alive if self.adapter in a.states for f in a.trainable_factors(self.adapter)]
        if not factors:
            watches.discard(self)
            return
        if not any(id(f) in held for f in factors):
            self.foreign += any(f.grad is not None for f in factors)
            if self.foreign == FOREIGN_STEPS:
                self._say(
                    f"get gradients, but in {self.foreign} optimizer steps no optimizer held them: they do not move. "
                    "Build the optimizer from the model's trainable parameters after the adapter was added (and after "
                    "moving or sharding the model)."
                )
            return
        if type(optimizer).__name__ == "LoraFAOptimizer":
            raise TypeError(
                "LoRA-FA's optimizer would train B and D alone, by a projection that is made for B A: it does not fit "
                "Dual LoRA. Use torch.optim.AdamW."
            )
        self.own += 1
        if self.own < OWN_STEPS:
            return
        grads = [f.grad for f in factors if f.grad is not None]
        # Each process looks at its own parts: asked of the others at different times, they would wait for ever.
        parts = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
        if not grads:
            self._say(
                f"got no gradient in optimizer step {self.own}: they do not train. Is the loss connected to the "
                "adapted layers (no torch.no_grad(), no detach(); gradient checkpointing with use_reentrant=False or "
                "model.enable_input_require_grads()), and the adapter active?"
            )
        elif all(g.numel() for g in parts) and not any(bool(g.any()) for g in parts):
            self._say(
                f"have gradients of exactly zero in optimizer step {self.own}: they do not move. Is the output of the "
                "adapted layers used, and the loss finite and not constant?"
            )
        watches.discard(self)

    def _say(self, what: str) -> None:
        warn(f"The factors of the Dual LoRA adapter {self.adapter!r} {what}", stacklevel=4)
        watches.discard(self)

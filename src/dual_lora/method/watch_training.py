"""Warn of an adapter that does not train, which otherwise raises no error."""

import weakref
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from .._warning import warn
from ..core.traced import version
from .parallel.sharded import local

# Steps before a warning. Under the paper's warm-up the first step has gradients of zero by definition.
OWN_STEPS = 4
FOREIGN_STEPS = 10

watches: set["Watch"] = set()
resets: set["ResetWatch"] = set()


class Watch:
    """Checks the gradients of one adapter in the fourth step of an optimizer that holds some of its factors, and in the
    tenth whether optimizers hold all factors of a layer; or in the tenth step of optimizers that hold none.
    """

    def __init__(self, adapter: str, layers: list[Any]):
        self.adapter, self.layers = adapter, [weakref.ref(layer) for layer in layers]
        self.own_steps = self.foreign_steps = 0
        self.rates_told = False
        self.held: set[int] = set()  # the ids of the factors that some optimizer holds
        watches.add(self)
        if layers:
            resets.add(ResetWatch(adapter, layers[0]))

    def before_step(self, optimizer: Optimizer) -> None:
        """Raise TypeError for an optimizer that is made for LoRA's two factors, and warn of rates that are."""
        if type(optimizer).__name__ != "LoraFAOptimizer":
            self._check_rates(optimizer)
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if any(id(f) in held for f in self._factors()):
            for layer in self.layers:
                if (alive := layer()) is not None and self.adapter in alive.states:
                    alive.dual_lora_A[self.adapter].requires_grad_(True)  # which PEFT has frozen by LoRA's name
            raise TypeError(
                "LoRA-FA's optimizer freezes LoRA's A and projects the gradient of B: it is made for the product B A "
                "and does not fit Dual LoRA, which has four factors. Nothing was trained, and A is no longer frozen: "
                "make another optimizer, such as torch.optim.AdamW."
            )

    def _check_rates(self, optimizer: Optimizer) -> None:
        """Warn before the first step of LoRA+ by LoRA's names, which gives B a rate of its own, and D that of A."""
        if self.own_steps or self.rates_told:
            return
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for layer in (one() for one in self.layers):
            if layer is None or self.adapter not in layer.states or not layer.states[self.adapter].r2:
                continue
            of_factors = [groups.get(id(factor), {}) for factor in layer.stored_factors(self.adapter)]
            A, B, C, D = (group.get("initial_lr", group.get("lr")) for group in of_factors)
            if B is not None and D is not None and A == B != C == D and self._holds_others(of_factors[3]):
                self.rates_told = True
                warn(
                    f"C and D of the Dual LoRA adapter {self.adapter!r} have the learning rate of other parameters, "
                    f"{float(D):.3g}, and A and B have {float(B):.3g}: as the names `lora_A` and `lora_B` choose, "
                    "where LoRA has no other factors. Put all parameters with 'dual_lora_' in their name in one group.",
                    stacklevel=4,
                )
                return
            if B is not None and D is not None and A == C == D != B:
                self.rates_told = True
                warn(
                    f"The factors of the Dual LoRA adapter {self.adapter!r} have learning rates as LoRA+ gives them by "
                    f"LoRA's names: B has {float(B):.3g}, and D, which is on the output's side as well, has "
                    f"{float(D):.3g} like A and C. Put the parameters with '.dual_lora_D.' in their name in the group "
                    "of B. (PEFT's `create_loraplus_optimizer` also takes those of embeddings for a linear layer's.)",
                    stacklevel=4,
                )
                return

    def _holds_others(self, group: dict[str, Any]) -> bool:
        """Whether an optimizer's group has parameters besides this adapter's factors, such as a head's."""
        own = set(map(id, self._factors()))
        return any(id(p) not in own for p in group["params"])

    def _factors(self) -> list[Tensor]:
        alive = [layer for layer in (one() for one in self.layers) if layer is not None]
        return [f for layer in alive if self.adapter in layer.states for f in layer.trainable_factors(self.adapter)]

    def after_step(self, optimizer: Optimizer, held: set[int]) -> None:
        """Check the factors after an optimizer's step. held: the ids of the optimizer's parameters."""
        factors = self._factors()
        if not factors:
            if not any(layer() for layer in self.layers):
                watches.discard(self)
            return  # it may be chosen to train later
        own = held.intersection(map(id, factors))
        self.held |= own
        if not own:
            self.foreign_steps += not self.own_steps and any(f.grad is not None for f in factors)
            if self.foreign_steps == FOREIGN_STEPS:
                self._warn(
                    f"get gradients, and no optimizer has updated them in {self.foreign_steps} optimizer steps. "
                    "Build the optimizer from the model's trainable parameters after the adapter was added (and after "
                    "moving or sharding the model)."
                )
            return
        if next(id(f) for f in factors if id(f) in self.held) not in own:
            return  # of several optimizers that each hold a part, one counts
        self.own_steps += 1
        if self.own_steps == OWN_STEPS:
            self._check_gradients(factors)
        elif self.own_steps == FOREIGN_STEPS:
            self._check_parts()
            watches.discard(self)

    def _check_parts(self) -> None:
        """Warn of layers of which some factors are in an optimizer and others, which get gradients, are in none."""
        left: dict[str, int] = {}
        for layer in (one() for one in self.layers):
            if layer is None or self.adapter not in layer.states:
                continue
            named = zip(layer.adapter_layer_names, layer.stored_factors(self.adapter), strict=True)
            trained = {name: id(f) in self.held for name, f in named if f.requires_grad and f.grad is not None}
            if any(trained.values()):
                for name in (name for name, is_held in trained.items() if not is_held):
                    left[name] = left.get(name, 0) + 1
        if left:
            self._warn(
                f"{' and '.join(left)} get gradients in {max(left.values())} layers, and no optimizer has updated them "
                f"in {self.own_steps} optimizer steps, while others of these layers train. Choose parameters by "
                "`requires_grad` or 'dual_lora_', as there are four factors where LoRA has A and B; or freeze them."
            )

    def _check_gradients(self, factors: list[Tensor]) -> None:
        grads = [f.grad for f in factors if f.grad is not None]
        # Each process checks its own parts only: collectives that not all processes reach would deadlock.
        parts = [local(g) for g in grads]
        if not grads:
            self._warn(
                f"got no gradient in optimizer step {self.own_steps}: they do not train. Is the loss connected to the "
                "adapted layers (no torch.no_grad(), no detach(); gradient checkpointing with use_reentrant=False or "
                "model.enable_input_require_grads()), and the adapter active?"
            )
        elif all(g.numel() for g in parts) and not any(bool(g.any()) for g in parts):
            self._warn(
                f"have gradients of exactly zero in optimizer step {self.own_steps}: they do not move. Is the output "
                "of the adapted layers used, and the loss finite and not constant?"
            )

    def _warn(self, what: str) -> None:
        warn(f"The factors of the Dual LoRA adapter {self.adapter!r} {what}", stacklevel=4)
        watches.discard(self)


class ResetWatch:
    """Warns of an adapter that a script begins anew by LoRA's names: B is zero again, and C and D are as they were.

    Version counters show a write to B between two steps; only then its values are read, of one layer.
    """

    def __init__(self, adapter: str, layer: Any):
        self.adapter = adapter
        forget = resets.discard  # held, as this module's names are gone when the interpreter ends
        # The layer does not outlive its model for this; a watch of a layer that is gone goes with it.
        self.layer = weakref.ref(layer, lambda _: forget(self))
        self.begun: tuple[int, ...] = ()  # the versions of B, C and D before a step
        self.seen: tuple[int, ...] = ()  # after the last step that moved B

    def _versions(self) -> tuple[int, ...]:
        """Return the versions of B, C and D; () for a layer that is gone or has no C and D."""
        layer = self.layer()
        if layer is None or self.adapter not in layer.states or not layer.states[self.adapter].r2:
            return ()
        return tuple(map(version, layer.stored_factors(self.adapter)[1:]))

    def before_step(self) -> None:
        """Warn if B was set to zero since the last step of an optimizer, and C and D were not written to."""
        now, seen = self._versions(), self.seen
        self.begun = now
        if not (now and seen) or now[0] == seen[0] or now[1:] != seen[1:]:
            return
        layer: Any = self.layer()
        if not local(layer.stored_factors(self.adapter).B).any():
            resets.discard(self)
            warn(
                f"B of the Dual LoRA adapter {self.adapter!r} was set to zero since the last optimizer step, and C and "
                "D were not: they have what was learned before, which this start does not forget. Scripts that reset "
                "an adapter by the names `lora_A` and `lora_B` do so. To begin anew call "
                "`layer.reset_dual_lora_parameters(adapter, model.peft_config[adapter])` for each DualLoraLayer.",
                stacklevel=4,
            )

    def after_step(self, optimizer: Optimizer) -> None:
        """Remember the versions after a step that moved B. (Fused optimizers raise no version, but keep a state.)"""
        now = self._versions()
        layer: Any = self.layer()
        if now and (now[:1] != self.begun[:1] or layer.stored_factors(self.adapter).B in optimizer.state):
            self.seen = now

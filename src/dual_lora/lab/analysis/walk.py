"""One run's adapted layers, one after another: what is measured of each."""

import math
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

from dual_lora.lab.analysis.contribution import contributions, factor_state
from dual_lora.lab.analysis.gradients import first_step, gradient_pass, is_linear
from dual_lora.lab.analysis.likeness import entry_likeness, likeness, magnitude_and_direction
from dual_lora.lab.analysis.matrices import Difference, Factored, Matrix, Sum
from dual_lora.lab.analysis.measures import measured, squared_norm
from dual_lora.lab.analysis.opened_run import OpenedRun
from dual_lora.lab.analysis.ranks import rank_bound, ranks
from dual_lora.lab.analysis.sampling import sampling_pass
from dual_lora.lab.analysis.trajectory import State, full_updates_of, updates_in
from dual_lora.lab.analysis.updates import LayerUpdate, adapted_layers, base_matrix
from dual_lora.lab.progress import Bar

Row = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """The choice of what an analysis looks at.

    states: at most so many of a run's states, start and end among them. layers: regular expression of layer names.
    ranks: of the first and the last state, of all, or of none (the costly part: O · I · min(O, I) flops a matrix).
    gradients: take a gradient pass at every state. held_out: records for the contribution of each group, 0 for none.
    draws: how often a group is drawn anew. what: the update and what made it, what sampling tokens would add to the
    gradient's variance at the last state, or both.
    """

    states: int = 8
    layers: str | None = None
    ranks: Literal["ends", "all", "none"] = "ends"
    gradients: bool = True
    held_out: int = 64
    draws: int = 3
    what: Literal["update", "sampling", "all"] = "update"


@dataclass
class RunAnalysis:
    """Tables of one run, one row a layer and state where nothing else is said.

    layers: signs, zeros, norms, flips, ranks, DoRA's two numbers; learned_share is ‖ΔW - ΔW at the start‖ / ‖ΔW‖, both
    at full strength. gradients: what the estimator cuts, shares of the groups. likeness: to full fine-tuning at the
    same step. first_step, contribution: one row a layer, a variant. sampling: one row a layer, at the last state.
    live: what `AnalysisCallback` wrote during training. magnitude_direction: correlation over layers and states.
    """

    name: str
    folder: str
    method: dict[str, Any]
    seed: int
    model: str
    data: str | None
    command: str | None = None
    steps: list[int] = field(default_factory=list)
    reference: str | None = None
    layers: list[Row] = field(default_factory=list)
    gradients: list[Row] = field(default_factory=list)
    likeness: list[Row] = field(default_factory=list)
    first_step: list[Row] = field(default_factory=list)
    contribution: list[Row] = field(default_factory=list)
    sampling: list[Row] = field(default_factory=list)
    live: list[Row] = field(default_factory=list)
    magnitude_direction: float | None = None
    notes: list[str] = field(default_factory=list)


@dataclass
class Walk:
    """One pass over a run's states. targets: by their steps, states of the run that it is compared with."""

    opened: OpenedRun
    result: RunAnalysis
    options: Options
    stops: list[State]
    layers: list[str]
    targets: dict[int, State]
    bar: Bar
    start: dict[str, LayerUpdate] = field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)

    def go(self) -> None:
        self.modules = adapted_layers(self.opened.model)
        if self.options.what != "sampling":
            self._update()
        if self.options.what != "update":
            self._sampling()

    def _sampling(self) -> None:
        """The layers of the last state, those with the most added variance first."""
        opened, last = self.opened, self.stops[-1]
        if opened.is_full:
            self.result.notes.append("Full fine-tuning has no adapted layers, whose tokens could be sampled.")
            return
        with ExitStack() as files:
            updates_in(opened, last, self.layers, files)
            rows = sampling_pass(opened.model, opened.step_batches, opened.loss_of_batch, names=self.layers)
        found = [{"step": last.step, "layer": name, **row} for name, row in rows.items()]
        self.result.sampling = sorted(found, key=lambda row: -row["added_25"])
        if self.options.what == "sampling":
            self.bar.to(self.bar.total, "sampling")

    def _update(self) -> None:
        loss_of = self._held_out_loss()  # first: records that are not there must not cost the walk
        with ExitStack() as files:
            before: dict[str, LayerUpdate] = {}
            step_before = 0
            for state in self.stops:
                now = updates_in(self.opened, state, self.layers, files)
                if state.step == 0:
                    self.start = now
                    self._at_start()
                target = self._target(state, files)
                for name in self.layers:
                    if name in now:
                        self._layer(state, name, now[name], before.get(name), step_before, target.get(name))
                    self.bar.to(self.bar.done + 1, f"step {state.step} · {name}")
                if state.step and self.options.gradients and not self.opened.is_full:
                    opened = self.opened
                    rows = gradient_pass(opened.model, opened.step_batches, opened.loss_of_batch, names=self.layers)
                    self.result.gradients += [{"step": state.step, "layer": n, **row} for n, row in rows.items()]
                before, step_before = now, state.step
            for row in (*self.result.gradients, *self.result.first_step):
                row["O"], row["I"] = self.sizes[row["layer"]]  # what means over layers are weighted by
            self._note_left_out()
            if loss_of is not None:
                self.result.contribution = contributions(
                    self.opened.model, self.start_factors, loss_of, self.options.draws, not self.opened.origin
                )

    def _note_left_out(self) -> None:
        """Adapted layers whose update is no one matrix, and those whose gradient is none."""
        if self.opened.is_full:
            return
        seen = [self.modules[name] for name in self.sizes if name in self.modules]
        count, without = len(self.layers) - len(self.sizes), sum(not is_linear(module) for module in seen)
        if count:
            self.result.notes.append(f"{count} adapted layers were left out: experts, whose update is no one matrix.")
        if self.options.gradients and without:
            self.result.notes.append(
                f"{without} layers have no figures of G = dyᵀ x: they are embeddings, convolutions or attention."
            )

    def _held_out_loss(self) -> Any:
        """The function that `contributions` asks, None where it is not wanted or the recipe names no such records."""
        if self.opened.is_full or not self.options.held_out:
            return None
        loss_of = self.opened.held_out_loss(self.options.held_out)
        if loss_of is None:
            self.result.notes.append("What each group contributes was left out: the recipe names no held-out records.")
        return loss_of

    def _at_start(self) -> None:
        if self.opened.is_full:
            return
        self.start_factors = factor_state(self.opened.model)
        if self.options.gradients:
            with self.opened.at_full_strength():
                steps = first_step(
                    self.opened.model,
                    self.opened.step_batches[0],
                    self.opened.loss_of_batch,
                    self.opened.recipe.train.learning_rate,
                    names=self.layers,
                )
            self.result.first_step = [{"layer": n, **row} for n, row in steps.items()]

    def _target(self, state: State, files: ExitStack) -> dict[str, LayerUpdate]:
        found = self.targets.get(state.step)
        return {} if found is None else files.enter_context(full_updates_of(found, self.opened.model, self.layers))

    def _layer(
        self,
        state: State,
        name: str,
        now: LayerUpdate,
        before: LayerUpdate | None,
        step_before: int,
        target: LayerUpdate | None,
    ) -> None:
        matrix = now.update()
        base = base_matrix(self.modules.get(name) or self.opened.model.get_submodule(name))
        if base is not None and name in self.opened.origin:  # the method's start was taken out of the base
            base = Sum(base, self.opened.origin[name].update())
        O, I = self.sizes[name] = matrix.shape
        first = self.start[name].update() if state.step and name in self.start else None
        earlier = {"start": first, "between": before.update() if before else None}
        row: Row = {"step": state.step, "layer": name, **measured(matrix, base, now.strength, earlier)}
        if base is not None and state.step:
            row |= magnitude_and_direction(matrix, base, now.strength)
        if first is not None:
            size = squared_norm(matrix)
            row["learned_share"] = math.sqrt(squared_norm(Difference(matrix, first)) / size) if size else None
        if before is not None:
            row["between_steps"] = state.step - step_before
        ends = state in (self.stops[0], self.stops[-1])
        if self.options.ranks == "all" or (self.options.ranks == "ends" and ends):
            row |= ranks(matrix)
            row["largest_singular_value"] *= now.strength
            if isinstance(matrix, Factored):
                row |= _group_ranks(matrix)
        self.result.layers.append(row)
        if target is not None:
            alike = self._likeness(matrix, target.update(), first)
            for name_of_size in {"norm_relative", "learned_norm_relative"} & set(alike):
                alike[name_of_size] *= now.strength
            self.result.likeness.append({"step": state.step, "layer": name, "O": O, "I": I, **alike})

    def _likeness(self, matrix: Matrix, target: Matrix, first: Matrix | None) -> Row:
        """Measure the update's likeness, and that of what was learned since the start if the start was not zero (Dual
        LoRA's Gaussian)."""
        row: Row = dict(likeness(matrix, target))
        if isinstance(first, Factored):
            learned = entry_likeness(Difference(matrix, first), target)
            row |= {f"learned_{k}": learned[k] for k in ("cosine", "norm_relative", "agreement_1", "agreement_10")}
        return row


def _group_ranks(matrix: Factored) -> Row:
    factors, form = matrix.adapter.factors, matrix.adapter.form
    row: Row = {"rank_bound": rank_bound(factors.A.shape[0], factors.C.shape[0], form, matrix.shape)}
    row |= {"r1": factors.A.shape[0], "r2": factors.C.shape[0] if form.trains_direction else 0}
    if not form.trains_direction:
        return row
    for group in ("magnitude", "direction"):
        row |= {f"{group}_{k}": v for k, v in ranks(matrix.group(group)).items()}  # type: ignore[arg-type]
    return row

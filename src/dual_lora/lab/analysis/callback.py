"""The analysis while a Trainer runs: every step is seen, so that flips are counted and not guessed from checkpoints."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dual_lora.lab.analysis.gradients import gradient_shares
from dual_lora.lab.analysis.measures import measured
from dual_lora.lab.analysis.updates import LayerUpdate, adapted_layers, base_matrix, snapshot


class AnalysisCallback(TrainerCallback):
    """Writes signs, zeros, norms, flips and gradient shares of an adapter to a JSON-lines file while it trains.

    >>> trainer = Trainer(…, callbacks=[AnalysisCallback("run/analysis/live.jsonl", every=10)])      # doctest: +SKIP

    file: one line a layer and look. every: optimizer steps between two looks (each costs about as much as composing
    all updates four times). flips_of_each_step: also count the signs that flip between one step and the next, at
    every look; this copies the adapter before the step. layers: look only at names that contain one of these.

    In a resumed run "start" is where it was resumed; the lines of the first session stay.
    """

    def __init__(
        self,
        file: str | Path,
        every: int = 10,
        adapter: str = "default",
        layers: list[str] | None = None,
        flips_of_each_step: bool = True,
    ):
        if every < 1:
            raise ValueError(f"every is {every}, expected at least 1 optimizer step.")
        self.file, self.every, self.adapter = Path(file), every, adapter
        self.layers, self.each_step = layers, flips_of_each_step
        self._start: dict[str, LayerUpdate] = {}
        self._before: dict[str, LayerUpdate] = {}
        self._shares: dict[str, dict[str, float]] = {}

    def _snapshot(self, model: Any) -> dict[str, LayerUpdate]:
        found = snapshot(model, self.adapter)
        return {n: u for n, u in found.items() if not self.layers or any(part in n for part in self.layers)}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Keep the start; begin the file anew unless the run is resumed."""
        self._start = self._snapshot(model)
        if not self._start:
            raise ValueError(f"The model has no adapter {self.adapter!r} to look at.")
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if state.global_step == 0 and state.is_world_process_zero:
            self.file.write_text("")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look at the gradients, which are there now, and gone after the step."""
        if self._looks_at(state.global_step + 1):
            layers = adapted_layers(model)
            self._shares = {name: gradient_shares(layers[name]) for name in self._start}
            self._before = self._snapshot(model) if self.each_step else {}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Look, and write one line a layer."""
        if not (self._looks_at(state.global_step) and state.is_world_process_zero):
            return
        layers = adapted_layers(model)
        lines = []
        for name, now in self._snapshot(model).items():
            before = self._before[name].update() if name in self._before else None
            earlier = {"start": self._start[name].update(), "step": before}
            row = {"step": state.global_step, "layer": name}
            row |= measured(now.update(), base_matrix(layers[name]), now.strength, earlier)
            lines.append(json.dumps(row | self._shares.get(name, {})) + "\n")
        with self.file.open("a", encoding="utf-8") as file:
            file.writelines(lines)
        self._before, self._shares = {}, {}

    def _looks_at(self, step: int) -> bool:
        return step == 1 or step % self.every == 0

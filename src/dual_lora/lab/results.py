"""Results of studies, analyses and benchmarks as pandas tables, for notebooks.

>>> study = load_study("results/activations/results.json")                       # doctest: +SKIP
>>> study.verdicts[["candidate", "task", "verdict", "difference", "low", "high"]]  # doctest: +SKIP
>>> analysis = load_analysis("results/trajectory/analysis.json")                 # doctest: +SKIP
>>> analysis.over_training("zero").plot()                                        # doctest: +SKIP

The files are those that `dual-lora compare`, `analyze` and the benchmarks write; nothing is computed but means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dual_lora.lab.errors import UserError
from dual_lora.lab.read import read_json

if TYPE_CHECKING:
    import pandas as pd


Row = dict[str, Any]


def mean_over_layers(rows: Sequence[Row], key: str) -> float | None:
    """Weighted by O · I where the rows have them; None where no row has the key."""
    found = [(row[key], row.get("O", 1) * row.get("I", 1)) for row in rows if row.get(key) is not None]
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else None


def spread_over_layers(rows: Sequence[Row], key: str) -> tuple[float, float]:
    """The values between which the middle 80 % of the layers lie, each layer counting once."""
    values = sorted(row[key] for row in rows if row.get(key) is not None)
    last = len(values) - 1
    return values[round(0.1 * last)], values[round(0.9 * last)]


def last_state(rows: Sequence[Row]) -> list[Row]:
    """The rows of the largest step."""
    last = max((row["step"] for row in rows), default=0)
    return [row for row in rows if row["step"] == last]


def _frame(rows: Any) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(rows)


@dataclass(frozen=True)
class StudyResults:
    """What a study says. `raw` is the content of its results.json."""

    file: Path
    raw: dict[str, Any] = field(repr=False)

    @property
    def name(self) -> str:
        """The study's name."""
        return self.raw["study"]["name"]

    @property
    def complete(self) -> bool:
        """Whether every run has ended."""
        return bool(self.raw["complete"])

    @property
    def sentences(self) -> list[str]:
        """The verdicts in words."""
        return [c["sentence"] for c in self.raw["comparisons"]]

    @cached_property
    def verdicts(self) -> pd.DataFrame:
        """One row a comparison: candidate, reference, task, verdict, difference, low, high, p_holm, visible, …"""
        rows = [{k: v for k, v in c.items() if k != "spread"} | dict(c["spread"]) for c in self.raw["comparisons"]]
        return _frame(rows)

    @cached_property
    def methods(self) -> pd.DataFrame:
        """One row a method and task: score, size, settings, and its costs as cost_*."""
        nested = ("trials", "seeds", "cost", "peft_method")
        return _frame(
            [
                {k: v for k, v in m.items() if k not in nested} | {f"cost_{k}": v for k, v in m["cost"].items()}
                for m in self.raw["methods"]
            ]
        )

    @cached_property
    def seeds(self) -> pd.DataFrame:
        """One row a final run: model, task, method, seed, status, score, seconds."""
        return self._nested("seeds")

    @cached_property
    def trials(self) -> pd.DataFrame:
        """One row a trial of the search, its settings in columns of their own."""
        return self._nested("trials")

    def _nested(self, part: str) -> pd.DataFrame:
        return _frame(
            [
                {k: m[k] for k in ("model", "task", "method", "metric")}
                | {k: v for k, v in item.items() if k not in ("settings", "figures")}
                | (item.get("settings") or {})
                for m in self.raw["methods"]
                for item in m[part]
            ]
        )

    @cached_property
    def pareto(self) -> pd.DataFrame:
        """One row a method, task and cost: quality, cost, and whether no other is better in both (front)."""
        return _frame(
            [
                {k: f[k] for k in ("model", "task", "metric", "label")} | {"kind": f["cost"]} | point
                for f in self.raw["pareto"]
                for point in f["points"]
            ]
        )


@dataclass(frozen=True)
class AnalysisResults:
    """What an analysis found. Each table has a column `run`; `raw` is the content of the file."""

    file: Path
    raw: dict[str, Any] = field(repr=False)

    @cached_property
    def runs(self) -> pd.DataFrame:
        """One row a run: name, folder, method, seed, model, data, command, magnitude_direction."""
        tables = ("layers", "gradients", "likeness", "first_step", "contribution", "live", "steps", "notes", "method")
        return _frame(
            [
                {k: v for k, v in r.items() if k not in tables} | {"method": r["method"]["name"]}
                for r in self.raw["runs"]
            ]
        )

    @cached_property
    def layers(self) -> pd.DataFrame:
        """One row a run, state and layer: signs, zeros, norms, flips, ranks."""
        return self._table("layers")

    @cached_property
    def gradients(self) -> pd.DataFrame:
        """One row a run, state and layer: shares of the groups, what the estimator cuts."""
        return self._table("gradients")

    @cached_property
    def likeness(self) -> pd.DataFrame:
        """One row a run, state and layer: likeness to full fine-tuning at the same step."""
        return self._table("likeness")

    @cached_property
    def first_step(self) -> pd.DataFrame:
        """One row a run and layer: where the first step goes."""
        return self._table("first_step")

    @cached_property
    def contribution(self) -> pd.DataFrame:
        """One row a run and variant: held-out loss with a group set back or drawn anew."""
        return self._table("contribution")

    @cached_property
    def live(self) -> pd.DataFrame:
        """One row a run, look and layer, written by the callback during training."""
        return self._table("live")

    def _table(self, name: str) -> pd.DataFrame:
        return _frame([{"run": run["name"], **row} for run in self.raw["runs"] for row in run[name]])

    def over_training(self, measure: str, table: str = "layers") -> pd.DataFrame:
        """Means over layers (weighted by entries) of one measure: a row a step, a column a run.

        Raises UserError for a measure that the table does not have.
        """
        from dual_lora.lab.errors import suggest
        from dual_lora.lab.results import mean_over_layers

        known = {key for run in self.raw["runs"] for row in run[table] for key in row}
        if measure not in known:
            raise UserError(f"The table {table} has no measure {measure!r}.{suggest(measure, known)}")
        columns = {}
        for run in self.raw["runs"]:
            steps = dict.fromkeys(row["step"] for row in run[table])
            columns[run["name"]] = {
                step: mean_over_layers([r for r in run[table] if r["step"] == step], measure) for step in steps
            }
        return _frame(columns).astype("float64").rename_axis("step").sort_index()


def load_study(path: str | Path) -> StudyResults:
    """Results of `dual-lora compare`: its results.json, or the folder that holds it."""
    file, value = _read(path, "results.json")
    if "study" not in value or "comparisons" not in value:
        raise UserError(f"{file} is no study's results; `dual-lora compare` writes them.")
    return StudyResults(file, value)


def load_analysis(path: str | Path) -> AnalysisResults:
    """Results of `dual-lora analyze`: its JSON file, or the folder that holds analysis.json."""
    from dual_lora.lab.report.gather import ANALYSIS

    file, value = _read(path, "analysis.json")
    if value.get("format") != ANALYSIS:
        raise UserError(f"{file} is no analysis; `dual-lora analyze` writes them.")
    return AnalysisResults(file, value)


def load_ledger(path: str | Path = "benchmarks/ledger.jsonl") -> pd.DataFrame:
    """All rows of the benchmark ledger."""
    from dual_lora.lab.report.gather import read_lines

    try:
        return _frame(read_lines(Path(path)))
    except FileNotFoundError:
        raise UserError(f"There is no ledger {path}; `make bench` writes one.") from None


def _read(path: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    file = Path(path)
    file = file / name if file.is_dir() else file
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}.") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, expected results.")
    return file, value

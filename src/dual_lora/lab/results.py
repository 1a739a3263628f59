"""Results of studies, analyses and benchmarks as pandas tables, for notebooks.

>>> study = load_study("results/studies/quick/results.json")               # doctest: +SKIP
>>> study.verdicts[["candidate", "task", "verdict", "difference", "low", "high"]]  # doctest: +SKIP
>>> analysis = load_analysis("results/trajectory/analysis.json")                 # doctest: +SKIP
>>> analysis.over_training("zero").plot()                                        # doctest: +SKIP

The files are those that `dual-lora compare`, `analyze` and the benchmarks write; nothing is computed but means.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import read_json, read_json_lines, read_object

if TYPE_CHECKING:
    import pandas as pd


Row = dict[str, Any]

ANALYSIS = "dual-lora analysis"  # the format of its file


MOST_FIGURES = 100_000  # of one evaluation, in the table of its variants and metrics


def read_evaluation(file: Path) -> Row:
    """The result of an evaluation. Raises OSError, or ValueError for none, and for more figures than any has."""
    result = read_object(file)
    variants = result["metrics"].values() if isinstance(result.get("metrics"), dict) else ()
    if not all(isinstance(figures, dict) for figures in variants):
        raise ValueError("its metrics are no figures by the names of models")
    if (count := len(variants) * len({name for figures in variants for name in figures})) > MOST_FIGURES:
        raise ValueError(f"it holds a table of {count:,} figures, expected at most {MOST_FIGURES:,}")
    return result


def mean_over_layers(rows: Sequence[Row], key: str) -> float | None:
    """Return the mean, weighted by O · I where the rows have them; None where no row has the key."""
    here = [row for row in rows if row.get(key) is not None]  # a text times a number would be a text of that length
    found = [(float(row[key]), float(row.get("O", 1)) * float(row.get("I", 1))) for row in here]
    total = sum(weight for _, weight in found)
    return sum(value * weight for value, weight in found) / total if total else None


def with_sizes(analysis: Row) -> Row:
    """An analysis whose every row of a layer has its O and I: older files have them in their first table alone."""
    for run in analysis["runs"]:
        sizes = {row["layer"]: {"O": row["O"], "I": row["I"]} for row in run["layers"]}
        for table in ("gradients", "first_step", "live"):
            run[table] = [sizes.get(row["layer"], {}) | row for row in run.get(table, [])]
    return analysis


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

    return pd.DataFrame(rows if isinstance(rows, dict) else list(rows))


def _without(values: Row, keys: Sequence[str]) -> Row:
    return {key: value for key, value in values.items() if key not in keys}


@dataclass(frozen=True, eq=False)
class StudyResults:
    """The results of a study: `raw` is the content of its results.json, `sentences` are the verdicts in words.

    verdicts: one row a comparison: candidate, reference, task, verdict, difference, low, high, p_holm, visible, …
    methods: a row a method and task: score, size, settings, and its costs as cost_*.
    seeds: a row a final run: model, task, method, seed, status, score, seconds. trials: a row a trial of the search,
        its settings in columns of their own.
    pareto: a row a method, task and cost: quality, cost, and whether no other is better in both (front).
    """

    file: Path
    raw: dict[str, Any] = field(repr=False)
    name: str
    complete: bool
    sentences: list[str] = field(repr=False)
    verdicts: pd.DataFrame = field(repr=False)
    methods: pd.DataFrame = field(repr=False)
    seeds: pd.DataFrame = field(repr=False)
    trials: pd.DataFrame = field(repr=False)
    pareto: pd.DataFrame = field(repr=False)


@dataclass(frozen=True, eq=False)
class AnalysisResults:
    """The results of an analysis: `raw` is the content of its file. Each table but `runs` has a column `run`.

    runs: one row a run: name, folder, method, seed, model, data, command, magnitude_direction.
    layers: a row a run, state and layer: signs, zeros, norms, flips, ranks. gradients: the same for shares of the
        groups and what the estimator cuts. likeness: the same for likeness to full fine-tuning at the same step.
    first_step: a row a run and layer: where the first step goes.
    contribution: a row a run and variant: held-out loss with a group set back or drawn anew.
    sampling: a row a run and layer: what a sample of the tokens adds to the variance of G.
    live: a row a run, look and layer, written by the callback during training.
    """

    file: Path
    raw: dict[str, Any] = field(repr=False)
    runs: pd.DataFrame = field(repr=False)
    layers: pd.DataFrame = field(repr=False)
    gradients: pd.DataFrame = field(repr=False)
    likeness: pd.DataFrame = field(repr=False)
    first_step: pd.DataFrame = field(repr=False)
    contribution: pd.DataFrame = field(repr=False)
    sampling: pd.DataFrame = field(repr=False)
    live: pd.DataFrame = field(repr=False)

    def over_training(self, measure: str, table: str = "layers") -> pd.DataFrame:
        """Means over layers (weighted by entries) of one measure: a row a step, a column a run.

        Raises UserError for a measure that the table does not have.
        """
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
    nested = ("trials", "seeds", "cost", "peft_method")
    return StudyResults(
        file,
        value,
        value["study"]["name"],
        bool(value["complete"]),
        [c["sentence"] for c in value["comparisons"]],
        verdicts=_frame(_without(c, ("spread",)) | c["spread"] for c in value["comparisons"]),
        methods=_frame(_without(m, nested) | {f"cost_{k}": v for k, v in m["cost"].items()} for m in value["methods"]),
        seeds=_runs(value, "seeds"),
        trials=_runs(value, "trials"),
        pareto=_frame(
            {k: f[k] for k in ("model", "task", "metric", "label")} | {"kind": f["cost"]} | point
            for f in value["pareto"]
            for point in f["points"]
        ),
    )


def _runs(results: dict[str, Any], part: Literal["seeds", "trials"]) -> pd.DataFrame:
    return _frame(
        {k: m[k] for k in ("model", "task", "method", "metric")}
        | _without(run, ("settings", "figures"))
        | (run.get("settings") or {})
        for m in results["methods"]
        for run in m[part]
    )


def load_analysis(path: str | Path) -> AnalysisResults:
    """Results of `dual-lora analyze`: its JSON file, or the folder that holds analysis.json."""
    file, value = _read(path, "analysis.json")
    if value.get("format") != ANALYSIS:
        raise UserError(f"{file} is no analysis; `dual-lora analyze` writes them.")
    runs = with_sizes(value)["runs"]
    tables = ("layers", "gradients", "likeness", "first_step", "contribution", "sampling", "live")
    return AnalysisResults(
        file,
        value,
        _frame(_without(r, (*tables, "steps", "notes")) | {"method": r["method"]["name"]} for r in runs),
        **{name: _frame({"run": run["name"], **row} for run in runs for row in run.get(name, [])) for name in tables},
    )


def load_ledger(path: str | Path = "benchmarks/ledger.jsonl") -> pd.DataFrame:
    """All rows of the benchmark ledger."""
    try:
        return _frame(read_json_lines(Path(path)))
    except FileNotFoundError:
        raise UserError(f"There is no ledger {path}; `make bench` writes one.") from None
    except ValueError as error:
        raise UserError(f"The ledger {path} is damaged: {error}. Take that line out.") from None


def _read(path: str | Path, name: str) -> tuple[Path, dict[str, Any]]:
    file = Path(path)
    file = file / name if file.is_dir() else file
    try:
        value = read_json(file)
    except FileNotFoundError:
        raise UserError(f"There is no file {file}: expected {name}, or a folder that holds it.") from None
    except ValueError as error:
        raise UserError(f"{file} is no JSON: {error}.") from None
    if not isinstance(value, dict):
        raise UserError(f"{file} holds {type(value).__name__}, expected results.")
    return file, value

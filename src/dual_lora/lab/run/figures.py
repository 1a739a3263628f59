"""The figures of a task: what the rows of all its examples add up to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from dual_lora.lab.data.examples import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.run.nlg import nlg_figures

if TYPE_CHECKING:
    from dual_lora.lab.run.scoring import Rows


def figures(task: str, rows: Rows, examples: list[Example]) -> dict[str, float]:
    """The figures of a task over its rows; of several test sets (`Example.part`) each, and their mean first."""
    parts = list(dict.fromkeys(example.part for example in examples))
    if len(parts) < 2:
        return summary(task, rows, examples)
    each = {}
    for part in parts:
        if task in ("bleu", "nlg"):  # a row is a prompt
            each[part] = summary(task, [row for row in rows if row["part"] == part], [])
            continue
        own = [i for i, example in enumerate(examples) if example.part == part]
        each[part] = summary(task, [rows[i] for i in own], [examples[i] for i in own])
    names = [name for name in each[parts[0]] if all(name in own for own in each.values())]  # a correlation may not be
    means = {name: sum(own[name] for own in each.values()) / len(parts) for name in names}
    return means | {f"{name}/{part}": value for part, own in each.items() for name, value in own.items()}


def summary(task: str, rows: Rows, examples: list[Example]) -> dict[str, float]:
    """The figures of a task over its rows, all taken together."""
    if task == "loss":
        nats, tokens = sum(r["nats"] for r in rows), sum(r["tokens"] for r in rows)
        loss = nats / tokens
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if task == "nlg":
        return nlg_figures([r["predicted"] for r in rows], [r["references"] for r in rows])
    if task == "bleu":
        try:
            from sacrebleu import corpus_bleu
        except ImportError:
            raise UserError("The task bleu needs sacrebleu: `pip install sacrebleu`.") from None
        most = max(len(r["references"]) for r in rows)
        columns: Any = [[r["references"][k] if k < len(r["references"]) else None for r in rows] for k in range(most)]
        return {"bleu": corpus_bleu([r["predicted"] for r in rows], columns).score}
    if task == "regression":
        from scipy.stats import pearsonr, spearmanr

        values, labels = [float(r["predicted"]) for r in rows], [float(e.label) for e in examples]
        error = {"mse": sum((v - label) ** 2 for v, label in zip(values, labels, strict=True)) / len(rows)}
        if len({*values}) < 2 or len({*labels}) < 2:  # a correlation is not defined
            return error
        own = {"pearson": pearsonr, "spearman": spearmanr}
        return {name: float(of(values, labels).statistic) for name, of in own.items()} | error
    accuracy = sum(r["correct"] for r in rows) / len(rows)
    if task != "classification":
        return {task: accuracy}
    from sklearn.metrics import f1_score, matthews_corrcoef

    truth, guess = [e.label for e in examples], [r["predicted"] for r in rows]
    return {
        "accuracy": accuracy,
        "f1": float(f1_score(truth, guess, average="macro", zero_division=0)),
        "matthews": float(matthews_corrcoef(truth, guess)),
        "loss": sum(r["nats"] for r in rows) / len(rows),
    }

"""A study, an analysis and a ledger to report on, made by the laboratory's own statistics; hostile names wherever a
name may come from elsewhere."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

HOSTILE = '<img src=x onerror="window.pwned=1"></script><script>window.pwned=2</script>&amp;\'`|\\$'


def study(hostile: str = "lora|x") -> dict[str, Any]:
    """Results of a study of four methods on two tasks, three seeds."""

    from dual_lora.lab.study import verdicts

    draw = np.random.default_rng(0)
    means = {"dual_lora": 0.74, "lora": 0.70, "dora": 0.705, hostile: 0.62}
    comparisons, methods, pareto = [], [], []
    for task in ("boolq", "arc"):
        scores = {m: (draw.random((3, 60)) < mean).astype(float) for m, mean in means.items()}
        comparisons += [
            verdicts.compare_pair(scores[m], scores["lora"], names=(m, "lora"), task=task, metric="choice", margin=0.05)
            for m in means
            if m != "lora"
        ]
        for i, (m, table) in enumerate(scores.items()):
            methods.append(_method(m, task, table, i))
        pareto.append(
            {
                "model": "", "task": task, "metric": "choice", "cost": "peak_memory", "label": "peak memory [bytes]",
                "points": [
                    {"method": m["method"], "quality": m["score"], "cost": m["cost"]["peak_memory"], "front": i < 2}
                    for i, m in enumerate(methods[-4:])
                ],
            }
        )  # fmt: skip
    judged = verdicts.judge(comparisons)
    return {
        "format": 1,
        "study": {"name": f"activations {hostile}", "question": f"Is it {hostile}?", "level": 0.05},
        "complete": False,
        "methods": methods,
        "comparisons": [
            dataclasses.asdict(c) | {"sentence": c.sentence, "model": "", "verdict": str(c.verdict)} for c in judged
        ],
        "pareto": pareto,
        "notes": [f"A note on {hostile}."],
        "untrained": [{"model": "", "task": "boolq", "metric": "choice", "score": 0.5}],
        "failed": [f"{hostile}: out of memory"],
        "provenance": {
            "command": f"dual-lora compare {hostile}", "commit": "abc123", "device": "a CPU", "finished": "2026-01-01",
            "versions": {"torch": "2.13"},
        },
    }  # fmt: skip


def _method(name: str, task: str, table: Any, i: int) -> dict[str, Any]:
    return {
        "model": "", "task": task, "method": name, "about": "", "peft_method": {"name": "lora"}, "metric": "choice",
        "better": "more", "rank": 8, "trainable_parameters": 1000 + i, "base_parameters": 100_000, "mismatch": 0.001,
        "notes": [], "settings": {"train.learning_rate": 1e-3},
        "trials": [
            {"settings": {"train.learning_rate": rate}, "status": "done", "score": 0.6 + rate, "seconds": 1,
             "key": f"trial-{task}-{i}-{rate:g}"}
            for rate in (1e-4, 1e-3, 1e-2)
        ],
        "seeds": [
            {"seed": s, "key": f"final-{task}-{i}-{s}", "status": "done", "score": float(row.mean()), "seconds": 1.0,
             "figures": None}
            for s, row in enumerate(table)
        ],
        "score": float(table.mean()), "score_deviation": float(table.mean(1).std(ddof=1)), "items": 60, "diverged": 0,
        "diverged_in_search": False,
        "cost": {
            "train_seconds": 10.0 + i, "steps_per_second": 3.0, "tokens_per_second": 900.0,
            "peak_memory": 1e9 + 1e8 * i,
            "adapter_bytes": 4e5, "merge_seconds": 0.1, "forward_slowdown": 1.2, "decode_slowdown": None,
        },
    }  # fmt: skip


def analysis(hostile: str = "lora|x") -> dict[str, Any]:
    """An analysis of two runs with three layers and three states."""
    runs = [_run("dual", {"name": "dual_lora", "r": 8}, True), _run(hostile, {"name": "lora", "r": 8}, False)]
    return {
        "format": "dual-lora analysis",
        "version": 1,
        "runs": runs,
        "options": {},
        "made": {
            "command": f"dual-lora analyze {hostile}",
            "commit": "abc123",
            "device": "x",
            "versions": {"torch": "2"},
        },
        "rank_examples": [{"what": "i - j", "operation": "ReLU", "before": 2, "after": 15, "size": 16}],
    }


def _run(name: str, method: dict[str, Any], dual: bool) -> dict[str, Any]:
    layers, gradients, likeness = [], [], []
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    for step in (0, 10, 20):
        for i, layer in enumerate(names):
            at: dict[str, Any] = {"step": step, "layer": layer, "O": 32, "I": 16 * (i + 1)}
            row = at | {
                "strength": min(1.0, step / 10), "zero": 0.5 + 0.01 * i, "positive": 0.25, "negative": 0.25 - 0.01 * i,
                "norm": 0.1 * step, "norm_ratio": 0.01 * step, "largest": 0.1, "rms": 0.01, "largest_ratio": 0.3,
                "rank_effective": 12.0 + i, "rank_stable": 2.0, "rank_numerical": 16.0, "rank_90": 5.0, "rank_99": 9.0,
            }  # fmt: skip
            if step:
                row |= {"magnitude_change": 0.01 * step * (i + 1), "direction_change": 0.001 * step * (i + 1)}
                row |= {
                    "between_flipped": 0.05,
                    "between_direction_flipped": 0.1 if dual else None,
                    "between_steps": 10,
                }
                row |= {"start_flipped": 0.01 * step / 10, "start_switched_on": 0.02, "start_switched_off": 0.03}
                likeness.append(at | {"cosine": 0.02 * step / 10, "cosine_chance": 0.01, "norm_relative": 0.4} | {
                    f"{k}_{n}": 0.4 for k in ("agree", "disagree", "rest", "agreement") for n in (1, 10)
                } | {"subspace": 8, "overlap_left": 0.4, "overlap_left_chance": 0.2, "overlap_right": 0.3,
                     "overlap_right_chance": 0.2, "angle_left": 40.0, "angle_right": 50.0})  # fmt: skip
                share = {
                    "share_magnitude": 0.7,
                    "share_direction": 0.3,
                    "cut": 0.001,
                    "cut_moving": 0.002,
                    "lost": 0.01,
                }
                gradients.append(at | (share if dual else {"share_lora_A": 0.4, "share_lora_B": 0.6}))
            if dual:
                row |= {"direction_positive": 0.49, "start_direction_flipped": 0.005 * step, "rank_bound": 32}
                for group in ("magnitude", "direction"):
                    row |= {
                        f"{group}_{k}": 7.0
                        for k in ("rank_effective", "rank_stable", "rank_numerical", "rank_90", "rank_99")
                    }
            layers.append(row)
    return {
        "name": name, "folder": f"runs/{name}", "method": method, "seed": 1, "model": "m", "data": "d", "command": "c",
        "steps": [0, 10, 20], "reference": "runs/full", "layers": layers, "gradients": gradients, "likeness": likeness,
        "first_step": [{"layer": n, "gradient_cosine": 0.1, "sign_cosine": None} for n in names],
        "contribution": [
            {"what": "as trained", "group": "", "loss": 0.5, "spread": None, "draws": 1},
            {"what": "drawn anew", "group": "direction", "loss": 1.5, "spread": 0.2, "draws": 3},
        ],
        "live": [], "magnitude_direction": -0.3, "notes": [f"A note on {name}."],
    }  # fmt: skip


def ledger() -> list[dict[str, Any]]:
    """Rows of a benchmark ledger: a gate measured twice, a curve of two points, and a kind of its own."""
    row = {
        "device": "a CPU", "versions": {"torch": "2"}, "threads": 1, "subject": "dual", "against": "lora", "unit": "s",
        "median": 0.1, "spread": 0.01, "median_against": 0.07, "rounds": 9, "share_of_cores": 0.9,
    }  # fmt: skip
    gate = row | {"kind": "gate", "work": "linear 4096", "shape": {"O": 4096, "T": 512}, "at_most": 1.5}
    curve = row | {"kind": "curve", "work": "tokens", "limit": 1.4}
    return [
        gate | {"ratio": 1.7, "interval": [1.6, 1.8], "mark": "✗", "commit": "aaa", "date": "2026-01-01"},
        gate | {"ratio": 1.4, "interval": [1.3, 1.45], "mark": "✓", "commit": "bbb", "date": "2026-01-02"},
        curve | {"at": 512, "ratio": 1.6, "interval": [1.5, 1.7], "shape": {"T": 512}},
        curve | {"at": 16, "ratio": 3.6, "interval": [3.5, 3.7], "shape": {"T": 16}},
        row | {"kind": "block", "work": "sweep", "ratio": 1.0, "block": 4096},
    ]


def write(folder: Path, hostile: str = "lora|x") -> Path:
    """All of it in a folder, laid out as the commands lay it out."""
    for name, value in (
        ("study/results.json", study(hostile)),
        ("runs/dual/analysis/analysis.json", analysis(hostile)),
    ):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(_finite(value)))
    (folder / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ledger()))
    return folder


def data_of(page: str) -> dict[str, Any]:
    """What the page's script reads: charts with their views, and the forms of export."""
    packed = page[page.index('id="data"') :].partition(">")[2].partition("<")[0]
    return json.loads(gzip.decompress(base64.b64decode(packed)))


def points_of(view: dict[str, Any]) -> list[dict[str, Any]]:
    """The points of a chart's view, as they are drawn."""
    return view["spec"]["data"]["values"]


def write_studies(folder: Path, *studies: dict[str, Any]) -> Path:
    """Several studies in a folder."""
    for i, each in enumerate(studies):
        (folder / f"s{i}").mkdir(parents=True)
        (folder / f"s{i}" / "results.json").write_text(json.dumps(_finite(each)))
    return folder


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""From outcomes to results: comparisons, ranks, fronts and notes, on made-up runs."""

from __future__ import annotations

import io

import numpy as np
import pytest
from rich.console import Console

pytest.importorskip("pydantic")

from dual_lora.lab.comparison.budget import Size
from dual_lora.lab.comparison.perform import scores_file
from dual_lora.lab.comparison.plan import Cell
from dual_lora.lab.comparison.state import write_json
from dual_lora.lab.comparison.study import MethodEntry, build_study
from dual_lora.lab.comparison.tables import show_results
from dual_lora.lab.comparison.verdicts import Finished, build_results
from dual_lora.lab.recipe import build_recipe

SEEDS = 4
RECIPE = build_recipe({"model": {"path": "x"}, "evaluate": {"tasks": ["choice"]}})


def made(tmp_path, skill, tasks=("a", "b"), diverged=(), speed=None, **study):
    """Results of methods with the given skills: chance of a right answer on each task."""
    random = np.random.default_rng(0)
    finished = []
    for task in tasks:
        ease = random.random(150)
        for method, chance in skill.items():
            finals = []
            for seed in range(SEEDS):
                key = f"{task}{method}{seed}"
                job = {"key": key, "seed": seed, "metric": "choice", "settings": {}}
                if (method, seed) in diverged:
                    finals.append((job, {"key": key, "status": "diverged", "error": "NaN", "seconds": 1.0}))
                    continue
                right = (ease < chance).astype(float)
                flips = random.random(150) < 0.05
                right[flips] = 1 - right[flips]
                write_json(scores_file(tmp_path, key), right[:, None].tolist())
                training = {
                    "seconds": (speed or {}).get(method, 1.0),
                    "tokens_per_second": 1.0,
                    "peak_memory": 1,
                    "adapter_bytes": 1,
                }
                outcome = {"key": key, "status": "done", "score": right.mean(), "seconds": 1.0}
                finals.append((job, outcome | {"training": training, "steps_per_second": 1.0}))
            entry = MethodEntry.model_validate({"name": "lora"})
            trials = [
                (
                    {"key": f"t{lr}", "settings": {"train.learning_rate": lr}},
                    {"status": "done", "score": 1.0, "seconds": 1},
                )
                for lr in (1e-3, 3e-3, 1e-2)
            ]
            cell = Cell("", task, method, entry, RECIPE, "choice", Size(10, 100), None)
            finished.append(Finished(cell, trials, {"train.learning_rate": 1e-2}, finals))
    settings = {"name": "s", "tasks": list(tasks), "methods": {name: {} for name in skill}, "seeds": SEEDS} | study
    return build_results(build_study(settings), finished, tmp_path)


def test_a_clear_winner_on_two_tasks(tmp_path):
    results = made(tmp_path, {"weak": 0.5, "strong": 0.8, "twin": 0.5}, margin={"choice": 0.1})
    verdicts = {(c["candidate"], c["task"]): c["verdict"] for c in results["comparisons"]}
    assert verdicts[("strong", "a")] == verdicts[("strong", "b")] == "better"
    assert verdicts[("twin", "a")] == "equivalent within the margin"
    overall = {row["candidate"]: row for row in results["overall"]}
    assert overall["strong"]["tasks"] == ["a", "b"]
    assert overall["strong"]["low"] > 0
    assert overall["twin"]["low"] < 0 < overall["twin"]["high"]
    (ranking,) = results["ranking"]
    assert next(iter(ranking["ranks"])) == "strong"
    assert ranking["tasks"] == ["a", "b"]
    assert any("largest train.learning_rate tried" in note for note in results["notes"])
    sentences = {c["candidate"]: c["sentence"] for c in results["comparisons"]}
    assert sentences["strong"].endswith(" weak did best with the largest train.learning_rate tried (0.01).")
    assert "did best" not in sentences["twin"]  # no winner, no loser
    page = io.StringIO()
    show_results(results | {"failed": [], "untrained": []}, Console(file=page, width=160))
    assert "equivalent within the margin" in page.getvalue()
    assert "Average rank over 2 tasks" in " ".join(page.getvalue().split())


def test_all_pairs_are_corrected_for(tmp_path):
    skill = {"one": 0.5, "two": 0.5, "three": 0.5, "four": 0.8}
    results = made(tmp_path, skill, tasks=("a",), pairs="all")
    assert len(results["comparisons"]) == 6
    assert all(c["p_holm"] >= c["p"] for c in results["comparisons"])
    better = {(c["candidate"], c["reference"]) for c in results["comparisons"] if c["verdict"] == "better"}
    assert better == {("four", "one"), ("four", "two"), ("four", "three")}


def test_pareto_front(tmp_path):
    skill, speed = {"slow good": 0.8, "fast poor": 0.4, "slow poor": 0.3}, {"fast poor": 0.5}
    results = made(tmp_path, skill, tasks=("a",), speed=speed)
    (front,) = [f for f in results["pareto"] if f["cost"] == "train_seconds"]
    assert {p["method"] for p in front["points"] if p["front"]} == {"slow good", "fast poor"}


def test_diverged_seed_counts_with_the_worst_score(tmp_path):
    sound = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",))
    results = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",), diverged={("b", 2)})
    worst = min(s["score"] for m in results["methods"] for s in m["seeds"] if s["score"] is not None)
    good = [s["score"] for s in results["methods"][1]["seeds"] if s["score"] is not None]
    assert results["methods"][1]["score"] == pytest.approx((sum(good) + worst) / SEEDS)
    assert results["methods"][1]["score"] < sound["methods"][1]["score"]
    assert sound["comparisons"][0]["verdict"] == "better"
    assert results["comparisons"][0]["verdict"] == "not distinguishable", "one run in four is no sure thing"
    assert any("1 of 4 runs of b on t diverged" in note for note in results["notes"])


def test_everything_diverged(tmp_path):
    all_lost = {(m, s) for m in ("a", "b") for s in range(SEEDS)}
    results = made(tmp_path, {"a": 0.5, "b": 0.7}, tasks=("t",), diverged=all_lost)
    assert results["comparisons"] == []
    assert "nothing to compare" in results["notes"][0]

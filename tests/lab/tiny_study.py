"""A study that runs in seconds, and made-up runs to judge.

The runs are of a tiny random Llama that learns whether a prompt's last letter is an early one.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

SHORT = {"search": None, "seeds": 1}  # three runs
SEEDS = 4  # of made-up runs


def write_model(folder: Path) -> Path:
    """A Llama of 20 thousand parameters with a word tokenizer, saved like any other model."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<unk>", *"abcdefghijklmnop", "yes", "no", "next", "?"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def write_records(path: Path, seed: int, count: int) -> Path:
    """Prompts of a few letters; the answer says whether the last letter is an early one."""
    import random

    draw = random.Random(seed)
    records = []
    for _ in range(count):
        letters = [draw.choice("abcdefghijklmnop") for _ in range(5)]
        answer = "yes" if letters[-1] < "i" else "no"
        records.append({"prompt": f"{' '.join(letters)} ?", "answer": answer, "choices": ["yes", "no"]})
    path.write_text("".join(json.dumps(r) + "\n" for r in records), encoding="utf-8")
    return path


def write_study(folder: Path, **changes: Any) -> Path:
    """Model, data, recipe and study in `folder`; returns the study file. `changes` replace parts of the study."""
    if not (folder / "model").exists():
        write_model(folder / "model")
        write_records(folder / "train.jsonl", 1, 64)
        write_records(folder / "test.jsonl", 2, 40)
    recipe = {
        "name": "letters",
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"),
            "test": str(folder / "test.jsonl"),
            "choices": ["yes", "no"],
            "template": "plain",
            "holdout": 16,
        },
        "train": {"steps": 4, "batch_size": 8, "checkpoint_every": 2, "log_every": 2},
        "evaluate": {"tasks": ["choice"]},
    }
    (folder / "letters.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    study: dict[str, Any] = {
        "name": "tiny",
        "question": "Does it run?",
        "tasks": {"letters": {"recipe": str(folder / "letters.yaml"), "metric": "loss"}},
        "methods": {"lora": {"r": 4, "lora_alpha": "2r"}, "dual_lora": {}},
        "reference": "lora",
        "budget": {"match": "parameters", "like": "lora"},
        "seeds": 2,
        "search": {"space": {"learning_rate": [1e-3, 1e-2]}},
        "cost": False,
    }
    study |= changes
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({k: v for k, v in study.items() if v is not None}, sort_keys=False), encoding="utf-8"
    )
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Model and data, made once; tests write their own studies beside them."""
    return write_study(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="session")
def whole(tiny):
    """The study run without interruption: what every other way of running it has to give."""
    from dual_lora.lab.study.compare import compare

    return compare(write_study(tiny), tiny / "whole", progress=False)


@pytest.fixture(scope="session")
def short(tiny):
    """The same without a search and with one seed."""
    from dual_lora.lab.study.compare import compare

    return compare(write_study(tiny, **SHORT), tiny / "short", progress=False)


@pytest.fixture
def no_training(monkeypatch):
    """A study's runs are the base, evaluated: for what does not depend on what was learnt."""
    from dual_lora.lab.study import perform

    def scored(job, runs, keep):
        return perform._base(job, runs) | {"training": {"steps": 4, "seconds": 1.0}}

    monkeypatch.setattr(perform, "_trained", scored)


@pytest.fixture
def copy_of_whole(tiny, whole, tmp_path):
    """The finished study's folder, to be damaged."""
    write_study(tiny)
    return Path(shutil.copytree(tiny / "whole", tmp_path / "out"))


def figures(results):
    """All that must not depend on how the runs were done: no times."""
    seeds = [[(s["seed"], s["key"], s["status"], s["score"]) for s in m["seeds"]] for m in results["methods"]]
    trials = [[(t["key"], t["status"], t["score"]) for t in m["trials"]] for m in results["methods"]]
    return seeds, trials, results["comparisons"]


def outcomes(folder):
    """Name -> time of writing of every finished run: a repeated run would write its file again."""
    return {p.name: p.stat().st_mtime_ns for p in (folder / "runs").glob("*.json") if p.stem.isalnum()}


def in_child(work):
    """Run in a forked process; returns its exit code, negative for a signal."""
    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    return child.exitcode


def die():
    """End this process as SIGKILL does."""
    os.kill(os.getpid(), signal.SIGKILL)


def laid_out(folder, **changes):
    """The study and its cells by method."""
    from dual_lora.lab.study.plan import Plan, lay_out
    from dual_lora.lab.study.read import read_study

    study = read_study(write_study(folder, **changes))
    return study, {cell.method: cell for cell in lay_out(Plan.read(study))}


def job(task="t", method="a", seed=0, metric="choice", kind="final", settings=None):
    """A job that is never done."""
    from dual_lora.lab.recipe.read import build_recipe
    from dual_lora.lab.study.job import Job

    recipe = build_recipe({"model": {"path": f"{task} {method}"}, "evaluate": {"tasks": ["choice"]}})
    recipe.train.seed = seed
    return Job(kind, recipe, "", task, method, seed, metric, "test", settings or {})


def ended(of, **outcome):
    """The job with an outcome. Its training cost nothing unless told."""
    from dual_lora.lab.study.job import Outcome

    return of, Outcome(**{"key": of.key, "status": "done", "seconds": 1.0, "training": {}} | outcome)


def trials(scores, key="", **more):
    """Ended trials from {learning rate: score}; None where one diverged."""
    return [
        ended(
            job(key, kind="trial", settings={"train.learning_rate": rate}),
            score=score,
            status="diverged" if score is None else "done",
            **more,
        )
        for rate, score in scores.items()
    ]


def cell(folder, method, scores, task="t", metric="matthews", finals=None, trials=(), figures=None, **outcome):
    """One method's finished runs from what every item adds in each run: [S][N, K]; None where a run diverged."""
    from dual_lora.lab.files.write import write_json
    from dual_lora.lab.study.cell import Cell, Finished, Size
    from dual_lora.lab.study.job import run_file
    from dual_lora.lab.study.study import MethodEntry

    runs = []
    for seed, items in enumerate(scores):
        of = job(task, method, seed, metric)
        if items is None:
            runs.append(ended(of, status="diverged", error="NaN"))
            continue
        write_json(run_file(folder, of.key, "scores"), items)
        score = float(np.mean(items)) if metric == "choice" else 0.5
        runs.append(ended(of, score=score, figures=figures, **outcome))
    runs = [(of, came if seed in (finals or range(9)) else None) for seed, (of, came) in enumerate(runs)]
    entry = MethodEntry.model_validate({"name": "lora"})
    made = Cell("", task, method, entry, runs[0][0].recipe, metric, Size(10, 100), None)
    return Finished(made, list(trials), {}, runs)


def made(folder, skill, tasks=("a", "b"), diverged=(), speed=None, **study):
    """Results of methods with the given skills: chance of a right answer on each task."""
    from dual_lora.lab.study.read import build_study
    from dual_lora.lab.study.results import build_results

    random = np.random.default_rng(0)
    finished = []
    for task in tasks:
        ease = random.random(150)
        for method, chance in skill.items():
            runs = []
            for seed in range(SEEDS):
                right = (ease < chance).astype(float)
                flips = random.random(150) < 0.05
                right[flips] = 1 - right[flips]
                runs.append(None if (method, seed) in diverged else right[:, None].tolist())
            took = {"seconds": (speed or {}).get(method, 1.0), "peak_memory": 1}
            grid = trials({1e-3: 0.501, 3e-3: 0.503, 1e-2: 0.51})
            f = cell(folder, method, runs, task, "choice", trials=grid, training=took)
            f.chosen = {"train.learning_rate": 1e-2}
            finished.append(f)
    settings = {"name": "s", "tasks": list(tasks), "methods": {name: {} for name in skill}, "seeds": SEEDS} | study
    return build_results(build_study(settings), finished, folder)


def judged(folder, cells, untrained=(), **study):
    """Results of these cells, with everything that is shown of them, which must hold no NaN."""
    from rich.console import Console

    from dual_lora.lab.files.write import write_json
    from dual_lora.lab.report.report import report
    from dual_lora.lab.report.tables import show_results
    from dual_lora.lab.study.read import build_study
    from dual_lora.lab.study.results import build_results

    methods, tasks = (list(dict.fromkeys(getattr(f.cell, part) for f in cells)) for part in ("method", "task"))
    values = {"name": "s", "tasks": tasks, "methods": {m: {} for m in methods}, "seeds": len(cells[0].finals)}
    results = build_results(build_study(values | {"margin": 0.02} | study), cells, folder, untrained)
    write_json(folder / "results.json", results | {"failed": [], "untrained": list(untrained)})
    results = json.loads((folder / "results.json").read_text(), parse_constant=pytest.fail)
    page = io.StringIO()
    show_results(results, Console(file=page, width=200))
    assert "nan" not in page.getvalue().lower().split()
    out = folder / "report.html"
    report([folder / "results.json"], out, tables=folder / "tables")
    html = out.read_text()
    assert "could not be shown" not in html
    assert "NaN" not in html.partition('id="data">')[2].partition("</script>")[0]
    for file in (folder / "tables").iterdir():
        assert not re.search(r"\b(nan|none|inf)\b", file.read_text().lower()), file
    return results

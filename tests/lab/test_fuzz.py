"""Strangers' recipes, studies, runs, adapters, data and results: one sentence or success, and nothing else.

Half a minute here, always the same examples; `make fuzz` tries other ones for an hour and prints how many.
"""

import json
import os
import random
import shutil
import time
import traceback
from pathlib import Path

import pytest
import report_material
import tiny_study
import yaml
from fuzzing import attempt, counts, mutated, written
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run
from dual_lora.lab.study.compare import compare

LONG = float(os.environ.get("DUAL_LORA_FUZZ", "0"))  # seconds for each target
pytestmark = [pytest.mark.slow, pytest.mark.timeout(0)]


def fuzzed(examples, given_by, check):
    """Run `check` on so many examples, always the same; or on ever new ones for `LONG` seconds, whatever they find."""
    quiet = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    end, found = time.monotonic() + LONG, []
    while True:
        phases = (Phase.generate, Phase.shrink) if LONG else (Phase.generate,)
        how = settings(max_examples=40 if LONG else examples, derandomize=not LONG, phases=phases, **quiet)
        each = how(given(given_by)(check))
        if LONG:
            each = seed(random.SystemRandom().randrange(2**64))(each)
        try:
            each()
        except (AssertionError, ExceptionGroup) as error:
            if not LONG:
                raise
            found.append(error)
            print("\n".join(["", *traceback.format_exception(error, chain=False), *getattr(error, "__notes__", ())]))
        if time.monotonic() > end:
            break
    assert not found, f"{len(found)} examples were not handled; they are printed above"


@pytest.fixture(autouse=True)
def _place(tmp_path, monkeypatch):
    """The commands run in a folder of their own, with a cache of their own."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "here" / "cache"))
    monkeypatch.setenv("DUAL_LORA_DATA", str(tmp_path / "here"))
    yield
    print("\n" + "\n".join(f"{name}: {count}" for name, count in sorted(counts.items())))
    counts.clear()


@pytest.fixture
def values(lm_values):
    lm_values["method"] = {"name": "dual_lora", "r": 4}
    lm_values["train"] |= {"steps": 1, "checkpoint_every": 1}
    lm_values["evaluate"] = {"tasks": ["choice", "exact_match", "loss"], "max_new_tokens": 2, "batch_size": 5}
    lm_values["data"]["test_limit"] = 4
    return lm_values


@pytest.fixture
def no_fingerprint(monkeypatch):
    """What is trained on a stranger's recipe or records needs none."""
    monkeypatch.setattr("dual_lora.lab.verify.fingerprint.write_for_run", lambda *_: None)


@pytest.fixture
def source(values, tmp_path):
    """A finished run, with its checkpoint and its scores."""
    run(build_recipe(values), tmp_path / "source", progress=False)
    evaluate(tmp_path / "source", progress=False)
    return tmp_path / "source"


def fresh(name="it"):
    shutil.rmtree(name, ignore_errors=True)
    return Path(name)


METHODS = (
    "lora",
    "dora",
    "pissa",
    "ia3",
    "adalora",
    "loha",
    "oft",
    "vera",
    "prompt_tuning",
    "fourierft",
    "full",
)
RECIPE = [(("method", "name"), name) for name in METHODS]
RECIPE += [
    (("method", "r"), 10**9),
    (("method", "target_modules"), "(.|.)*x"),
    (("method", "rank_pattern"), {"(a|a)*$": 8, "q_proj": 2}),
    (("method", "rank_pattern"), [1]),
    (("method", "alpha_pattern"), {"q_proj": float("inf")}),
    (("method", "layer_replication"), [[0, 2]] * 20000),
    (("method", "layers_to_transform"), [0, 99]),
    (("method", "modules_to_save"), ["lm_head"]),
    (("train", "steps"), 3 * 10**9),
    (("train", "epochs"), float("inf")),
    (("train", "rates"), {"(.|.)*z": 2.0}),
    (("train", "optimizer"), "loraplus"),
    (("train", "autocast"), "bf16"),
    (("train", "arguments"), {"push_to_hub": True}),
    (("train", "arguments"), {"adam_beta1": 7}),
    (("train", "validate_every"), 1),
    (("data", "holdout"), 10),
    (("data", "fields"), {"instruction": "output"}),
    (("data", "choices"), ["true", "false"]),
    (("data", "format"), "text"),
    (("data", "template"), "alpaca"),
    (("model", "head"), "classification"),
    (("model", "dtype"), "float16"),
    (("evaluate", "extract"), "(.|.)*z"),
    (("evaluate", "beams"), 3),
    (("evaluate", "tasks"), ["nlg", "bleu"]),
]


def test_recipes(values, no_fingerprint):
    def check(data):
        Path("recipe.yaml").write_bytes(data)
        attempt("recipe", ["train", "recipe.yaml", "--out", fresh(), "--json"], Path.cwd())

    fuzzed(18, written(values, "yaml", RECIPE), check)


def test_studies(tmp_path):
    file = tiny_study.write_study(tmp_path / "study")
    values = yaml.safe_load(file.read_text())
    extra = [
        (("budget", "match"), "time"),
        (("seeds",), 10**10),
        (("sweep",), {f"method.a{i}": list(range(50)) for i in range(8)}),
        (("search", "space"), {f"method.a{i}": list(range(50)) for i in range(8)}),
        (("search", "trials"), 10**9),
        (("search", "seeds"), 10**9),
        (("methods", "lora", "lora_alpha"), "r/0"),
        (("methods", "lora", "freeze"), {"(.|.)*z": 0.5}),
        (("methods", "lora", "round"), {"lora_A": "int8"}),
        (("extends",), "study.yaml"),
        (("margin",), 0.1),
        (("precision",), "bf16"),
    ]

    def check(data):
        Path("study.yaml").write_bytes(data)
        attempt("study", ["compare", "study.yaml", "--dry-run", "--json", "--out", fresh()], Path.cwd())

    fuzzed(15, written(values, "yaml", extra), check)


def values_in(file):
    text = file.read_text()
    return yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)


COMMANDS = (
    ["evaluate", "it", "--json"],
    ["train", "--resume", "--out", "it", "--json"],
    ["merge", "it", "merged", "--json"],
    ["export", "it", "merged", "--to", "lora", "--rank", "2", "--limit", "2", "--json"],
    ["analyze", "it", "--held-out", "2", "--json"],
    ["generate", "it", "is fire warm ?", "--max-new-tokens", "2", "--json"],
    ["verify", "it", "--json"],
    ["card", "it", "--base-model", "a/b", "--json"],
    ["push", "it", "a/b", "--base-model", "a/b", "--json"],  # nobody is there to say yes
)


def damaged(names, content, *more):
    """One of a folder's files by its name, what is written in its place, and a draw from each of `more`."""
    return st.sampled_from(names).flatmap(
        lambda name: st.tuples(st.just(name), written(content[name], "yaml" if "yaml" in name else "json"), *more)
    )


def test_runs(source):
    names = ["recipe.yaml", "record.json", "adapter/lab.json", "adapter/adapter_config.json"]
    names += ["checkpoints/checkpoint-1/complete.json", "checkpoints/checkpoint-1/trainer_state.json"]
    names += [
        "adapter/fingerprint.json",
        *(str(f.relative_to(source)) for f in source.glob("evaluation/*/result.json")),
    ]
    content = {name: values_in(source / name) for name in names}
    some = damaged(names, content, st.sampled_from(COMMANDS))

    def check(example):
        name, data, command = example
        shutil.copytree(source, fresh())
        fresh("merged")
        (Path("it") / name).write_bytes(data)
        if command[0] == "train":  # there is something to go on with
            shutil.rmtree("it/adapter")
        attempt(f"run, {command[0]}", command, Path.cwd())

    fuzzed(20, some, check)


def test_adapters(source):
    adapter = source / "adapter"
    config = values_in(adapter / "adapter_config.json")
    extra = [((name,), 10**9) for name in ("r", "r1", "r2")]
    extra += [(("peft_type",), kind) for kind in ("LORA", "IA3", "PROMPT_TUNING", "ADALORA", "X")]
    extra += [(place[1:], value) for place, value in RECIPE if place[0] == "method" and place[1] != "name"]
    extra += [(("base_model_name_or_path",), name) for name in ("/nowhere", "no/such", None, "")]
    extra += [(("auto_mapping",), {"base_model_class": "X", "parent_library": "os"}), (("task_type",), "SEQ_CLS")]

    def check(example):
        data, command = example
        shutil.copytree(adapter, fresh())
        fresh("merged")
        Path("it/adapter_config.json").write_bytes(data)
        attempt(f"adapter, {command[0]}", command, Path.cwd())

    commands = [c for c in COMMANDS if c[0] in ("evaluate", "merge", "export", "generate", "verify")]
    fuzzed(30, st.tuples(written(config, "json", extra), st.sampled_from(commands)), check)


def test_data(values, no_fingerprint):
    records = json.loads(Path(values["data"]["train"]).read_text())[:3]
    chat = [{"messages": [{"role": "user", "content": "is"}, {"role": "assistant", "content": "red"}], "tools": []}] * 3
    text = [{"text": "is red", "label": "1"}, {"text": "is blue", "label": "0"}]
    suffixes = st.sampled_from([".json", ".jsonl", ".tsv", ".csv", ".txt"])

    def check(example):
        data, suffix = example
        Path(f"data{suffix}").write_bytes(data)
        recipe = {**values, "data": {"train": f"data{suffix}", "test": f"data{suffix}", "max_length": 64}}
        Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
        attempt("data", ["train", "recipe.yaml", "--out", fresh(), "--json"], Path.cwd())

    some = st.sampled_from([records, chat, text]).flatmap(lambda value: written(value, "json"))
    lines = st.lists(some.map(lambda data: data.replace(b"\n", b" ")), max_size=3).map(b"\n".join)
    fuzzed(35, st.tuples(some | lines, suffixes), check)


def test_results(tmp_path):
    material = report_material.write(tmp_path / "material")
    names = ["study/results.json", "runs/dual/analysis/analysis.json"]
    content = {name: values_in(material / name) for name in names}
    some = damaged(names, content)

    def check(example):
        name, data = example
        shutil.copytree(material, fresh())
        (Path("it") / name).write_bytes(data)
        attempt("results", ["report", "it", "--out", "page.html", "--tables", fresh("tables"), "--json"], Path.cwd())

    fuzzed(10, some, check)


def test_study_folders(tmp_path):
    study = tiny_study.write_study(tmp_path / "study", **tiny_study.SHORT)
    whole = tmp_path / "whole"
    compare(study, whole, progress=False)
    runs = sorted(f"runs/{file.name}" for file in (whole / "runs").glob("*.json"))
    names = ["study.json", "study.yaml", "results.json", *runs[:2], *runs[:2]]
    content = {name: values_in(whole / name) for name in names}
    given = [str(study), "--out", "it"]
    commands = (
        ["compare", *given, "--dry-run"],
        ["compare", *given],
        ["report", "it"],
    )
    some = damaged(names, content, st.sampled_from(commands))

    def check(example):
        name, data, command = example
        shutil.copytree(whole, fresh())
        (Path("it") / name).write_bytes(data)
        more = ["--out", "page.html"] if command[0] == "report" else []
        attempt(f"study's folder, {command[0]}", [*command, *more, "--json"], Path.cwd())

    fuzzed(8, some, check)


def test_scores():
    sample = {"doc_id": 0, "doc_hash": "a", "prompt_hash": "b", "filter": "none", "metrics": ["acc"], "acc": 1}
    log = "{}/seed-1/samples_t_2026-01-01T00-00-00.0.jsonl"
    result = {
        "run_info": {"experiment_name": "lora/a", "train_config": {"model_id": "m", "seed": 1}},
        "train_info": {"status": "success", "metrics": [{"test accuracy": 0.5}], "train_time": 1, "file_size": 2},
    }
    better = {"higher_is_better": {"t": {"acc": True}}}
    table = [["method", "seed", "item", "score"], ["lora", "1", "a", "0.5"], ["hira", "1", "a", "1"]]
    kinds = {log.format("hira"): sample, "results/hira.json": result, "lora/seed-1/results_1.json": better}
    some = st.sampled_from(sorted(kinds)).flatmap(lambda name: st.tuples(st.just(name), written(kinds[name], "json")))
    tables = mutated(table).map(lambda rows: ("s.csv", _csv(rows)))

    def check(example):
        name, data = example
        fresh()
        other = {"results/hira.json": ("results/lora.json", result)}.get(name, (log.format("lora"), sample))
        for file, content in ((other[0], json.dumps(other[1]).encode()), (name, data)):
            (Path("it") / file).parent.mkdir(parents=True, exist_ok=True)
            (Path("it") / file).write_bytes(content)
        attempt("scores", ["judge", "it/s.csv" if name == "s.csv" else "it", "--json"], Path.cwd())

    fuzzed(35, some | tables, check)


def _csv(rows):
    rows = rows if isinstance(rows, list) else [rows]
    lines = [",".join(map(str, row)) if isinstance(row, list) else str(row) for row in rows]
    return "\n".join(lines).encode("utf-8", "surrogatepass")

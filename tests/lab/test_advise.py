"""`dual-lora advise`: a study that fits into the minutes, its answer, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
import yaml

pytest.importorskip("peft")

from peft import get_peft_model
from tiny_study import outcomes, write_model, write_records
from torch import nn

from dual_lora.lab.advise import advice, pace, paired
from dual_lora.lab.advise import advise as advising
from dual_lora.lab.advise.advise import advise, plan
from dual_lora.lab.advise.pace import Pace, Work, needed_seeds, with_seeds
from dual_lora.lab.advise.paired import DUAL, LORA, NO_SIGN, Length, length_of, methods_of, paired_study, with_length
from dual_lora.lab.advise.rule import Rival, Why
from dual_lora.lab.errors import UserError
from dual_lora.lab.model import device
from dual_lora.lab.model.methods import method_config
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.study import perform
from dual_lora.lab.study import statistics as stats
from dual_lora.lab.study.job import Outcome
from dual_lora.lab.study.plan import Plan, lay_out
from dual_lora.lab.study.rank_rule import rank_rule
from dual_lora.lab.study.rejudge import rejudge
from dual_lora.lab.study.verdicts import Verdict

SOME = 20  # minutes: enough on the most crowded machine; quiet ones need one, as seeds and steps have a limit here
NEVER = 100_000  # steps of a ramp: λ stays near 0, and the method can't learn within the run


pytestmark = pytest.mark.slow  # most of these tests look at one study of a minute


@pytest.fixture(scope="module")
def letters(tmp_path_factory):
    """Folder with a tiny language model and its data: is a prompt's last letter an early one?"""
    folder = tmp_path_factory.mktemp("letters")
    write_model(folder / "model")
    write_records(folder / "train.jsonl", 1, 256)
    write_records(folder / "test.jsonl", 2, 100)
    return folder


def recipe_file(folder, name="letters", **changes):
    values = {
        "name": name,
        "model": {"path": str(folder / "model")},
        "data": {
            "train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "template": "plain",
            "overlap": 2, "holdout": 64,
        },
        "train": {"steps": 20, "batch_size": 16, "learning_rate": 1e-2},
        "evaluate": {"tasks": ["loss"], "batch_size": 64},
    }  # fmt: skip
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values | changes), encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _few_trials():
    """One seed for each learning rate that is tried, and two where an answer is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paired, "TUNING_SEEDS", 1)
        yield


@pytest.fixture(scope="module")
def lora_wins(letters):
    """The advice on a task that LoRA can learn within the steps, and Dual LoRA can't: its ramp is too long."""
    recipe = recipe_file(
        letters, "ramp", method={"name": "dual_lora", "r": 4, "warmup_steps": NEVER, "init_weights": "paper"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace, "LOOKS", (2,))
        return recipe, letters / "lora-wins", advise(recipe, SOME, letters / "lora-wins", progress=False)


@pytest.fixture
def short(monkeypatch):
    """Studies of two seeds and twenty steps, however fast the machine is."""
    monkeypatch.setattr(Work, "fitting", lambda *_: Length(2, 20))


def test_where_lora_wins(lora_wins):
    recipe, out, advice = lora_wins
    assert (advice.use, advice.why) == (LORA, Why.NO_GAIN)
    assert advice.sentences[0].startswith("Use LoRA: Dual LoRA ")
    results = json.loads((out / "results.json").read_text())
    scores = {m["method"]: m["score"] for m in results["methods"]}
    assert scores[LORA] < min(scores[DUAL], scores[NO_SIGN]), "losses"
    assert max(abs(m["mismatch"]) for m in results["methods"]) < 0.05
    best = read_recipe(out / "recommended.yaml")
    assert best.method == {"name": "lora", "r": 4, "lora_alpha": 8}
    chosen = next(m["settings"]["train.learning_rate"] for m in results["methods"] if m["method"] == LORA)
    assert best.train.learning_rate == chosen
    assert best.train.steps == read_recipe(recipe).train.steps, "the recipe's own length"
    assert advice.next == f"dual-lora train {out / 'recommended.yaml'}"


def test_it_fits_into_its_minutes_and_is_an_ordinary_study(lora_wins, call, tmp_path, monkeypatch):
    recipe, out, advice = lora_wins
    monkeypatch.setattr(pace, "LOOKS", (2,))  # no next look
    assert advice.seconds < 60 * SOME
    before = outcomes(out)
    code, shown, _ = call("compare", out / "study.yaml", "--out", out, "--json")
    assert code == 0
    assert json.loads(shown)["complete"]
    assert outcomes(out) == before, "compare finds nothing left to do"
    code, _, _ = call("report", out, "--out", tmp_path / "report.html")
    assert code == 0
    again = rejudge(json.loads((out / "results.json").read_text()))
    assert again["amendments"][-1]["changed"] == []
    code, shown, _ = call("advise", recipe, "--minutes", SOME, "--out", out)
    assert code == 0
    assert outcomes(out) == before
    assert "Use LoRA" in " ".join(shown.split())
    assert "How it was decided" in shown
    code, shown, _ = call("advise", recipe, "--minutes", SOME, "--out", out, "--dry-run")
    assert "0 s left" in " ".join(shown.split())


def test_another_question_in_its_folder_is_refused(lora_wins):
    recipe, out, _ = lora_wins
    with pytest.raises(UserError, match="Give the same recipe and --margin to go on with it, or another --out"):
        advise(recipe, SOME, out, margin=0.5, progress=False)


def test_a_recipe_that_was_changed_meanwhile_is_noticed(lora_wins, letters, tmp_path):
    recipe, out, _ = lora_wins
    text = recipe.read_text()
    try:
        recipe_file(
            letters,
            "ramp",
            method={"name": "dual_lora", "r": 4, "warmup_steps": NEVER, "init_weights": "paper", "ste": "identity"},
        )
        with pytest.raises(UserError, match=r"The study has changed since it was started.*methods"):
            advise(recipe, SOME, out, progress=False)
    finally:
        recipe.write_text(text)


def test_where_dual_lora_wins(lora_wins, letters, call, short, monkeypatch):
    """The results say so; what follows is real. The best recipe then trains Dual LoRA."""
    results = json.loads((lora_wins[1] / "results.json").read_text())
    for c in results["comparisons"]:
        better = c["candidate"] == DUAL
        c |= {"verdict": "significantly better" if better else "inconclusive", "difference": 0.4 * better}
        c |= {"low": 0.3, "high": 0.5}
    monkeypatch.setattr(advising, "compare", lambda *_, **__: results)
    recipe = recipe_file(letters, "weak", method={"name": "lora", "r": 4, "use_rslora": True})
    out = letters / "dual-wins"
    code, shown, _ = call("advise", recipe, "--minutes", SOME, "--out", out, "--json")
    assert code == 0
    advice = json.loads(shown)
    assert advice["use"] == DUAL
    assert advice["why"] == "significantly better than LoRA"
    assert advice["sentences"][0].startswith(f"Use {DUAL}: it is significantly better than LoRA (reduction of")
    best = read_recipe(out / "recommended.yaml")
    assert best.method["name"] == "dual_lora"
    assert "use_rslora" not in best.method, "what the recipe says of LoRA is LoRA's"
    code, _, _ = call("train", out / "recommended.yaml", "--train.steps", 2, "--out", out / "trained")
    assert code == 0


@pytest.mark.long  # as a study that was killed, in test_study_stopped
def test_more_minutes_add_seeds_in_the_same_folder(letters, monkeypatch, call):
    """The next look: what is there is kept, and the level of each look is a part of the whole."""
    recipe, out = (
        recipe_file(letters, "looks", train={"steps": 20, "batch_size": 8, "learning_rate": 1e-2}),
        letters / "l",
    )
    before: dict[str, object] = {}
    for seeds in (2, 3):
        monkeypatch.setattr(Work, "fitting", lambda *_, seeds=seeds: Length(seeds, 20))
        code, _, err = call("advise", recipe, "--minutes", SOME, "--out", out, "--json")
        assert code == 0, err
        results = json.loads((out / "results.json").read_text())
        assert {len(m["seeds"]) for m in results["methods"]} == {seeds}
        assert results["study"]["level"] == pace.LOOK_LEVEL
        now = outcomes(out)
        before = now if seeds == 2 else before
    assert before.items() <= now.items(), "no run is repeated"
    assert len(now) == len(before) + 3, "one more seed of each method"
    monkeypatch.setattr(Work, "fitting", lambda *_: Length(2, 20))
    code, _, _ = call("advise", recipe, "--minutes", SOME, "--out", out, "--json")
    assert code == 0
    assert outcomes(out) == now, "fewer minutes take nothing away"
    code, shown, _ = call("advise", recipe, "--minutes", SOME, "--out", out, "--dry-run")
    assert code == 0
    assert "If the methods do not differ" in " ".join(shown.split())


def test_minutes_that_would_settle_it_are_said_beforehand():
    many, few = WORK._replace(test=20_000), WORK._replace(test=20)
    assert pace.settling_length(many, "accuracy", 0.02) == Length(8, WORK.steps)
    assert pace.settling_length(many, "accuracy", 0.001) is None
    assert pace.settling_length(few, "accuracy", 0.02) is None, "no number of seeds helps against few records"
    assert pace.settling_length(many, "accuracy", 0.05) == Length(5, WORK.steps)


@pytest.mark.long
def test_interrupted_it_goes_on(letters, tmp_path, monkeypatch, call, short):
    """Stopped while it measures, and again among its runs: no finished run is repeated, and the plan stays."""
    recipe, out = recipe_file(letters), tmp_path / "out"
    original, ended = perform._trained, []

    def until(count):
        def trained(job, *where):
            if len(ended) == count:
                raise KeyboardInterrupt
            ended.append(job.key)
            return original(job, *where)

        return trained

    for count in (2, 8):
        monkeypatch.setattr(perform, "_trained", until(count))
        code, _, err = call("advise", recipe, "--minutes", SOME, "--out", out)
        assert code == 130, err
        assert "The same command goes on from here." in err
    planned = json.loads((out / "study.json").read_text())["study"]
    monkeypatch.setattr(perform, "_trained", until(None))
    monkeypatch.setattr(
        pace, "measured_paces", lambda *_: [Pace(9.0, 9.0, 9.0)] * 3
    )  # another pace changes nothing now
    code, _, _ = call("advise", recipe, "--minutes", SOME, "--out", out, "--json")
    assert code == 0
    assert len(ended) == len(set(ended)), "a run was done twice"
    assert json.loads((out / "study.json").read_text())["study"] == planned
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert results["amendments"] == []


def test_too_few_minutes_say_how_many_are_needed(letters, tmp_path, monkeypatch):
    recipe = recipe_file(letters)
    slow = [Pace(1.0, 0.5, 0.01), Pace(1.0, 0.75, 0.01), Pace(1.0, 0.6, 0.01)]
    monkeypatch.setattr(pace, "estimated_paces", lambda *_: slow)
    with pytest.raises(UserError, match=r"0\.1 minutes are too few.*Give --minutes (\d+), or fewer test") as found:
        advise(recipe, 0.1, tmp_path / "out", progress=False)
    assert not (tmp_path / "out").exists(), "hopeless by arithmetic: nothing was run"
    needed = int(str(found.value).partition("--minutes ")[2].partition(",")[0])
    with pytest.raises(UserError, match=f"Give --minutes {needed}"):
        plan(recipe, needed - 1, tmp_path / "out")
    for load, hint in ((0.5, False), (9999.0, device.best_device() == "cpu")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load,) * 3)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "get_num_threads", lambda: 2)
            patch.setattr(torch, "set_num_threads", lambda _: None)  # to 2, for all the tests to come
            with pytest.raises(UserError) as found:
                plan(recipe, needed - 1, tmp_path / "out")
        assert ("OMP_NUM_THREADS=1" in str(found.value)) == hint, "on cores that others use"
    enough = plan(recipe, needed, tmp_path / "out")
    assert enough.rows[0]["steps"] >= 20
    assert enough.done == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "asked", "message"),
    [
        ({"data": {"train": "train.jsonl"}}, {}, "The recipe names no data.test: add it, or give --test FILE"),
        (
            {"model": {"path": "x", "head": "regression"}, "evaluate": {}},
            {"metric": "mse"},
            "unit of your data.*--margin",
        ),
        ({}, {"metric": "accuracy"}, "A language model has no accuracy: choose choice, exact_match"),
        ({}, {"metric": "los"}, "Did you mean 'loss'"),
        ({}, {"minutes": 0}, "--minutes is 0, expected a number above 0"),
        ({}, {"minutes": float("nan")}, "--minutes is nan"),
        ({}, {"margin": -1.0}, "margin -1.0 for loss: expected a positive number"),
        ({"method": {"name": "lora", "r": 1}}, {}, "method.r: lora has rank 1"),
        ({"method": {"name": "lora", "rr": 1}}, {}, "method lora has no field 'rr'"),
    ],
)
def test_errors_are_one_sentence(letters, changes, asked, message, tmp_path):
    recipe = recipe_file(letters, "wrong", **changes)
    with pytest.raises(UserError, match=message):
        advise(recipe, **{"minutes": SOME, "out": tmp_path / "out", "progress": False} | asked)
    assert not (tmp_path / "out").exists()


def test_recipes_by_name(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, _, err = call("advise", "sst2-minilmm", "--dry-run")
    assert code == 1
    assert "Did you mean 'sst2-minilm'" in " ".join(err.split())
    monkeypatch.setattr(advising, "recipe_of", lambda source: (source, SimpleNamespace(name=source)))
    assert str(advising.folder_of("sst2-minilm", None)) == "studies/advise-sst2-minilm"


def methods(**method):
    return methods_of(build_recipe({"model": {"path": "x"}, "method": method}))


def test_what_the_recipe_says_of_its_method_is_kept():
    found = methods(name="dual_lora", r1=4, r2=12, alpha=20, dropout=0.1, ste="hardtanh", target_modules=["q_proj"])
    assert found[LORA] == {"name": "lora", "r": 16, "target_modules": ["q_proj"], "lora_alpha": 10, "lora_dropout": 0.1}
    assert found[DUAL]["ste"] == "hardtanh"
    assert (found[DUAL]["r1"], found[DUAL]["r2"]) == ("4r/16", "12r/16")
    assert found[NO_SIGN] == found[DUAL] | {"direction_activation": "identity"}
    assert methods(name="dual_lora", r=16, r1=4)[DUAL] == {"name": "dual_lora", "r1": "4r/16", "r2": "12r/16"}
    found = methods(name="lora", r=8, lora_alpha=32, use_rslora=True)
    assert found[LORA] == {"name": "lora", "r": 8, "lora_alpha": 32, "use_rslora": True}
    assert found[DUAL] == {"name": "dual_lora", "alpha": 64}, "the same strength"
    assert methods(name="full")[LORA] == {"name": "lora", "r": 16, "lora_alpha": "2r"}
    assert "direction_activation" not in methods(name="dual_lora", direction_activation="identity")[DUAL]


def strengths(method):
    """Of two layers: the rank, and `lora_alpha` at equal strength, as a model gets them; and what trains of biases."""
    fields = {key: rank_rule(value, method.get("r", 8), key) for key, value in method.items()}
    config = method_config(fields | ({} if "r1" in fields else {"r": fields.get("r", 8)}), "causal", 1, [])
    config.task_type = None
    model = get_peft_model(nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 8)}), config)
    layers = [model.base_model.model[name] for name in ("q_proj", "v_proj")]
    return config.bias.removeprefix("dual_"), [(a.r["default"], a.scaling["default"] * a.r["default"]) for a in layers]


@pytest.mark.parametrize("name", ["lora", "dual_lora"])
@pytest.mark.parametrize(
    "alphas", [{"alpha": 16, "alpha_pattern": {"v_proj": 6}}, {"alpha_pattern": {"v_proj": 6}}, {}]
)
@pytest.mark.parametrize("ranks", [{"rank_pattern": {"v_proj": 4}}, {}])
def test_single_layers_and_biases_are_the_same_for_all(name, alphas, ranks):
    if name == "lora":
        alphas = {f"lora_{key}" if key == "alpha" else key: value for key, value in alphas.items()}
    written = {"name": name, "r": 8, "bias": "lora_only", "target_modules": ["q_proj", "v_proj"], **ranks, **alphas}
    own, *others = (strengths(method) for method in methods(**written).values())
    assert own == strengths(written)
    assert others == [own, own]


def test_a_shorter_study_has_shorter_ramps(letters):
    recipe = recipe_file(
        letters,
        "ramped",
        method={"name": "dual_lora", "r": 4, "warmup_steps": 15, "init_weights": "paper"},
        train={"steps": 30, "batch_size": 16, "learning_rate": 1e-2},
    )
    short = with_length(paired_study(recipe), Length(3, 20))
    assert length_of(short) == (3, 20)
    assert {short.methods[name].fields["warmup_steps"] for name in (DUAL, NO_SIGN)} == {10}


def test_a_tenth_is_held_out_where_a_recipe_has_no_validation(letters):
    data = {"train": str(letters / "train.jsonl"), "test": str(letters / "test.jsonl")}
    assert paired_study(recipe_file(letters, "bare", data=data)).search.holdout == 25
    assert paired_study(recipe_file(letters)).search.holdout is None


WORK = Work((Pace(1.0, 0.1, 0.01), Pace(1.0, 0.2, 0.01), Pace(1.0, 0.15, 0.01)), 50, 100, 400, 1)


def test_more_minutes_never_make_a_smaller_study():
    before = Length(0, 0)
    sizes = set()
    for seconds in range(60, 6000, 7):
        found = WORK.fitting(seconds)
        if found is None:
            assert before == Length(0, 0)
            assert WORK.seconds(WORK.least) > seconds
            continue
        assert WORK.seconds(found) <= seconds
        assert found.seeds >= before.seeds
        assert found.steps >= before.steps or found.seeds > before.seeds
        assert found.steps >= WORK.least.steps
        sizes.add(found)
        before = found
    assert {length.seeds for length in sizes} == {5, 8, 12, 20}
    assert before == Length(20, 400)


def test_the_pace_is_that_of_the_later_steps(tmp_path):
    ended = []
    for i, key in enumerate("ab"):
        (tmp_path / key).mkdir()
        lines = [{"loss": 1.0, "step": n, "seconds": s} for n, s in ((2, 30.0), (4, 30.2), (8, 30.6))]
        lines.append({"eval_loss": 1.0, "step": 8, "seconds": 37.0})
        (tmp_path / key / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        job = SimpleNamespace(key=key, method=key, recipe=read_recipe(recipe_file_of(tmp_path)))
        took = {"seconds": 40.0 - 5 * i, "training": {"seconds": 31.0, "steps": 8}, "evaluation_seconds": 2.0}
        ended.append((job, Outcome(key=key, status="done", **took)))
    first, second = pace.measured_paces(ended, tmp_path)
    assert first.step == pytest.approx(0.1), "the first steps compile kernels"
    assert first.start == second.start == pytest.approx(2.0), "the first run of a process imports"
    assert first.record == pytest.approx(2.0 / 10)
    with pytest.raises(UserError, match="loss was not finite"):
        pace.measured_paces([(ended[0][0], Outcome(key="a", status="diverged", seconds=1.0))], tmp_path)
    for wrong in ({"seconds": -1e9}, {"evaluation_seconds": math.nan}, {"training": {"seconds": math.inf}}):
        with pytest.raises(
            UserError, match=r"a\.json has impossible times"
        ):  # a whole study would seem to take no time
            pace.measured_paces([(ended[0][0], Outcome(key="a", status="done", **(took | wrong)))], tmp_path)


def recipe_file_of(folder):
    write_records(folder / "train.jsonl", 1, 40)
    data = {"train": str(folder / "train.jsonl"), "validation": str(folder / "train.jsonl"), "test_limit": 10}
    (folder / "r.yaml").write_text(yaml.safe_dump({"model": {"path": "x"}, "data": data}))
    return folder / "r.yaml"


def test_needed_seeds_are_just_enough():
    spread = stats.Spread(0.005, 0.01, 0.0098, 5, 1000)
    enough = needed_seeds(spread, 0.02, 0.025, 0.8)
    assert enough == 20, "the next look, not the next seed"
    assert stats.smallest_visible(with_seeds(spread, 20), 0.025, 0.8) <= 0.02
    assert stats.smallest_visible(with_seeds(spread, 12), 0.025, 0.8) > 0.02
    assert needed_seeds(stats.Spread(0.0, 0.01, 0.001, 5, 1000), 0.02, 0.025, 0.8) is None, "the items' error stays"


def judged(letters, results, minutes=20.0):
    """The advice on results that were changed by hand."""
    whole = paired_study(recipe_file(letters))
    return advice.advice_of(results, whole, WORK, "mine.yaml", minutes, letters / "x y")


def test_not_known_says_what_would_settle_it(lora_wins, letters):
    """The results of a real study, with a difference that its noise hides."""
    _, out, _ = lora_wins
    results = json.loads((out / "results.json").read_text())
    for m in results["methods"]:
        m["score"] = 0.3
    for c in results["comparisons"]:
        c |= {
            "verdict": "inconclusive",
            "difference": 0.004,
            "low": -0.03,
            "high": 0.04,
            "visible": 0.05,
            "margin": 0.02,
        }
        c["spread"] |= {"error": 0.01, "seed_error": 0.0098}
    advice = judged(letters, results)
    assert (advice.use, advice.why, advice.rate) == (None, Why.OPEN, None)
    assert advice.needed > 20
    assert f"with 20 minutes a difference of 0.05 could have been seen, and what matters begins at 0.02. Give --minutes {advice.needed}." in advice.sentences[0]  # fmt: skip  # noqa: E501
    assert "Until then use LoRA" in advice.sentences[0]
    assert advice.next == f"dual-lora advise mine.yaml --minutes {advice.needed}"
    for c in results["comparisons"]:
        c["spread"] |= {"error": 0.02, "seed_error": 0.001}
    short = judged(letters, results)
    assert short.needed == 5 * math.ceil(WORK.seconds(Length(5, WORK.steps)) / 300 + 0.1), (
        "first the recipe's own length"
    )
    results["study"]["overrides"]["train"]["steps"] = WORK.steps
    advice = judged(letters, results)
    assert advice.needed is None
    assert advice.next == ""
    assert "More minutes alone will not settle it: that takes 20 seeds and about" in advice.sentences[0]


def test_a_tie_names_the_cost_only_where_it_is_there(lora_wins, letters):
    _, out, _ = lora_wins
    results = json.loads((out / "results.json").read_text())
    for m in results["methods"]:
        m["score"] = 0.3
    for c in results["comparisons"]:
        c |= {"verdict": "equivalent within the margin", "difference": 0.001, "same_low": -0.01, "same_high": 0.01}
    for times, use, words in (
        (0.7, LORA, "A tie goes to LoRA, because it costs less."),
        (1.05, LORA, "A tie goes to LoRA, which every library and server takes."),
        (1.5, DUAL, "as good as LoRA within ±0.02"),
    ):
        for m in results["methods"]:
            m["cost"]["steps_per_second"] = {LORA: 1.0, DUAL: times}.get(m["method"], 0.5)
        advice = judged(letters, results)
        assert advice.use == use
        assert words in advice.sentences[0]
        assert f"a step of Dual LoRA takes {1 / times:.2f} times LoRA's time" in advice.sentences[0]


def test_a_study_that_failed_gives_no_advice(lora_wins, monkeypatch):
    recipe, out, _ = lora_wins
    half = {"complete": False, "failed": ["Dual LoRA on letters, seed 2: the dog ate it."]}
    monkeypatch.setattr(advising, "compare", lambda *_, **__: half)
    with pytest.raises(UserError, match=r"no advice yet, because 1 runs failed: .*the dog ate it\. Remove the cause"):
        advise(recipe, SOME, out, progress=False)


@pytest.mark.parametrize(
    ("name", "lost", "use", "words"),
    [
        (LORA, 1, None, r"Not known: 1 of 5 runs of LoRA diverged"),
        (DUAL, 1, None, r"Not known: Dual LoRA is significantly better, but 1 of 5 runs of it diverged\. Give another"),
        (NO_SIGN, 1, DUAL, "Use Dual LoRA"),
    ],
)
def test_a_method_of_which_a_run_diverged_is_not_recommended(name, lost, use, words, lora_wins, letters):
    """The score that such a run counts with is the worst that was seen, and it may be worse than that."""
    _, out, _ = lora_wins
    results = json.loads((out / "results.json").read_text())
    for m in results["methods"]:
        m |= {"score": 0.3, "diverged": lost * (m["method"] == name), "seeds": m["seeds"][:1] * 5}
    better = {"verdict": "significantly better", "difference": 0.1, "low": 0.05, "high": 0.15}
    even = {"verdict": "equivalent within the margin", "difference": 0.0, "same_low": -0.01, "same_high": 0.01}
    for c in results["comparisons"]:
        c |= better if c["candidate"] == DUAL and name != LORA else even
    advice = judged(letters, results)
    assert advice.use == use
    assert re.match(words, advice.sentences[0]), advice.sentences[0]


@pytest.mark.parametrize("loser", [LORA, DUAL])
def test_a_loser_whose_rate_looks_wrong_is_said_to_be_one(loser, lora_wins, letters):
    """On CoLA Dual LoRA was significantly better while the rate of LoRA's search failed in some of its final seeds."""
    _, out, _ = lora_wins
    gain = {"verdict": "significantly better", "difference": 0.1, "low": 0.05, "high": 0.15}
    loss = {"verdict": "significantly worse", "difference": -0.1, "low": -0.15, "high": -0.05}
    winner, start = (DUAL, "Use Dual LoRA: ") if loser == LORA else (LORA, "Use LoRA: ")

    def said_of(**changes):
        results = json.loads((out / "results.json").read_text())
        for c in results["comparisons"]:
            c |= gain if c["candidate"] == winner else loss
        base = results["untrained"][0]["score"]
        for m in results["methods"]:
            seeds = [m["seeds"][0] | {"score": base / 2} for _ in range(5)]
            rates = [{"settings": {"train.learning_rate": r}, "score": abs(r - 0.01)} for r in (0.003, 0.01, 0.03)]
            m |= {"score": base / 2, "seeds": seeds, "trials": rates, "settings": rates[1]["settings"], "diverged": 0}
            if m["method"] == loser:
                for i in range(changes.get("idle", 0)):
                    seeds[i]["score"] = base
                m |= {"diverged": changes.get("diverged", 0)}
                m |= {"settings": rates[changes.get("rate", 1)]["settings"]}
        advice = judged(letters, results)
        assert advice.use == winner
        assert advice.sentences[0].startswith(start)
        return advice.sentences[0].partition(" But ")[2]

    end = ": with another learning rate it may do better."
    assert said_of() == ""
    assert said_of(idle=2) == f"2 of 5 runs of {loser} did not learn the task{end}"
    assert said_of(diverged=1) == f"1 of 5 runs of {loser} diverged{end}"
    assert said_of(rate=2) == f"{loser} did best with the largest train.learning_rate tried (0.03){end}"


def test_without_any_score_there_is_no_advice(lora_wins, letters):
    results = json.loads((lora_wins[1] / "results.json").read_text()) | {"comparisons": []}
    with pytest.raises(UserError, match=r"No method has a run.*lower train\.learning_rate"):
        judged(letters, results)


def test_an_alpha_that_is_not_written_is_the_same_for_all():
    bare = {"model": {"path": "x"}, "data": {"train": "train.jsonl"}}
    lora, dual, no_sign = methods_of(build_recipe(bare | {"method": {"name": "lora", "r": 16}})).values()
    assert (lora.get("lora_alpha", 8), dual["alpha"], no_sign["alpha"]) == (8, 16, 16), "PEFT's default"
    lora, dual, _ = methods_of(build_recipe(bare | {"method": {"name": "dual_lora", "r": 16}})).values()
    assert (lora["lora_alpha"], dual.get("alpha", "4r")) == ("2r", "4r")


@pytest.mark.parametrize("written", [{"lora_alpha": 24}, {"alpha": 48}])
def test_an_alpha_by_either_name_is_lora_s_at_equal_strength(written):
    method = {"name": "dual_lora", "r": 16, **written}
    recipe = build_recipe({"model": {"path": "x"}, "data": {"train": "train.jsonl"}, "method": method})
    lora, dual, no_sign = methods_of(recipe).values()
    assert lora["lora_alpha"] == 24
    assert {key: dual[key] for key in written} == {key: no_sign[key] for key in written} == written


def test_adalora_is_compared_at_its_own_rank():
    recipe = build_recipe(
        {"model": {"path": "x"}, "data": {"train": "t.jsonl"}, "method": {"name": "adalora", "init_r": 12}}
    )
    assert methods_of(recipe)["LoRA"]["r"] == 12


def test_an_odd_rank_is_split_unequally(letters):
    cells = lay_out(Plan.read(paired_study(recipe_file(letters, "odd", method={"name": "lora", "r": 5}))))
    assert len({cell.size.trainable for cell in cells}) == 1


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ({"name": "lora", "r": 1}, r"method\.r: lora has rank 1\. Give a whole number of 2 or more"),
        ({"name": "lora", "r": 0}, "method"),
        ({"name": "hira", "r": -3}, "method"),
        ({"name": "lora", "r": "7"}, "method"),
        ({"name": "lora", "r": 8.0}, r"method\.r: lora has rank 8\.0"),
        ({"name": "lora", "r": 8, "r1": 3}, "method lora has no field 'r1'"),
        ({"name": "full", "r": 3}, "method full takes no settings"),
        ({"name": "adalora", "init_r": 1}, r"method\.init_r: adalora has rank 1"),
        ({"name": "dual_lora", "r": 0}, "method dual_lora: `r` should be a positive integer"),
        ({"name": "dual_lora", "r2": 3}, "method dual_lora: got r1=None, r2=3: give both"),
        ({"name": "dual_lora", "r": 8, "r1": 3, "r2": 3}, "method dual_lora: r"),
    ],
)
def test_a_rank_that_dual_lora_cannot_have_is_named(letters, method, words):
    with pytest.raises(UserError, match=f"^{words}"):
        paired_study(recipe_file(letters, "rank", method=method))


def test_what_is_significantly_worse_by_little_is_no_tie():
    def tie(verdict, difference):
        return advice._tie_reason(Rival("Dual LoRA", verdict, difference, 0.005, 0.01, time=1.2))

    assert tie(Verdict.UNCLEAR, -0.005) == tie(Verdict.WORSE, -0.02) == ""
    assert tie(Verdict.UNCLEAR, 0.002) == tie(Verdict.EQUIVALENT, 0.0) == " A tie goes to LoRA, because it costs less."


def test_the_best_recipe_has_the_chosen_method_alone(lora_wins, letters, tmp_path, monkeypatch):
    """A recipe without Sign, for which Dual LoRA was best, trains Dual LoRA."""
    recipe = recipe_file(letters, "no-sign", method={"name": "dual_lora", "r": 4, "direction_activation": "identity"})
    made = advising._AdviceStudy(recipe, SOME, tmp_path, None, None)
    made.folder.path.mkdir(exist_ok=True)
    advising._with_recipe(recipe, made, SimpleNamespace(use=DUAL, rate=1e-3))
    assert "direction_activation" not in read_recipe(tmp_path / "recommended.yaml").method


def test_a_recommendation_that_the_user_has_changed_stays(tmp_path, monkeypatch):
    file, made = tmp_path / "recommended.yaml", SimpleNamespace(folder=SimpleNamespace(path=tmp_path))
    fields = dict.fromkeys(advice.Advice.__dataclass_fields__)
    known, open_ = (advice.Advice(**fields | {"use": use, "notes": []}) for use in (DUAL, None))

    def left(advice, text):
        monkeypatch.setattr(advising, "_recommended_recipe", lambda *_: text)
        return advising._with_recipe("recipe", made, advice).notes

    assert left(known, "r: 4\n") == []
    assert left(known, "r: 8\n") == []
    assert yaml.safe_load(file.read_text()) == {"r": 8}, "an earlier answer's goes"
    assert left(open_, "") == []
    assert not file.exists()
    left(known, "r: 4\n")
    file.write_text(mine := file.read_text().replace("r: 4", "r: 9"))
    assert "stays so" in left(known, "r: 4\n")[0]
    assert "stays so" in left(open_, "")[0]
    assert file.read_text() == mine
    file.unlink()
    file.symlink_to(tmp_path / "elsewhere")
    assert "stays so" in left(known, "r: 4\n")[0]
    assert file.is_symlink()


def test_fewer_steps_than_were_begun_with_are_noticed(lora_wins, letters):
    recipe, out, _ = lora_wins
    text = recipe.read_text()
    try:
        recipe.write_text(text.replace("steps: 20", "steps: 19"))
        with pytest.raises(UserError, match=r"have 20 steps, and the recipe has 19 now\. Give --out"):
            advise(recipe, SOME, out, progress=False)
    finally:
        recipe.write_text(text)


def test_the_recipe_s_own_rate_is_among_those_that_are_tried(letters):
    train = {"steps": 30, "batch_size": 16, "learning_rate": 1.25e-3}
    study = paired_study(recipe_file(letters, "rate", train=train))
    assert study.search.space["learning_rate"] == [0.00042, 1.25e-3, 0.0037]


@pytest.mark.parametrize("train", [None, [1], {}, {"steps": "x"}, {"steps": None}, {"steps": 0}, {"steps": 1.5}])
def test_an_earlier_study_without_its_steps_is_an_error(train, letters, tmp_path):
    recipe = recipe_file(letters, "earlier")
    values = paired_study(recipe).model_dump(mode="json")
    values["overrides"] = {} if train is None else {"train": train}
    (tmp_path / "study.json").write_text(json.dumps({"format": "dual-lora study", "study": values}))
    with pytest.raises(UserError, match=r"of the steps of its runs, expected 1 or more.*another --out"):
        plan(recipe, SOME, tmp_path)


def test_an_earlier_study_with_more_seeds_than_any_look_has(letters, tmp_path):
    recipe = recipe_file(letters, "earlier")
    values = paired_study(recipe).model_dump(mode="json") | {"seeds": list(range(1, 501))}
    (tmp_path / "study.json").write_text(json.dumps({"format": "dual-lora study", "study": values}))
    with pytest.raises(UserError, match="has 500 seeds, expected at most 20"):
        plan(recipe, SOME, tmp_path)

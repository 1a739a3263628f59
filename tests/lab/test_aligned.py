"""DPO and GRPO from a recipe by TRL: a run folder like any other, and what is refused."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl")

from dual_lora._warning import DualLoraWarning
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, read_recipe
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.prepare import prepare
from dual_lora.lab.run.record import read_metrics
from dual_lora.lab.run.rewards import rewards_of
from dual_lora.lab.run.train import run

METHODS = {"dual_lora": {"name": "dual_lora", "r": 4}, "lora": {"name": "lora", "r": 4}}


@pytest.fixture
def preferences(tmp_path, lm_values):
    """Values of a recipe whose records prefer `true`."""
    things = [(a, b) for a in ("red", "blue", "warm", "cold") for b in ("sea", "sky", "fire", "ice")]
    rows = [{"prompt": f"is the {b} {a} ?", "chosen": "true", "rejected": "false"} for a, b in things]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"train": str(tmp_path / "pairs.jsonl"), "max_length": 32}
    train = {"steps": 12, "batch_size": 4, "learning_rate": 0.02, "log_every": 1, "checkpoint_every": 4}
    return lm_values | {"data": data, "train": train, "objective": {"name": "dpo"}, "evaluate": {"tasks": ["loss"]}}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_dpo_prefers_the_chosen_answer(method, preferences, tmp_path):
    result = run(build_recipe(preferences | {"method": METHODS[method]}), tmp_path / "run")
    assert (result.state, result.steps) == ("finished", 12)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert lines[0]["loss"] == pytest.approx(0.693, abs=0.01)  # the base is the reference, and they begin equal
    assert lines[-1]["loss"] < 0.5
    assert lines[-1]["rewards/accuracies"] == 1.0
    weights = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert not any(".ref." in name for name in weights)
    assert not (tmp_path / "run/adapter/ref").exists()
    tuned = open_tuned(tmp_path / "run")
    data = read_recipe(tmp_path / "run").data.model_copy(update={"test": preferences["data"]["train"]})
    scores = evaluate(tuned, data, progress=False).metrics
    assert scores["tuned"]["loss"] < scores["base"]["loss"]


def test_a_run_by_trl_holds_nothing_that_overwrite_would_keep(preferences, tmp_path):
    recipe = build_recipe(Recipe.merged(preferences, {"train": {"steps": 1}}))
    run(recipe, tmp_path / "run")
    assert not (tmp_path / "run/checkpoints/README.md").exists()
    assert run(recipe, tmp_path / "run", overwrite=True).state == "finished"


@pytest.mark.slow
def test_dpo_is_resumed_and_validated(preferences, tmp_path):
    values = Recipe.merged(preferences, {"data": {"holdout": 4}, "train": {"validate_every": 4, "keep_best": True}})
    whole = run(build_recipe(values), tmp_path / "whole")
    assert whole.validation_loss is not None
    assert whole.best_step == 12

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 6:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(build_recipe(values), tmp_path / "part", callbacks=[Stop()])
    assert run(build_recipe(values), tmp_path / "part", resume=True).steps == 12
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "part"))
    assert all((one[name] - other[name]).abs().max() < 1e-5 for name in one)


@pytest.mark.slow
def test_grpo_by_a_reward_that_a_recipe_names(lm_values, tmp_path, write_recipe, call):
    lm_values["objective"] = {"name": "grpo", "rewards": "contains", "completions": 4, "max_new_tokens": 3}
    lm_values["train"] |= {"batch_size": 8, "steps": 4}
    code, out, err = call("train", write_recipe(lm_values), "--out", tmp_path / "run", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["state"], result["steps"]) == ("finished", 4)
    lines = [line for line in read_metrics(tmp_path / "run/metrics.jsonl") if "loss" in line]
    assert all("rewards/contains/mean" in line for line in lines)
    code, _, err = call("evaluate", tmp_path / "run", "--evaluate.tasks", "loss", "--json")
    assert code == 0, err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"method": {"name": "full"}}, "compares with the base"),
        ({"objective": {"name": "grpo", "completions": 3}}, r"A step has 4 answers .* multiple of .* 3"),
        ({"objective": {"name": "grpo", "completions": 4}, "train": {"validate_every": 1}}, "no validation loss"),
        ({"train": {"label_smoothing": 0.1}}, "does not read train.label_smoothing"),
    ],
)
def test_what_they_cannot_do(change, said, preferences, tmp_path):
    with pytest.raises(UserError, match=said):
        run(build_recipe(Recipe.merged(preferences, change)), tmp_path / "run")


def test_a_pair_with_a_longer_answer_than_fits_is_left_out_whole(preferences, tmp_path, call):
    """TRL would cut the rejected answer, and its end is what tells it from the chosen one."""
    file = tmp_path / "pairs.jsonl"
    long = {"prompt": "is the sea red ?", "chosen": "true", "rejected": "false " * 60}
    file.write_text(file.read_text() + json.dumps(long) + "\n")
    values = Recipe.merged(preferences, {"train": {"steps": 1}})
    assert run(build_recipe(values), tmp_path / "run").left_out == 1
    learned = Recipe.merged(values, {"objective": {"name": "sft"}})
    assert run(build_recipe(learned), tmp_path / "learned").left_out == 0
    code, out, err = call("check-data", file, "--base", values["model"]["path"], "--data.max-length", "32", "--json")
    assert code == 0, err
    (said,) = [w for s in json.loads(out)["sets"] for w in s["warnings"] if "max_length" in w]
    assert "1 records (5.9%)" in said
    assert "either answer" in said


def test_a_validation_pair_with_a_longer_answer_is_left_out_too(preferences, tmp_path):
    rows = (tmp_path / "pairs.jsonl").read_text().splitlines()[:3]
    long = {"prompt": "is the sea red ?", "chosen": "true", "rejected": "false " * 60}
    (tmp_path / "held.jsonl").write_text("\n".join([*rows, json.dumps(long)]))
    change = {"data": {"validation": str(tmp_path / "held.jsonl")}, "train": {"steps": 1, "validate_every": 1}}
    recipe = build_recipe(Recipe.merged(preferences, change))
    with pytest.warns(DualLoraWarning, match="leaves out 1 of 4 validation records"):
        ready = prepare(recipe)
    assert len(ready.held) == len(ready.validation) == 3


def test_records_without_a_rejected_answer(lm_values, tmp_path):
    with pytest.raises(UserError, match="needs the fields prompt, chosen and rejected"):
        run(build_recipe(lm_values | {"objective": {"name": "dpo"}}), tmp_path / "run")


def test_conversations_with_a_chosen_end(tmp_path):
    from dual_lora.lab.data.examples import read_examples
    from dual_lora.lab.recipe.schema import DataSection

    asked, (good, bad) = {"role": "user", "content": "?"}, ({"role": "assistant", "content": c} for c in ("yes", "no"))
    rows = [
        {"chosen": [asked, good], "rejected": [asked, bad]},
        {"prompt": [asked], "chosen": [good], "rejected": [bad]},
    ]
    for row in rows:
        (tmp_path / "x.jsonl").write_text(json.dumps(row))
        (example,) = read_examples(str(tmp_path / "x.jsonl"), DataSection())
        assert (example.prompt, example.answer, example.rejected) == ((asked,), "yes", "no")


def test_rewards_by_name():
    spec = {"extract": r"answer is (\w+)"}
    objective = {"name": "grpo", "rewards": ["exact_match", "contains", "pattern", "json"], "pattern": "^the"}
    recipe = build_recipe({"model": {"path": "x"}, "evaluate": spec, "objective": objective})
    said, expected = ["the answer is red", "the answer is redder", '{"a": 1}'], ["red", "red", "red"]
    found = {reward.__name__: reward(said, expected) for reward in rewards_of(recipe)}
    assert found == {
        "exact_match": [1.0, 0.0, 0.0],
        "contains": [1.0, 0.0, 0.0],
        "pattern": [1.0, 1.0, 0.0],
        "json": [0.0, 0.0, 1.0],
    }
    turns = [[{"role": "assistant", "content": text}] for text in said]
    assert rewards_of(recipe)[0](turns, expected) == found["exact_match"]


def test_a_recipe_s_rewards_are_named_and_nothing_else():
    with pytest.raises(UserError, match="rewards"):
        build_recipe({"model": {"path": "x"}, "objective": {"name": "grpo", "rewards": ["os:system"]}})
    with pytest.raises(UserError, match="go together"):
        build_recipe({"model": {"path": "x"}, "objective": {"name": "grpo", "rewards": ["pattern"]}})


def test_a_template_that_never_ends_an_answer_is_ended(preferences, tiny_lm, tmp_path, monkeypatch):
    """The encoding of prompts has none written, TRL has."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    loops = "".join(f"{{% for {name} in range(99999) %}}" for name in "abc") + "{% endfor %}" * 3
    template = base / "chat_template.jinja"
    template.write_text(f"{{% if messages[-1].role == 'assistant' %}}{loops}{{% endif %}}" + template.read_text())
    monkeypatch.setattr("dual_lora.verify.template.SECONDS", 1.0)
    with pytest.raises(UserError, match="chat template takes longer than 1 s"):
        run(build_recipe(preferences | {"model": {"path": str(base)}}), tmp_path / "run", progress=False)


@pytest.mark.slow
def test_what_the_makers_set_for_generate_does_not_count(lm_values, tiny_lm, tmp_path):
    """TRL takes over what it does not say itself: beams fill the memory, and no word may be written."""
    base = shutil.copytree(tiny_lm, tmp_path / "base")
    lm_values["objective"] = {"name": "grpo", "rewards": "contains", "completions": 4, "max_new_tokens": 3}
    lm_values["train"] |= {"batch_size": 8, "steps": 2}
    run(build_recipe(lm_values), tmp_path / "plain", progress=False)
    own = json.loads((base / "generation_config.json").read_text())
    own |= {"num_beams": 3, "suppress_tokens": list(range(3, 22)), "max_time": 1e-9}
    (base / "generation_config.json").write_text(json.dumps(own))
    run(build_recipe(lm_values | {"model": {"path": str(base), "dtype": "float32"}}), tmp_path / "set", progress=False)
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("plain", "set"))
    assert all(torch.equal(one[name], other[name]) for name in one)

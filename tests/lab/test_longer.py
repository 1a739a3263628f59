"""A run that goes on for more steps: the same examples up to its end, new passes after it, the longer schedule."""

import json

import pytest
from safetensors.torch import load_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.recipe.schema import Recipe
from dual_lora.lab.run.longer import ends_of
from dual_lora.lab.run.record import read_metrics
from dual_lora.lab.run.train import run


def steps(values, **train):
    return build_recipe(Recipe.merged(values, {"train": train}))


def rates(folder):
    return {line["step"]: line["learning_rate"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line}


def test_a_finished_run_goes_on(lm_values, tmp_path, capsys, call):
    out = tmp_path / "run"
    first = run(steps(lm_values, lr_warmup=0.0), out)
    before = load_file(out / "adapter/adapter_model.safetensors")
    assert call("card", out, "--license", "mit")[0] == 0
    (out / "evaluation/test").mkdir(parents=True)
    (out / "evaluation/test/result.json").write_text("{}")
    result = run(steps(lm_values, lr_warmup=0.0, steps=12), out, resume=True)
    assert (first.steps, result.steps, result.state) == (6, 12, "finished")
    said = " ".join(capsys.readouterr().err.split())
    assert "Continuing from step 6 to step 12 (planned before: 6)" in said
    assert "schedule of all 12 steps (linear): it was 0 and continues at 0.005." in said
    record = json.loads((out / "record.json").read_text())
    assert (record["extended"], record["total_steps"], record["state"]) == ([6], 12, "finished")
    assert set(rates(out)) == set(range(1, 13))
    assert rates(out)[7] == pytest.approx(0.005)  # not the zero where it had ended
    after = load_file(out / "adapter/adapter_model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)
    assert not (out / "evaluation/test/result.json").exists()
    assert result.seconds >= first.seconds
    again = run(steps(lm_values, lr_warmup=0.0, steps=12), out, resume=True)
    assert again == result


def test_a_longer_run_that_is_stopped_comes_out_the_same(lm_values, tmp_path):
    for name in ("whole", "stopped"):
        run(steps(lm_values), tmp_path / name)
    longer = steps(lm_values, steps=12)
    run(longer, tmp_path / "whole", resume=True)

    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 9:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(longer, tmp_path / "stopped", resume=True, callbacks=[Stop()])
    assert run(build_recipe_of(tmp_path / "stopped"), tmp_path / "stopped", resume=True).steps == 12
    one, other = (load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("whole", "stopped"))
    assert all((one[name] == other[name]).all() for name in one)


def build_recipe_of(folder):
    from dual_lora.lab.run.resume import recipe_of_run

    return recipe_of_run(folder)


def test_the_rows_before_its_end_stay(lm_values, tmp_path):
    from dual_lora.lab.data.examples import load_split
    from dual_lora.lab.model.load import load_tokenizer
    from dual_lora.lab.run.prepare import in_order

    short, long = steps(lm_values), steps(lm_values, steps=18)
    examples, tokenizer = load_split(short.data, "train"), load_tokenizer(lm_values["model"]["path"])
    before = in_order(short, examples, tokenizer, [], 1).order
    after = in_order(long, examples, tokenizer, [], 1, [6]).order
    assert after[: len(before)] == before
    assert sorted(after[24:]) == list(range(48))  # a whole pass begins there
    assert in_order(short, examples, tokenizer, [], 1, [6]).order == before
    with pytest.raises(UserError, match="was made longer 2,000 times by its record"):  # each begins a pass
        in_order(long, examples, tokenizer, [], 1, range(2000))


def test_fewer_steps_than_were_made(lm_values, tmp_path):
    run(steps(lm_values), tmp_path / "run")
    with pytest.raises(UserError, match=r"has already made 6 steps, and you ask for 4: give more with --train\.steps"):
        run(steps(lm_values, steps=4), tmp_path / "run", resume=True)


def test_a_warm_up_that_is_a_share_of_the_run(lm_values, tmp_path):
    paper = lm_values | {"method": {"name": "dual_lora", "r": 4, "init_weights": "paper"}}
    run(steps(paper), tmp_path / "run")
    with pytest.raises(UserError, match="warmup_steps is a share of the run: it was 1 of 6 steps"):
        run(steps(paper, steps=60), tmp_path / "run", resume=True)


def test_more_patience(lm_values, tmp_path):
    early = {"validate_every": 1, "patience": 1, "learning_rate": 1e-12, "steps": 12}
    values = Recipe.merged(lm_values, {"data": {"holdout": 8}, "train": early})
    first = run(build_recipe(values), tmp_path / "run")
    assert first.stopped_early
    assert first.steps < 12
    result = run(steps(values, patience=100), tmp_path / "run", resume=True)
    assert (result.steps, result.stopped_early) == (12, False)


def test_other_settings_still_have_to_be_the_same(lm_values, tmp_path):
    run(steps(lm_values), tmp_path / "run")
    with pytest.raises(UserError, match=r"other values of train\.learning_rate"):
        run(steps(lm_values, steps=12, learning_rate=0.5), tmp_path / "run", resume=True)


def test_from_the_command_line(lm_values, write_recipe, tmp_path, call):
    assert call("train", write_recipe(lm_values), "--out", tmp_path / "run")[0] == 0
    code, out, err = call("train", "--resume", "--out", tmp_path / "run", "--train.epochs", 1, "--json")
    assert code == 0, err
    assert json.loads(out)["steps"] == 12


@pytest.mark.parametrize(
    ("record", "ends"),
    [({}, []), ({"total_steps": 5}, [5]), ({"total_steps": 9, "extended": [5]}, [5, 9]), ({"extended": "x"}, [])],
)
def test_the_ends_of_a_record(record, ends):
    assert ends_of(record) == ends

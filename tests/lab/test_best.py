"""A run ends when validations bring no lower loss, and saves the weights of the lowest, whatever interrupts it."""

import json
from types import SimpleNamespace

import pytest
import torch

from dual_lora.lab.commands.train import _early_stop_note
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe, identity
from dual_lora.lab.run.best import Best, check_best, counts_from
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run


@pytest.fixture
def values(lm_values):
    """A run that learns too fast to stay good: the validation loss falls, then rises."""
    lm_values["data"] |= {"holdout": 12, "overlap": "all"}
    lm_values["method"] = {"name": "lora", "r": 4}
    lm_values["train"] = {
        "steps": 60, "batch_size": 4, "checkpoint_every": 4, "log_every": 2, "learning_rate": 0.1,
        "schedule": "constant", "validate_every": 2, "patience": 3, "keep_best": True,
    }  # fmt: skip
    lm_values["evaluate"] = {"tasks": ["loss"], "split": "validation", "base": False}
    return lm_values


def validations(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["eval_loss"] for line in lines if "eval_loss" in line}


def weights_of(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter/adapter_model.safetensors")


def test_the_best_is_saved_and_the_run_ends_early(values, tmp_path):
    values["train"]["checkpoint_every"] = 50
    result = run(build_recipe(values), tmp_path / "run", progress=False)
    losses = validations(tmp_path / "run")
    best = min(losses, key=losses.get)
    assert (result.state, result.stopped_early, result.best_step) == ("finished", True, best)
    assert result.steps == max(losses) == best + 6 < 60, "three validations later"
    measured = evaluate(tmp_path / "run", progress=False).metrics["tuned"]["loss"]
    assert measured == pytest.approx(losses[best], rel=1e-4)
    assert measured < losses[result.steps]
    assert result.validation_loss == losses[best], "of the weights that are saved, not of the last ones"
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["result"]["best_step"] == best
    assert (tmp_path / f"run/checkpoints/checkpoint-{result.steps}").is_dir(), "a longer run goes on from there"
    again = run(build_recipe(values), tmp_path / "run", resume=True, progress=False)
    assert again == result, "a finished run stays as it is"
    assert open_tuned(tmp_path / "run").adapted


@pytest.mark.long
def test_an_interrupted_run_comes_out_the_same(values, tmp_path):
    from transformers import TrainerCallback

    class Dies(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    whole = run(build_recipe(values), tmp_path / "whole", progress=False)
    for at in (5, whole.steps - 1):
        folder, dies = tmp_path / f"at-{at}", Dies()
        dies.at = at
        with pytest.raises(KeyboardInterrupt):
            run(build_recipe(values), folder, progress=False, callbacks=[dies])
        resumed = run(build_recipe(values), folder, resume=True, progress=False)
        assert (resumed.steps, resumed.best_step) == (whole.steps, whole.best_step)
        one, other = weights_of(tmp_path / "whole"), weights_of(folder)
        assert all((one[name] == other[name]).all() for name in one)


def test_patience_alone_saves_the_last_weights(values, tmp_path):
    values["train"]["keep_best"] = False
    result = run(build_recipe(values), tmp_path / "run", progress=False)
    losses = validations(tmp_path / "run")
    assert result.stopped_early
    measured = evaluate(tmp_path / "run", progress=False).metrics["tuned"]["loss"]
    assert measured == pytest.approx(losses[result.steps], rel=1e-4)
    assert not list((tmp_path / "run").rglob("best.safetensors"))


def test_the_card_says_it(values, write_recipe, call, tmp_path):
    code, out, _ = call("train", write_recipe(values), "--out", tmp_path / "run")
    assert code == 0
    said = " ".join(out.replace("│", " ").split())
    assert "ended by 3 validations without a lower loss" in said
    assert "weights of step" in said
    recipe = SimpleNamespace(train=SimpleNamespace(patience=1, keep_best=False))
    note = _early_stop_note(recipe, SimpleNamespace(stopped_early=True))
    assert note == ", ended by a validation without a lower loss"
    keeps = SimpleNamespace(train=SimpleNamespace(patience=1, keep_best=True))
    stopped = SimpleNamespace(stopped_early=False, state="interrupted", best_step=30)
    assert _early_stop_note(keeps, stopped) == ", lowest validation loss at step 30", "nothing is saved yet"


def test_a_validation_in_the_warm_up_does_not_count(values, tmp_path):
    values["method"] = {"name": "dual_lora", "r": 4, "warmup_steps": 5, "init_weights": "paper"}
    values["train"] |= {"steps": 8, "patience": None, "learning_rate": 0.001}
    result = run(build_recipe(values), tmp_path / "run", progress=False)
    assert set(validations(tmp_path / "run")) == {2, 4, 6, 8}
    assert result.best_step in (6, 8)
    assert not result.stopped_early
    assert counts_from(None) == 0


def test_what_is_no_number_is_no_improvement(tmp_path):
    recipe = build_recipe({"model": {"path": "x"}, "train": {"validate_every": 1, "patience": 2}})
    best, control = Best(recipe.train, None, 0, True), SimpleNamespace(should_training_stop=False)
    for step, loss in enumerate((1.0, float("nan"), 0.5, 0.5, float("inf")), 1):
        state = SimpleNamespace(global_step=step, max_steps=9)
        best.on_evaluate(None, state, control, metrics={"eval_loss": loss})
    assert (best.step, best.loss, best.stopped, control.should_training_stop) == (3, 0.5, True, True)


def test_errors_and_identity(monkeypatch):
    from dual_lora.lab.errors import UserError

    for name, value in (("patience", 2), ("keep_best", True)):
        with pytest.raises(UserError, match=f"{name} uses validation losses: set validate_every"):
            build_recipe({"model": {"path": "x"}, "train": {name: value}})
    assert not {"patience", "keep_best"} & identity(build_recipe({"model": {"path": "x"}}))["train"].keys()
    recipe = build_recipe({"model": {"path": "x"}, "train": {"validate_every": 2, "keep_best": True}})
    check_best(recipe.train)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP and DeepSpeed shard them"):
        check_best(recipe.train)


@pytest.fixture(scope="module")
def with_best(tmp_path_factory):
    """A checkpoint's two files of the best weights, and the model that they are of."""
    from safetensors.torch import save_file

    folder = RunFolder(tmp_path_factory.mktemp("run"))
    checkpoint = folder.checkpoints / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    model = torch.nn.Linear(3, 2)
    save_file({name: p.detach() for name, p in model.named_parameters()}, checkpoint / "best.safetensors")
    (checkpoint / "best.json").write_text(json.dumps({"step": 2, "loss": 0.5, "without": 1}))
    return folder, model


def taken_up(with_best, **written):
    folder, model = with_best
    recipe = build_recipe({"model": {"path": "x"}, "train": {"validate_every": 1, "keep_best": True}})
    best = Best(recipe.train, folder, 0, True)
    best.on_train_begin(None, SimpleNamespace(global_step=4), None, model=model)
    return best


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": "\x1b[31mx"}, "expected step, loss and without"),
        ({"step": 5}, "expected step, loss and without"),
        ({"without": 10**500}, "expected step, loss and without"),
        ({"loss": "x"}, "expected step, loss and without"),
        ({"loss": float("-inf")}, "expected step, loss and without"),
        ({"weight": torch.full((2, 3), float("nan"))}, "holds NaN or infinity in weight"),
        ({"weight": torch.zeros(1, 3)}, "holds other weights than this run trains"),
        ({"another": torch.zeros(2)}, "holds other weights than this run trains"),
    ],
)
def test_the_best_of_a_strangers_checkpoint_is_looked_at(change, said, with_best):
    from safetensors.torch import load_file, save_file

    checkpoint = with_best[0].checkpoints / "checkpoint-4"
    assert taken_up(with_best).step == 2
    kept = {file: file.read_bytes() for file in checkpoint.iterdir()}
    numbers, weights = json.loads(kept[checkpoint / "best.json"]), load_file(checkpoint / "best.safetensors")
    for name, value in change.items():
        (weights if isinstance(value, torch.Tensor) else numbers)[name] = value
    (checkpoint / "best.json").write_text(json.dumps(numbers))
    save_file(weights, checkpoint / "best.safetensors")
    try:
        with pytest.raises(ValueError, match=said):
            taken_up(with_best)
    finally:
        for file, content in kept.items():
            file.write_bytes(content)

"""A run's scores are those of the adapter that others open, and its seconds those of training alone."""

import itertools
import json
import os
import time
import warnings

import pytest

pytest.importorskip("pydantic")

import torch
from transformers import TrainerCallback

from dual_lora.lab import permission
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.loop import recipe_environment
from dual_lora.lab.run.record import read_metrics
from dual_lora.lab.run.train import run


class Stop(TrainerCallback):
    """Ends the session after a step, and lets every step take its time."""

    def __init__(self, after=None):
        self.after = after

    def on_step_begin(self, *_, **__):
        time.sleep(0.05)

    def on_step_end(self, args, state, control, **_):
        if state.global_step == self.after:
            control.should_training_stop = control.should_save = True


def trained(values, out, resume=False, callbacks=(), **train):
    return run(
        build_recipe({**values, "train": values["train"] | train}), out, resume=resume, progress=False,
        callbacks=callbacks,
    )  # fmt: skip


def scores(tuned):
    return evaluate(tuned, variants=["tuned"], progress=False).metrics["tuned"]


@pytest.mark.parametrize("method", [{"name": "dual_lora", "r": 4}, {"name": "full"}], ids=["dual_lora", "full"])
def test_a_model_trained_under_autocast_is_scored_without(method, lm_values, tmp_path):
    done = trained(lm_values | {"method": method}, tmp_path / "run", autocast="bf16")
    assert "_original_forward" not in vars(done.tuned.model)
    assert scores(done.tuned) == scores(open_tuned(tmp_path / "run"))


def test_the_recipe_s_precision_counts_and_not_a_launcher_s(lm_values, tmp_path, monkeypatch):
    name = "ACCELERATE_MIXED_PRECISION"
    monkeypatch.delenv(name, raising=False)
    plain = trained(lm_values, tmp_path / "plain")
    monkeypatch.setenv(name, "bf16")
    with pytest.warns(UserWarning, match=r"launcher asks for mixed precision 'bf16', and the recipe.* 'none'"):
        launched = trained(lm_values, tmp_path / "launched")
    assert launched.loss == plain.loss
    assert (
        json.loads((tmp_path / "launched" / "record.json").read_text())["precision"]["chosen"]["train.autocast"]
        == "none"
    )
    assert os.environ[name] == "bf16", "others may read it"
    monkeypatch.setenv(name, "no")  # as accelerate says where nobody chose
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The launcher asks")
        trained(lm_values, tmp_path / "autocast", autocast="bf16")


@pytest.mark.parametrize(
    ("launched", "asked", "told"),
    [
        ("no", "none", "none"),
        ("bf16", "none", "bf16"),
        ("bf16", "bf16", "bf16"),
        ("no", "bf16", None),
        ("fp16", "bf16", None),
    ],
)
def test_deepspeed_s_precision_is_its_own_and_the_rest_is_the_recipe_s(launched, asked, told, lm_values, monkeypatch):
    """transformers refuses what DeepSpeed is told otherwise than it, and DeepSpeed has no autocast."""
    steps = "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"
    for name, value in (("USE_DEEPSPEED", "true"), ("MIXED_PRECISION", launched), ("GRADIENT_ACCUMULATION_STEPS", "1")):
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    lm_values["train"]["autocast"] = asked
    recipe = build_recipe(lm_values)
    if told is None:
        with (
            pytest.raises(UserError, match=r"DeepSpeed has no autocast.*model\.dtype: bfloat16"),
            recipe_environment(recipe),
        ):
            pass
        return
    with warnings.catch_warnings(record=True) as said, recipe_environment(recipe) as precision:
        warnings.simplefilter("always")
        assert os.environ[steps] == "auto"
    assert precision == told
    assert any("rounds the base model" in str(w.message) for w in said) == (launched != "no")
    assert os.environ[steps] == "1"


class Averaged(torch.optim.SGD):
    """Schedule-free in small: what is trained is far from the average, which `eval` puts in."""

    def __init__(self, groups, lr):
        super().__init__(groups, lr=lr)
        self.averaged = False

    def _shift(self, by):
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.mul_(by)

    def train(self):
        if self.averaged:
            self._shift(2.0)
        self.averaged = False

    def eval(self):
        if not self.averaged:
            self._shift(0.5)
        self.averaged = True


def test_an_optimizer_s_averages_are_what_is_saved_and_scored(lm_values, tmp_path, monkeypatch):
    monkeypatch.setenv(permission.VARIABLE, __name__)
    lm_values["data"]["validation"] = lm_values["data"]["test"]
    asked = {"optimizer": f"{__name__}:Averaged", "learning_rate": 0.1}
    often, never = (trained(lm_values, tmp_path / str(k), **asked, validate_every=k) for k in (6, None))
    assert scores(often.tuned) == scores(never.tuned) == scores(open_tuned(tmp_path / "None"))


def test_a_stopped_run_has_the_seconds_of_one_that_was_not(lm_values, tmp_path):
    asked = {"steps": 12, "log_every": 12, "checkpoint_every": 12}
    trained(lm_values, tmp_path / "run", callbacks=[Stop(8)], **asked)
    whole = trained(lm_values, tmp_path / "run", resume=True, callbacks=[Stop()], **asked)
    assert whole.seconds > 12 * 0.05


def test_validation_and_checkpoints_are_no_training(lm_values, tmp_path, monkeypatch):
    from dual_lora.lab.run import loop, watch

    slow, read = watch.mark_whole, loop.mean_loss

    def measured(*given, **named):
        if not torch.is_grad_enabled():
            time.sleep(0.08)
        return read(*given, **named)

    lm_values["data"]["validation"] = lm_values["data"]["test"]
    monkeypatch.setattr(watch, "mark_whole", lambda folder: (time.sleep(0.25), slow(folder)))
    monkeypatch.setattr(loop, "mean_loss", measured)
    asked = {"steps": 6, "checkpoint_every": 1, "validate_every": 1}
    trained(lm_values, tmp_path / "run", callbacks=[Stop(3)], **asked)
    done = trained(lm_values, tmp_path / "run", resume=True, callbacks=[Stop()], **asked)
    assert 6 * 0.05 < done.seconds < 6 * 0.2
    seconds = [line["seconds"] for line in read_metrics(tmp_path / "run" / "metrics.jsonl")]
    assert all(later > before - 0.04 for before, later in itertools.pairwise(seconds))


def test_a_causal_encoder_trained_whole_under_autocast_still_writes(lm_values, tmp_path):
    """transformers' decorators on `forward` stay, which its `generate` needs."""
    from transformers import AutoTokenizer, BertConfig, BertLMHeadModel

    tokenizer = AutoTokenizer.from_pretrained(lm_values["model"]["path"])
    size = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), is_decoder=True, **size)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    values = lm_values | {"method": {"name": "full"}, "model": {"path": str(tmp_path / "bert")}}
    done = trained(values, tmp_path / "run", autocast="bf16")
    assert scores(done.tuned) == scores(open_tuned(tmp_path / "run"))

"""What "base" stands for: the model before its training, whatever the method has done to its weights."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("pydantic")

from dual_lora.lab.errors import UserError
from dual_lora.lab.model.load import load_model
from dual_lora.lab.model.opened import BESIDE_THE_BASE, Tuned, open_tuned
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.evaluate import evaluate
from dual_lora.lab.run.train import run

METHODS = {
    "lora": {},
    "dual_lora": {},
    "pissa": {"r": 4},
    "lora with kasa": {"kasa_config": {}},
    "olora": {"r": 4},
    "lora with biases": {"bias": "all"},
    "dual_lora with biases": {"bias": "all"},
    "adalora": {"target_r": 2, "init_r": 4, "total_step": 4},
    "loha": {},
    "lokr": {},
    "hira": {},
    "ia3": {"feedforward_modules": []},
    "vera": {},
    "oft": {"r": 0, "oft_block_size": 4},
    "boft": {"boft_block_size": 4},
    "hra": {"r": 4},
    "fourierft": {"n_frequency": 10},
    "randlora": {"r": 4},
    "vblora": {"num_vectors": 8, "vector_length": 4, "topk": 2},
    "ln_tuning": {"target_modules": None},
    "miss": {"r": 4},  # not listed
}


def test_every_listed_method_is_tried():
    assert {name.split()[0].upper() for name in METHODS} >= BESIDE_THE_BASE


@pytest.mark.parametrize("method", METHODS)
def test_base_is_the_model_before_its_training(method, encoder_values, tmp_path):
    """On an encoder, which has biases, a norm and a head that is drawn at random."""
    name, options = method.split()[0], {"target_modules": ["query", "value"]} | METHODS[method]
    name, options = ("lora", options | {"init_lora_weights": name}) if name in ("pissa", "olora") else (name, options)
    encoder_values["method"] = {"name": name} | {k: v for k, v in options.items() if v is not None}
    encoder_values["train"] |= {"steps": 4, "learning_rate": 0.1}
    recipe = build_recipe(encoder_values)
    result = run(recipe, tmp_path / "run", progress=False)
    assert result.tuned.keeps_base == (method.split()[-1] not in ("pissa", "olora", "kasa", "biases", "miss"))
    torch.manual_seed(recipe.train.seed)
    untrained = load_model(recipe.model, len(result.tuned.classes))
    before = Tuned(untrained.model, untrained.tokenizer, "base", recipe, result.tuned.classes)
    (wanted,) = evaluate(before, variants=["base"], progress=False).metrics.values()
    for tuned in (result.tuned, open_tuned(tmp_path / "run")):
        found = evaluate(tuned, variants=["base", "tuned"], progress=False).metrics
        assert found["base"]["loss"] == pytest.approx(wanted["loss"], rel=1e-5)
        assert abs(found["tuned"]["loss"] - wanted["loss"]) > 1e-4, "else nothing was learned, and nothing is shown"


def test_what_was_asked_before_does_not_matter(lm_values, tmp_path):
    (tmp_path / "texts.txt").write_text("the sky is blue\nthe sea is cold\n")
    lm_values["method"] = {"name": "full"}
    lm_values["evaluate"] = {"tasks": ["loss"], "forgetting": str(tmp_path / "texts.txt")}
    tuned = run(build_recipe(lm_values), tmp_path / "run", progress=False).tuned
    torch.manual_seed(5)
    first = evaluate(tuned, progress=False).metrics
    number = torch.rand(())
    assert list(first) == tuned.variants == ["tuned"]
    assert evaluate(tuned, progress=False).metrics == first
    torch.manual_seed(5)
    assert torch.rand(()) == number, "loading the base draws no number of the caller's"


def test_a_base_that_is_not_known_is_not_made_up(encoder_values, tmp_path):
    encoder_values["method"] = {"name": "lora", "r": 4, "init_lora_weights": "pissa", "target_modules": ["query"]}
    opened = run(build_recipe(encoder_values), tmp_path / "run", progress=False).tuned
    alone = Tuned(opened.model, opened.tokenizer, "elsewhere", opened.recipe, opened.classes)
    with pytest.raises(UserError, match="The base model of elsewhere is not known"), alone.as_variant("base"):
        pass

"""Verify a classifier: a merged folder and other adapters by the log-probabilities of classes, with faults by name."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.export.export import merge
from dual_lora.lab.recipe.read import build_recipe
from dual_lora.lab.run.train import run
from dual_lora.lab.verify.verify import verify


def classifier(folder, tiny_encoder, reviews, seed=0, **more):
    data = {"train": str(reviews / "train.tsv"), "columns": ["label", "sentence"], "fields": {"text": "sentence"}}
    values = {
        "model": {"path": str(tiny_encoder), "head": "classification"}, "method": {"name": "dual_lora", "r": 4},
        "data": data, "train": {"steps": 40, "batch_size": 8, "learning_rate": 0.01, "seed": seed},
    }  # fmt: skip
    run(build_recipe(values | more), folder, progress=False)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, tiny_encoder, reviews):
    return classifier(tmp_path_factory.mktemp("classifier") / "run", tiny_encoder, reviews)


@pytest.fixture(scope="module")
def merged(tuned):
    merge(tuned, out := tuned.parent / "merged")
    return out


def altered(merged, tmp_path, change, base=None):
    """The merged folder with `change(merged weight, base weight)` in place of the encoder's weights."""
    shutil.copytree(merged, folder := tmp_path / "altered")
    weights, of_base = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    for name, weight in weights.items():
        if (own := of_base.get(name.removeprefix("bert."), of_base.get(name))) is not None:
            weights[name] = change(weight, own)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_merged_folder_is_on(tuned, merged):
    report = verify(tuned, against=str(merged))
    assert (report.finding.word, report.asks, report.prompts) == ("on", "texts", "the run's own train records")
    assert report.finding.tokens == 2 * report.finding.prompts
    assert report.finding.strength == pytest.approx(1, abs=1e-3)


def test_faults_have_their_names(tuned, merged, tiny_encoder, tmp_path):
    """With the head that was trained, so that the update alone is missing, or there twice."""
    for change, word in (
        (lambda new, old: old, "off"),
        (lambda new, old: old + 2 * (new - old), "merged twice"),
        (lambda new, old: old + 0.5 * (new - old), "other scale"),
        (lambda new, old: new + 0.3 * new.std() * torch.randn_like(new) if new.ndim > 1 else new, "another adapter"),
    ):
        folder = altered(merged, tmp_path, change, tiny_encoder)
        assert verify(tuned, against=str(folder)).finding.word == word
        shutil.rmtree(folder)


def test_records_that_are_elsewhere_are_said_to_be(tuned, merged, tmp_path):
    run = shutil.copytree(tuned, tmp_path / "run")
    note = run / "adapter" / "lab.json"
    note.write_text(re.sub(r'"[^"]*train\.tsv"', '"gone.tsv"', note.read_text()))
    with pytest.raises(UserError, match=r"the run's own, gone\.tsv, were not found"):
        verify(run, against=str(merged))


def test_itself_and_another_adapter(tuned, tiny_encoder, reviews, tmp_path):
    itself = verify(tuned)
    assert itself.finding.word == "on"
    assert "no fingerprint" in " ".join(itself.notes)
    again = tmp_path / "copy"
    shutil.copytree(tuned / "adapter", again)
    assert verify(tuned, adapter=str(again)).finding.word == "on"
    other = classifier(tmp_path / "other", tiny_encoder, reviews, seed=1)
    report = verify(tuned, adapter=str(other / "adapter"))
    assert not report.good
    assert "nats a token" not in report.finding.cause


def test_texts_of_a_file(tuned, merged, tmp_path):
    (tmp_path / "texts.txt").write_text("the sea is warm\nthe sea is cold\n")
    report = verify(tuned, against=str(merged), prompts=str(tmp_path / "texts.txt"))
    assert (report.finding.prompts, report.finding.tokens) == (2, 4)


def test_other_classes_are_refused(tuned, merged, tmp_path):
    shutil.copytree(merged, folder := tmp_path / "merged")
    config = json.loads((folder / "config.json").read_text())
    for names, message in (
        ({"0": "1", "1": "0"}, "are 1, 0, and the adapter's 0, 1"),
        ({"0": "x"}, "names its class"),
        (
            ["0", "1"],
            "could not be loaded: (AttributeError|StrictDataclass)",
        ),  # transformers' own error
    ):
        (folder / "config.json").write_text(json.dumps(config | {"id2label": names}))
        with pytest.raises(UserError, match=message):
            verify(tuned, against=str(folder))


def test_what_cannot_be_compared_is_said(tuned, tiny_encoder, reviews, tmp_path):
    with pytest.raises(UserError, match="--endpoint is for language models"):
        verify(tuned, endpoint="http://127.0.0.1:9/v1", model="x")
    values = {"model": {"path": str(tiny_encoder), "head": "regression"}, "train": {"steps": 1, "batch_size": 2}}
    number = classifier(tmp_path / "number", tiny_encoder, reviews, **values)
    with pytest.raises(UserError, match="gives numbers"):
        verify(number)

"""Each planted fault gets its own verdict, and what is right gets none."""

import json

import faulty
import pytest

from dual_lora.lab.verify.verify import verify

METHODS = ["lora", "dual_lora"]
FAULTS = [
    (faulty.right, "on"),
    (faulty.in_bf16, "on"),
    (faulty.off, "off"),
    (faulty.half, "layers dropped"),
    (faulty.alpha, "other scale"),
    (faulty.in_warmup, "λ below 1"),
    (faulty.twice, "merged twice"),
    (faulty.template, "wrong chat template"),
    (faulty.tokenizer, "other tokenizer"),
    (faulty.four_bits, "rounded"),
]


@pytest.fixture(scope="module")
def values(tiny_lm, questions):
    return {
        "name": "tiny",
        "model": {"path": str(tiny_lm)},
        "data": {"train": str(questions / "train.json"), "test": str(questions / "test.json")},
        "train": {"batch_size": 8},
    }


@pytest.fixture(scope="module")
def runs(values, tmp_path_factory):
    """{method: a finished run}."""
    folder = tmp_path_factory.mktemp("runs")
    return {method: faulty.trained(folder / method, values, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("plant", "word"), FAULTS, ids=[fault.__name__ for fault, _ in FAULTS])
def test_every_fault_has_its_own_verdict(plant, word, method, runs, tiny_lm, tmp_path):
    if plant is faulty.in_warmup and method == "lora":
        pytest.skip("LoRA has no warm-up")
    report = verify(runs[method], **{k: str(v) for k, v in plant(runs[method], tmp_path / "made", tiny_lm).items()})
    assert report.finding.word == word, report.summary()
    assert report.good == (word in ("on", "rounded"))


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_another_training_is_another_one(method, runs, values, questions, tmp_path):
    records = json.loads((questions / "train.json").read_text())
    for record in records:
        record["output"] = record["answer"] = "good" if record["answer"] == "true" else "bad"
    (tmp_path / "other.json").write_text(json.dumps(records))
    other = faulty.trained(tmp_path / "other", values, method, seed=1, train=str(tmp_path / "other.json"))
    report = verify(runs[method], adapter=str(other))
    assert report.finding.word == "another adapter", report.summary()

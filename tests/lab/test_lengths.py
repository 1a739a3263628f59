"""What an estimate takes from a recipe's records: the longest row, and the logits that its answers need."""

import json

import pytest

from dual_lora.lab.cost.lengths import Lengths, lengths_of
from dual_lora.lab.recipe.read import build_recipe


def test_the_longest_row_and_its_answer(lm_values):
    found = lengths_of(build_recipe(lm_values))
    assert isinstance(found, Lengths)
    assert (found.records, found.seen) == (48, 48)
    assert found.logits == 3  # the answer, its end, and the position before
    assert found.usual <= found.longest < 64
    lm_values["data"]["learn_prompt"] = True
    assert lengths_of(build_recipe(lm_values)).logits == found.longest


def test_longer_records_than_are_taken_do_not_count(lm_values, tmp_path):
    rows = [{"prompt": "sea " * n, "answer": "red"} for n in (4, 8, 40)]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lm_values["data"] = {"train": str(tmp_path / "x.jsonl"), "max_length": 24}
    found = lengths_of(build_recipe(lm_values))
    assert 12 < found.longest <= 24
    assert found.records == 3


def test_of_many_records_the_longest_are_read_and_some_others(encoder_values, monkeypatch):
    monkeypatch.setattr("dual_lora.lab.cost.lengths.LONGEST", 4)
    monkeypatch.setattr("dual_lora.lab.cost.lengths.DRAWN", 8)
    found = lengths_of(build_recipe(encoder_values))
    assert (found.records, found.seen, found.logits, found.classes) == (64, 12, None, 2)
    assert found.words.startswith("longest of 12 of 64 records, the mean one has")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"data": {"train": "hub:someone/something"}}, "on a hub"),
        ({"data": {"train": "none.jsonl"}}, "There is no data file none.jsonl"),
        ({"model": {"path": "meta-llama/Llama-3.2-3B"}}, "tokenizer is not here"),
        ({"data": {"max_length": 4}}, "every record is longer"),
    ],
)
def test_why_they_are_not_known(change, said, lm_values):
    values = {part: {**lm_values[part], **change.get(part, {})} for part in ("model", "data")}
    assert said in lengths_of(build_recipe(values))


def test_an_estimate_goes_by_the_records(lm_values, write_recipe, call):
    recipe = write_recipe(lm_values)
    code, out, err = call("estimate", recipe, "--methods", "lora", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["length"] == found["rows"]["longest"]
    code, out, _ = call("estimate", recipe, "--methods", "lora", "--max-length", 60, "--json")
    whole = json.loads(out)
    assert (whole["length"], whole["logits"], whole["rows"]) == (60, None, None)
    peaks = [each["methods"]["lora"]["memory"]["1"]["peak"] for each in (found, whole)]
    assert peaks[0] < peaks[1]


def test_an_estimate_counts_the_head_of_the_records_own_classes(encoder_values, write_recipe, call, tmp_path):
    (tmp_path / "three.tsv").write_text("cold\tthe sea\nwarm\tthe sky\nneither\tred\n")
    encoder_values["data"]["train"] = str(tmp_path / "three.tsv")
    recipe = write_recipe(encoder_values)
    sizes = []
    for options in ([], ["--classes", 3], ["--classes", 2]):
        code, out, err = call("estimate", recipe, "--methods", "lora", *options, "--json")
        assert code == 0, err
        sizes.append(json.loads(out)["methods"]["lora"]["trainable_parameters"])
    assert sizes[0] == sizes[1] > sizes[2]

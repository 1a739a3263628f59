"""The file beside an adapter: it leaves PEFT alone, tells no record, names what has changed, and is read with care."""

import json
import shutil

import faulty
import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_lora.lab.errors import UserError
from dual_lora.lab.verify import fingerprint
from dual_lora.lab.verify.verify import verify


@pytest.fixture(scope="module")
def run_folder(tiny_values, tmp_path_factory):
    return faulty.trained(tmp_path_factory.mktemp("runs") / "lora", tiny_values, "lora")


def changed(run_folder, tmp_path, **fields):
    folder = tmp_path / "adapter"
    shutil.copytree(run_folder / "adapter", folder)
    file = folder / fingerprint.FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return folder


def test_it_is_small_and_holds_no_record(run_folder, questions):
    text = (run_folder / "adapter" / fingerprint.FILE).read_text()
    assert len(text) < 64_000
    found = fingerprint.read(run_folder / "adapter")
    assert found.method == "LORA"
    assert 10 <= len(found.columns["base"]) <= fingerprint.TOKENS
    assert all(record["instruction"][:24] not in text for record in json.loads((questions / "train.json").read_text()))


def test_peft_loads_the_adapter_beside_it(run_folder, tiny_lm):
    from peft import AutoPeftModelForCausalLM

    assert AutoPeftModelForCausalLM.from_pretrained(run_folder / "adapter").peft_config["default"].r == 4


def test_another_base_is_named(run_folder, tiny_lm, tmp_path):
    shutil.copytree(tiny_lm, tmp_path / "base")
    file = tmp_path / "base/model.safetensors"
    torch.manual_seed(5)
    tensors = {name: x + 0.1 * torch.randn_like(x) for name, x in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    report = verify(run_folder, base=str(tmp_path / "base"))
    assert report.finding.word == "another adapter", report.summary()
    assert "the base's weights are not those that it was trained on" in report.finding.cause


def test_an_adapter_that_was_exchanged_is_found(run_folder, tmp_path):
    folder = changed(run_folder, tmp_path)
    faulty.with_tensors(folder, lambda name, x: -x if "lora_B" in name else x)
    assert not verify(folder).good


def test_merged_folders_are_judged_where_the_base_is_gone(run_folder, tmp_path):
    from dual_lora.lab.export.export import merge

    merge(run_folder, tmp_path / "merged")
    folder = changed(run_folder, tmp_path)
    (folder / "lab.json").unlink()
    faulty.with_config(folder, base_model_name_or_path="/nowhere")
    report = verify(folder, against=str(tmp_path / "merged"))
    assert (report.finding.word, report.prompts.startswith("the fingerprint's")) == ("on", True)


@pytest.mark.parametrize(
    "fields",
    [
        {"format": 2},
        {"probes": []},
        {"columns": {"base": [0.0]}},
        {"columns": {"base": [float("nan")] * 20, "tuned": [0.0] * 20}},
        {"rounding": 0},
        {"base_sample": "../../etc"},
        {"probes": [{"ids": [1, 2], "places": [7], "texts": ["a", "b"]}]},
        {"probes": [{"ids": [1, -2], "places": [1], "texts": ["a", "b"]}]},
        {"method": "x" * 1000},
    ],
)
def test_a_strangers_file_is_read_with_care(fields, run_folder, tmp_path):
    folder = changed(run_folder, tmp_path, **fields)
    with pytest.raises(UserError, match="is no fingerprint of an adapter"):
        verify(folder)


@pytest.mark.parametrize("text", ["", "[", "[" * 100_000, "null", "x" * (fingerprint.LARGEST + 1)])
def test_a_broken_file_is_one_sentence(text, run_folder, tmp_path):
    folder = changed(run_folder, tmp_path)
    (folder / fingerprint.FILE).write_text(text)
    with pytest.raises(UserError) as caught:
        verify(folder)
    assert "\n" not in str(caught.value)

"""Every fault that `verify` names, planted in the files that llama.cpp's server reads."""

import os
import subprocess

import pytest
import served_faults
from served_faults import VERDICTS
from test_llama_cpp import CONVERTED, HOME, pytestmark, served  # noqa: F401
from vllm_server import folder, verdict  # noqa: F401

from dual_lora.lab.model.gguf import find_converter


@pytest.fixture(scope="module")
def made(folder):  # noqa: F811
    adapters = served_faults.adapters(folder)
    return adapters["right"], served_faults.models(folder, adapters)


@pytest.mark.parametrize("fault", VERDICTS)
def test_a_fault_of_what_is_served(fault, folder, made, tmp_path):  # noqa: F811
    right, models = made
    file = tmp_path / "model.gguf"
    command = [*find_converter(str(HOME / "llama.cpp")), models.get(fault, models["right"]), "--outfile", file]
    run([*command, "--outtype", "f32"])
    if fault == "another tokenizer":
        served_faults.with_other_words_in_gguf(file)
    with served(tmp_path, file) as url:
        assert verdict(folder, right, url) == VERDICTS[fault]


def run(command):
    subprocess.run([str(part) for part in command], check=True, capture_output=True, env={**os.environ, **CONVERTED})

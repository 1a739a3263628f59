"""Every fault that `verify` names, planted in the file that llama.cpp's server reads."""

import os
import subprocess

import pytest
import served_faults
from llama_cpp_server import CONVERTED, HOME, needs_llama_cpp, served
from served_faults import VERDICTS, adapters  # noqa: F401

from dual_lora.lab.export.gguf import find_converter

pytestmark = needs_llama_cpp


@pytest.mark.parametrize("fault", VERDICTS)
def test_a_fault_is_found(fault, adapters, tmp_path):  # noqa: F811
    model, file = served_faults.served_whole(fault, adapters, tmp_path), tmp_path / "model.gguf"
    command = [*find_converter(str(HOME / "llama.cpp")), model, "--outfile", file, "--outtype", "f32"]
    subprocess.run([*map(str, command)], check=True, capture_output=True, env={**os.environ, **CONVERTED})
    if fault == "another tokenizer":
        served_faults.with_other_words_in_gguf(file)
    with served(tmp_path, file) as url:
        found = served_faults.found(adapters["right"], url)
    assert found == VERDICTS[fault]

"""llama.cpp's server with what `export` writes for it: a merged model, and a LoRA beside its base. `verify` judges.

Server (xllamacpp) and converters (from llama-cpp-python's sources) lie in an environment of their own: `make serving`.
"""

import subprocess

import pytest
from llama_cpp_server import CONVERTED, HOME, needs_llama_cpp, served
from vllm_server import folder, verdict  # noqa: F401

from dual_lora.lab.export.gguf import export_gguf, export_gguf_lora, find_converter

pytestmark = needs_llama_cpp


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):  # noqa: F811
    """Merged in q8_0, the base alone, and the update as a LoRA of full rank."""
    out, converter = tmp_path_factory.mktemp("gguf"), str(HOME / "llama.cpp")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("PYTHONPATH", CONVERTED["PYTHONPATH"])
    export_gguf(folder / "one", out / "merged.gguf", outtype="q8_0", converter=converter)
    options = {"dtype": "float32", "limit": 0, "progress": False, "converter": converter}
    export_gguf_lora(folder / "one", out / "whole.gguf", 1.0, **options)
    command = [*find_converter(converter), folder / "base", "--outfile", out / "base.gguf", "--outtype", "f32"]
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
    monkeypatch.undo()
    return out


@pytest.mark.parametrize(
    ("files", "verdicts"),
    [
        (["merged.gguf"], ["on", "rounded"]),
        (["base.gguf"], ["off"]),
        (["base.gguf", "whole.gguf"], ["on"]),
    ],
    ids=["merged", "base", "LoRA of full rank"],
)
def test_what_the_server_has(files, verdicts, exported, folder, tmp_path):  # noqa: F811
    with served(tmp_path, *(exported / name for name in files)) as url:
        assert verdict(folder, "one", url) in verdicts

"""A merged model in runtimes that give no log-probabilities: their greedy answer is the merged model's."""

import os
import subprocess
import sys

import pytest
from llama_cpp_server import CONVERTED, HOME
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_server import PYTHON, ask, folder, free_port, running  # noqa: F401

from dual_lora.lab.export.export import merge
from dual_lora.lab.export.gguf import find_converter

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
PROMPT, TOKENS = "The sky is", 12
OPENVINO = """
import openvino_genai, sys
options = openvino_genai.GenerationConfig()
options.max_new_tokens, options.do_sample, options.apply_chat_template = int(sys.argv[3]), False, False
pipeline = openvino_genai.LLMPipeline(sys.argv[1], "CPU", INFERENCE_PRECISION_HINT="f32")  # else bf16, where fast
print(pipeline.generate(sys.argv[2], options), end="")
"""
ONNX = """
import onnxruntime_genai, sys
model = onnxruntime_genai.Model(sys.argv[1])
tokenizer, options = onnxruntime_genai.Tokenizer(model), onnxruntime_genai.GeneratorParams(model)
ids = tokenizer.encode(sys.argv[2])
options.set_search_options(max_length=len(ids) + int(sys.argv[3]), do_sample=False)
generator = onnxruntime_genai.Generator(model, options)
generator.append_tokens(ids)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(ids):]), end="")
"""


def answer(model):
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    made = AutoModelForCausalLM.from_pretrained(model, dtype="float32").generate(
        ids, max_new_tokens=TOKENS, do_sample=False
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.fixture(scope="module")
def merged(folder, tmp_path_factory):  # noqa: F811
    """The merged folder and its answer, which is not the base's."""
    out = tmp_path_factory.mktemp("merged") / "merged"
    merge(str(folder / "one"), out, dtype="float32")
    expected = answer(out)
    assert expected.strip()
    assert expected != answer(folder / "base")
    return out, expected


def run(command, **environment):
    command, environment = [str(part) for part in command], {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason="no environment for it: make serving")


@needs(HOME / "genai")
def test_openvino_genai_reads_the_gguf_file(folder, merged, tmp_path):  # noqa: F811
    model, file = tmp_path / "half", tmp_path / "merged.gguf"
    merge(str(folder / "one"), model, dtype="float16")  # it reads no f32 files
    expected = answer(model)
    run([*find_converter(str(HOME / "llama.cpp")), model, "--outfile", file, "--outtype", "f16"], **CONVERTED)
    assert (
        run([HOME / "bin" / "python", "-c", OPENVINO, file, PROMPT, TOKENS], PYTHONPATH=str(HOME / "genai")) == expected
    )


@needs(HOME / "genai")
def test_onnx_runtime_genai_builds_from_the_folder(merged, tmp_path):
    pytest.importorskip("onnx_ir")
    model, expected = merged
    builder = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", model, "-o", tmp_path / "onnx"]
    run([*builder, "-p", "fp32", "-e", "cpu", "-c", tmp_path / "cache"], PYTHONPATH=str(HOME / "builder"))
    program = [HOME / "bin" / "python", "-c", ONNX, tmp_path / "onnx", PROMPT, TOKENS]
    assert run(program, PYTHONPATH=str(HOME / "genai")) == expected


@needs(PYTHON)
def test_transformers_serve(merged, tmp_path):
    model, expected = merged
    port = free_port()
    command = [PYTHON.with_name("transformers"), "serve", model, "--port", port]
    (tmp_path / "hub").mkdir()  # which it lists
    with running(command, tmp_path / "log", port, HF_HUB_CACHE=str(tmp_path / "hub")) as url:
        asked = {"model": str(model), "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        status, said = ask(f"{url}/completions", "POST", asked)
        assert (status, said["choices"][0]["text"]) == (200, expected)

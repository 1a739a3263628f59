"""Tensor and sequence parallelism, and merging under FSDP2: two processes do what one does, or are told why not."""

import importlib.util
import json

import pytest

from forked import two_processes

CASES = [
    "torch",
    "identity",
    "surrogate",
    "sequence",
    "dropout",
    "fsdp2",
    "idle",
    "sampled",
    "reference",
    "filled",
    "switched",
    "written",
    "refusals",
]
if importlib.util.find_spec("transformers.distributed.tensor_parallel"):  # 5.17 and later; earlier shards are refused
    CASES.append("plan")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder that the cases wrote into, what was printed) of one launch; it ends with the first case that fails."""
    folder = tmp_path_factory.mktemp("sharded")
    code = f"from pathlib import Path\nfrom sharded_worker import main\nmain(Path({str(folder)!r}), {CASES!r})"
    _, printed = two_processes(code, folder / "meeting")
    return folder, printed[-6000:]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_computes(case, run):
    folder, printed = run
    assert (folder / f"{case}.passed").exists(), printed


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("embedding", ["ValueError", "this Embedding", "Leave this layer out"]),
        ("convolution", ["ValueError", "this Conv1d", "Leave this layer out"]),
        ("convolution merged", ["ValueError", "Cannot merge", "Save the adapter"]),
        ("plain input", ["ValueError", "got a plain tensor", "Call the model as a whole"]),
        ("replicated", ["ValueError", "(Replicate(),)", "Leave this layer out"]),
        ("quantised", ["ValueError", "quantised Linear", "shard the base in bf16"]),
        ("bare part", ["ValueError", "bare part", "Use transformers 5.17"]),
    ],
)
def test_what_does_not_work_says_so(what, words, run):
    folder, printed = run
    assert (folder / "refusals.passed").exists(), printed
    said = json.loads((folder / "said.json").read_text())[what]
    for word in words:
        assert word in said


def test_shards_are_not_saved_as_an_adapter(run):
    """safetensors refuses; an adapter is saved from the gathered state, as Trainer and accelerate do."""
    folder, _ = run
    assert "RuntimeError" in (folder / "shards0.txt").read_text()
    assert not list(folder.glob("shards*/adapter_model.safetensors"))

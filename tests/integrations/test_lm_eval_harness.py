"""lm-evaluation-harness sees the adapter: by its folder, and as a live model."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-evaluation-harness comes with pip install '.[integrations]'")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def adapter(tiny_lm, tmp_path_factory):
    """A strong random adapter, which cannot leave any answer's likelihood as it is."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from dual_lora import DualLoraConfig

    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(tiny_lm)
    config = DualLoraConfig(r=8, init_weights=False, target_modules="all-linear", task_type="CAUSAL_LM")
    folder = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_base_and_adapter_are_told_apart(example, tiny_lm, adapter):
    accuracies = example("lm_eval_harness").main(adapter, str(tiny_lm), questions=20)
    assert set(accuracies) == {"base", "adapter"}
    assert all(0 <= value <= 1 for value in accuracies.values())


def test_the_folder_and_the_live_model_score_alike(example, tiny_lm, adapter, tmp_path):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    tasks = example("lm_eval_harness").write_task(tmp_path, 12)

    def likelihoods(lm):
        results = simple_evaluate(lm, tasks=["tool_calls"], task_manager=tasks, bootstrap_iters=0, log_samples=True)
        samples = sorted(results["samples"]["tool_calls"], key=lambda sample: sample["doc_id"])
        return [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]

    options = dict(device="cpu", batch_size=4)
    by_folder = likelihoods(HFLM(pretrained=str(tiny_lm), peft=str(adapter), dtype="float32", **options))
    tokenizer = AutoTokenizer.from_pretrained(tiny_lm)
    live = AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert likelihoods(HFLM(pretrained=live, tokenizer=tokenizer, **options)) == by_folder
    merged = likelihoods(HFLM(pretrained=live.merge_and_unload(), tokenizer=tokenizer, **options))
    assert torch.allclose(torch.tensor(merged), torch.tensor(by_folder), atol=1e-3)
    base = likelihoods(HFLM(pretrained=str(tiny_lm), dtype="float32", **options))
    assert not torch.allclose(torch.tensor(base), torch.tensor(by_folder), atol=0.1)


@pytest.mark.long  # `test_imports` asks PEFT for the method in every order
def test_the_command_knows_the_method_through_sitecustomize(example, tiny_lm, adapter, tmp_path):
    example("lm_eval_harness").write_task(tmp_path, 10)
    (tmp_path / "sitecustomize.py").write_text("import dual_lora\n")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "tool_calls", "--device", "cpu"),
            *("--model_args", f"pretrained={tiny_lm},peft={adapter},dtype=float32"),
            *("--include_path", str(tmp_path), "--output_path", str(tmp_path / "results.json")),
        ],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = tmp_path.rglob("results*.json")
    assert "acc,none" in json.loads(written.read_text())["results"]["tool_calls"]

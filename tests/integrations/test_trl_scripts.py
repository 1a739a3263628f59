"""TRL's own scripts, as installed, with the five lines of docs/how-to/works-with.md: they train this method."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

pytest.importorskip("trl", minversion="1.0")
pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "works-with.md"
QUESTIONS = ["wake me at six", "what is the weather", "play a song", "add milk to the list"] * 8
ROWS = {
    "sft": [{"prompt": q + " ", "completion": "yes"} for q in QUESTIONS],
    "dpo": [{"prompt": q + " ", "chosen": "yes", "rejected": "no"} for q in QUESTIONS],
    "reward": [{"prompt": q + " ", "chosen": "yes", "rejected": "no"} for q in QUESTIONS],
    "kto": [
        {"prompt": q + " ", "completion": "yes no"[3 * (i % 2) :][:3], "label": i % 2 == 0}
        for i, q in enumerate(QUESTIONS)
    ],
    "grpo": [{"prompt": q + " "} for q in QUESTIONS],
    "rloo": [{"prompt": q + " "} for q in QUESTIONS],
}
REWARDED = ["--num_generations", "4", "--max_completion_length", "8", "--reward_funcs", "rewards.short"]
OPTIONS = {"reward": ["--lora_task_type", "SEQ_CLS"], "grpo": REWARDED, "rloo": REWARDED}


@pytest.mark.parametrize("script", ROWS)
def test_the_script_trains_and_saves(script, tiny_lm, tmp_path):
    program = re.search(r"```python\n(.*?import runpy.*?)```", PAGE.read_text(), re.DOTALL)
    (tmp_path / "dual.py").write_text(program[1])
    (tmp_path / "rewards.py").write_text(
        "def short(completions, **_):\n    return [-float(len(c)) for c in completions]\n"
    )
    data, out = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS[script])))
    command = [sys.executable, "dual.py", script, "--model_name_or_path", str(tiny_lm), "--dataset_name", str(data)]
    command += ["--use_peft", "--lora_r", "4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"]
    command += ["--output_dir", str(out), "--max_steps", "4", "--learning_rate", "1e-2", "--report_to", "none"]
    command += ["--per_device_train_batch_size", "4", "--bf16", "False", "--use_cpu", "--logging_steps", "1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
    environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
    done = subprocess.run(
        command + OPTIONS.get(script, []), cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["alpha"]) == ("DUAL_LORA", 4, 16.0)
    state = load_file(out / "adapter_model.safetensors")
    moved = [name for name, tensor in state.items() if ".dual_lora_B" in name and tensor.any()]
    assert moved, "B is zero at the start, and after four steps it is still"
    assert "dual-lora" in (out / "README.md").read_text()

"""A training on several processes, started as the documentation says."""

import os
import subprocess
import sys
from pathlib import Path

CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
ON_CPU = Path(__file__).with_name("fsdp2_on_cpu.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launched(strategy, processes, recipe, out, *more):
    """The documented command for ``processes`` of them on CPU. strategy: fsdp2-in-parts has checkpoints in parts."""
    environment = ENVIRONMENT
    if strategy == "ddp":
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command += ["-m", "dual_lora.lab.cli"]
    else:
        config = CONFIGS / f"{strategy}.yaml"
        if strategy == "fsdp2-in-parts":
            text, config = (CONFIGS / "fsdp2.yaml").read_text(), Path(out).with_suffix(".yaml")
            config.write_text(text.replace("FULL_STATE_DICT", "SHARDED_STATE_DICT"))
        started = [str(ON_CPU)]
        if strategy.startswith("zero"):  # DeepSpeed asks for the CPU by itself
            started, environment = ["-m", "dual_lora.lab.cli"], {**ENVIRONMENT, "DS_ACCELERATOR": "cpu"}
            config = Path(out).with_suffix(".yaml")
            config.write_text((CONFIGS / f"{strategy}.yaml").read_text().replace("use_cpu: false", "use_cpu: true"))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
        command += ["--num_processes", str(processes), "--main_process_port", "0", *started]
    command += ["train", str(recipe), "--out", str(out), *more]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

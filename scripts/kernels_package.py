"""The Triton kernels as a Python-only package of Hugging Face's `kernels`: `python -m scripts.kernels_package FOLDER`.

Not published: no card has run the kernels yet. FOLDER becomes what kernel-builder takes (build.toml, flake.nix and
torch-ext/), and with it what it would build of that, which `kernels.get_local_kernel` loads: build/torch-cuda/ with
its metadata.json. Both hold the same files: core/kernels/linear.py and all that it imports, copied as they are. The
format: https://huggingface.co/docs/kernels/kernel-requirements. It asks for relative imports alone, which ours are, and
for no name in torch.ops, as several versions may be loaded at once: the operators (core/op.py) stay out.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "dual_lora"
START = "core/kernels/linear.py"
NAME = "dual-lora-kernels"
MODULE = NAME.replace("-", "_")

INIT = '''"""Dual LoRA (Xu et al., arXiv 2512.03402) in Triton: W + ΔW, and the gradients of the four factors.

    ΔW = s · ReLU(B A) ⊙ Sign(D C),  s = λ α / √(r1 r2)

compose(weight, adapters, dtype): W + ΣΔW, [O, I], in `dtype`; weight may be None.
forward(x, weight, adapters): x (W + ΣΔW)ᵀ for x [T, I].
backward(dy, x, weight, adapters, loss_scale, needs): the gradients of `forward`; those of the factors in fp32.
factor_gradients(G, adapters, loss_scale): the factors' gradients from G = ∂L/∂W [O, I].
"""

from .core.blocked import Gradients, Needs
from .core.kernels.linear import backward, compose, factor_gradients, forward
from .core.reference import Adapter, Factors, Form

__all__ = ["Adapter", "Factors", "Form", "Gradients", "Needs", "backward", "compose", "factor_gradients", "forward"]
'''

BUILD = f"""[general]
name = "{NAME}"
version = 0
edition = 5
license = "Apache-2.0"
backends = ["cuda"]

[torch-noarch]
"""

FLAKE = """{
  description = "Dual LoRA's Triton kernels";
  inputs.kernel-builder.url = "github:huggingface/kernels";
  outputs = { self, kernel-builder }: kernel-builder.lib.genKernelFlakeOutputs { inherit self; path = ./.; };
}
"""

CARD = f"""---
license: apache-2.0
tags: [kernels]
---

# {NAME}

Triton kernels of Dual LoRA, W + s · ReLU(B A) ⊙ Sign(D C): composing a weight, and the gradients of its factors.
They need Triton 3.4 and Python 3.10.

They have run in Triton's interpreter and were compiled for NVIDIA cards from Ampere on. **No card has run them yet.**

```python
import torch
from kernels import get_local_kernel

kernels = get_local_kernel("FOLDER")
factors = kernels.Factors(A, B, C, D)                     # [r1, I], [O, r1], [r2, I], [O, r2], fp32
adapter = kernels.Adapter(factors, torch.tensor(0.5, device="cuda"), kernels.Form())
W_eff = kernels.compose(W, [adapter], torch.bfloat16)     # W + ΔW
```
"""


def needed(start: str = START) -> list[str]:
    """The package's files that one file imports, itself and what those import included."""
    found: set[str] = set()
    waiting = [PACKAGE / start]
    while waiting:
        file = waiting.pop()
        if (name := file.relative_to(PACKAGE).as_posix()) in found:
            continue
        found.add(name)
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                folder = file.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                candidates = [folder.with_suffix(".py"), *(folder / f"{alias.name}.py" for alias in node.names)]
                waiting += [candidate for candidate in candidates if candidate.is_file()]
    folders = {f"{parent.as_posix()}/__init__.py" for name in found for parent in Path(name).parents if parent.name}
    return sorted(found | folders)


def write(folder: Path, backend: str = "cuda") -> None:
    """Write the package into a folder that is not there, or is empty. Raises FileExistsError for any other."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name a new folder.")
    built = folder / "build" / f"torch-{backend}"
    for place in (folder / "torch-ext" / MODULE, built):
        for name in needed():
            (place / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(PACKAGE / name, place / name)
        (place / "__init__.py").write_text(INIT, encoding="utf-8")
    for name, text in (("build.toml", BUILD), ("flake.nix", FLAKE), ("README.md", CARD)):
        (folder / name).write_text(text, encoding="utf-8")
    digests = {
        file.relative_to(built).as_posix(): base64.b64encode(hashlib.sha256(file.read_bytes()).digest()).decode()
        for file in sorted(built.rglob("*.py"))
    }
    metadata = {
        "name": NAME,
        "id": f"_{MODULE}_{backend}_{hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:7]}",
        "version": 0,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    (built / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m scripts.kernels_package FOLDER")
    write(Path(sys.argv[1]))

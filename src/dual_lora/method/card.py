"""Add to the card that PEFT, Trainer and TRL write next to an adapter which package the adapter needs."""

import functools
import os
from typing import Any

from peft import PeftModel

TAG = "dual-lora"
HEADING = "## How to load it"
TEXT = f"""{HEADING}

This is an adapter of [Dual LoRA](https://arxiv.org/abs/2512.03402). PEFT knows the method once its package is imported:

```bash
pip install dual-lora
```

```python
import dual_lora
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("…")  # this folder, or its name on the hub
```
"""


def install() -> None:
    """Wrap PEFT's function that writes cards."""
    kind: Any = PeftModel
    theirs = kind.create_or_update_model_card

    @functools.wraps(theirs)
    def with_package(model: Any, output_dir: str) -> None:
        theirs(model, output_dir)
        if any(config.peft_type == "DUAL_LORA" for config in model.peft_config.values()):
            _add(os.path.join(output_dir, "README.md"), model)

    kind.create_or_update_model_card = with_package


def _add(file: str, model: Any) -> None:
    from peft.peft_model import ModelCard  # the hub's, as PEFT has it

    kind, labels = type(model).__name__, getattr(getattr(model, "config", None), "num_labels", None)
    card = ModelCard.load(file)
    card.data["tags"] = sorted({*(card.data.get("tags") or ()), TAG})
    if HEADING not in card.text:
        text = TEXT.replace("AutoPeftModelForCausalLM", f"Auto{kind}" if kind != "PeftModel" else "AutoPeftModel")
        if kind.endswith("Classification") and labels not in (None, 2):  # 2 is what a base's folder means by default
            text = text.replace('("…")', f'("…", num_labels={labels})')
        card.text = card.text.rstrip() + "\n\n" + text
    card.save(file)

"""What libraries say of themselves, and nobody asked: kept off the screen, in a command and in its worker processes."""

import logging
import warnings

# Their warnings are for programmers: of kernels that this machine does not have, of every retry.
# "torch" alone is set back when torch is imported, and torchao's import makes its pytree module warn.
_NOISY = (
    *("torch", "torch.utils._pytree", "torchao", "bitsandbytes", "hqq", "peft", "accelerate", "datasets"),
    *("huggingface_hub", "huggingface_hub.utils._http", "httpx", "kernels"),
    "transformers.integrations.hub_kernels",
)


def silence_libraries() -> None:
    """Let libraries log errors alone, and drop the warnings that point at their own code."""
    for library in _NOISY:
        logging.getLogger(library).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|peft|torch|accelerate|datasets)\b")

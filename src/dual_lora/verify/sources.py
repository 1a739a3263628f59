"""A check of what a method's configuration names besides its base: other models, adapters, tokenizers and files.

PEFT loads them while it builds the method, and looks at none of them: a model's own code could run, another adapter
could hold a pattern without an end, and a pipe would be waited for. A configuration may come with somebody else's
adapter.
"""

from pathlib import Path
from typing import Any


def check_sources(config: Any, model: Any) -> None:
    """Raise ValueError, in one sentence, for a configuration that has PEFT load something else than the adapter itself.

    config: of any method of PEFT. model: what it is to adapt; its weights are not looked at.
    """
    for field, harmless in (("shadow_model", "mirror"), ("adapters", None), ("megatron_config", None)):
        value = getattr(config, field, None)
        if value and value != harmless:
            raise ValueError(
                f"{field} names {_short(value)}, which PEFT would load or import without a look at it. Leave it out"
                f"{f' (or write {harmless})' if harmless else ''}, or load this adapter by PEFT itself."
            )
    file = getattr(config, "prompt_tuning_init_state_dict_path", None)
    if file and not (isinstance(file, str) and (Path(file).is_file() or not Path(file).exists())):
        raise ValueError(f"prompt_tuning_init_state_dict_path is {_short(file)}, which is no file.")
    _check_tokenizer(config, getattr(model, "name_or_path", None))


def _check_tokenizer(config: Any, base: str | None) -> None:
    """Check the tokenizer of a prompt that begins as a text, whose tokens PEFT asks a tokenizer for; in training
    alone."""
    start = getattr(config, "prompt_tuning_init", None)
    if getattr(start, "value", start) != "TEXT" or config.inference_mode:
        return
    if config.tokenizer_kwargs:
        raise ValueError("tokenizer_kwargs may say where files are written and sent: leave it out.")
    if config.tokenizer_name_or_path != base:
        raise ValueError(
            f"tokenizer_name_or_path is {_short(config.tokenizer_name_or_path)}, expected the base's own, {base}: "
            "another one would be loaded without a look at it."
        )


def _short(value: Any) -> str:
    return f"{value!r:.200}"

"""A check of the parts that a model's config.json names and that another library than transformers builds.

Of a vision tower by timm, transformers hands on whatever stands in `model_args`, and timm opens what they name: its
earlier versions by pickle. Its names of architectures may lead to the hub, or to a folder anywhere.
"""

from collections.abc import Iterator, Mapping
from typing import Any

ARGUMENTS, ARCHITECTURES = "model_args", ("architecture", "backbone")
# Of the arguments of timm.create_model, those that name files or say what they hold.
SOURCES = "checkpoint", "cache_dir", "pretrained"


def settings_in(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Names and values of a configuration, those of a model's parts (text_config) too."""
    for name, value in values.items():
        yield name, value
        if isinstance(value, Mapping):
            yield from settings_in(value)


def check_parts(values: Mapping[str, Any]) -> None:
    """Raise ValueError, in one sentence, for a configuration that has a part loaded from elsewhere."""
    for name, value in settings_in(values):
        sourced = name in ARCHITECTURES and isinstance(value, str) and ":" in value
        if sourced or (name == ARGUMENTS and _names_a_file(value)):
            raise ValueError(
                f"its config.json has {name} {value!r:.200}, by which timm would load files that nothing has looked "
                f"at. Nothing was loaded: take {name} out of it."
            )


def _names_a_file(value: Any) -> bool:
    """Whether arguments for timm have more than sizes and names of its own layers."""
    if isinstance(value, Mapping):
        return any(str(key).startswith(SOURCES) or _names_a_file(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return any(map(_names_a_file, value))
    return isinstance(value, str) and any(sign in value for sign in "/\\:")

"""A check of what a model's config.json names and another library than transformers builds: its parts, its packing.

Of a vision tower by timm, transformers hands on whatever stands in `model_args`, and timm opens what they name: its
earlier versions by pickle. Its names of architectures may lead to the hub, or to a folder anywhere. Of a detector's
`backbone`, transformers asks the hub whether it is a repository, and takes the configuration that it finds there.

torchao calls what `quant_type` names, with the arguments that stand there: any class or function that one of its
modules has, and for a torch.dtype it takes any function of torch, such as `torch.save`.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

ARGUMENTS, ARCHITECTURES = "model_args", ("architecture", "backbone")
# Of the arguments of timm.create_model, those that name files or say what they hold.
SOURCES = "checkpoint", "cache_dir", "pretrained"
PACKING, KIND, CONTENT = "quant_type", "_type", "_data"  # how torchao writes an object
# Of torchao's names, those of settings, of what a scale belongs to, and of values that stand in a list of its own.
_SETTING = re.compile(r"\w*(Config|Kwargs|Type|Preference|Format|Algorithm|Mode|Domain)|Per[A-Z]\w*")


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
        if name == PACKING:
            _check_packing(value)
    for section in _sections_in(values):
        if section.get("backbone") and section.get("backbone_config") is None and _asks_for_it(section, values):
            raise ValueError(
                f"its config.json has backbone {section['backbone']!r:.200}, for which transformers may ask the hub. "
                "Nothing was loaded: write the configuration itself, as backbone_config."
            )


def _sections_in(values: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield values
    yield from (value for _, value in settings_in(values) if isinstance(value, Mapping))


def _asks_for_it(section: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a backbone may be sought on the hub: timm's own is not, nor a word of a whole model that has none."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    kind = section.get("model_type")
    if section is not whole or not isinstance(kind, str) or kind not in CONFIG_MAPPING_NAMES:
        return kind != "timm_backbone"
    return "backbone_config" in CONFIG_MAPPING[kind].sub_configs


def _check_packing(value: Any) -> None:
    """Raise ValueError for an object of torchao's that is no setting."""
    if isinstance(value, list):
        for each in value:
            _check_packing(each)
    elif isinstance(value, Mapping):
        kind, content = value.get(KIND), value.get(CONTENT)
        if KIND in value and not (_is_dtype(content) if kind == "torch.dtype" else _SETTING.fullmatch(str(kind))):
            raise ValueError(
                f"its config.json has {PACKING} with {kind!r:.100} and {content!r:.100}, which is no setting of "
                f"torchao's, and which torchao might call. Nothing was loaded: take {PACKING} out of it."
            )
        for each in value.values():
            _check_packing(each)


def _is_dtype(name: Any) -> bool:
    import torch

    return isinstance(name, str) and isinstance(getattr(torch, name, None), torch.dtype)


def _names_a_file(value: Any) -> bool:
    """Whether arguments for timm have more than sizes and names of its own layers."""
    if isinstance(value, Mapping):
        return any(str(key).startswith(SOURCES) or _names_a_file(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return any(map(_names_a_file, value))
    return isinstance(value, str) and any(sign in value for sign in "/\\:")

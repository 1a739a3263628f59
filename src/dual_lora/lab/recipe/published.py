"""Configurations of published models, written down in published.yaml: nothing is downloaded to plan for them.

`published_config("llama-3-8b")` is transformers' own configuration object; sizes, heads and vocabularies are those of
the publication that the family names. A test builds every one on the meta device and compares its number of parameters
with what the publication states.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Literal

from dual_lora.lab.errors import UserError, suggest
from dual_lora.lab.read import parse_yaml

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Published:
    """One size of a family. stated: number of parameters in the publication's words; of: what it counts."""

    stated: str
    values: dict[str, Any]
    of: Literal["all", "backbone"] = "all"


@dataclass(frozen=True)
class Family:
    """model_type: transformers' name of the architecture; shared: values that all sizes have in common."""

    model_type: str
    source: str
    sizes: dict[str, Published]
    shared: dict[str, Any]
    head: Literal["causal", "classification"] = "causal"


def _family(written: dict[str, Any]) -> Family:
    sizes = {}
    for name, (stated, *row) in written["sizes"].items():
        more = row.pop() if isinstance(row[-1], dict) else {}
        values = dict(zip(written["columns"], row, strict=False))
        if "num_key_value_heads" in written["columns"]:
            values.setdefault("num_key_value_heads", values["num_attention_heads"])
        sizes[name] = Published(stated, values | more, written.get("counts", "all"))
    head = written.get("head", "causal")
    return Family(written["type"], written["source"], sizes, written.get("shared", {}), head)


_FILE = files(__package__).joinpath("published.yaml")
FAMILIES: dict[str, Family] = {
    name: _family(written)
    for name, written in parse_yaml(_FILE.read_text(encoding="utf-8"), "published.yaml")["families"].items()
}
_SIZES = {name: (family, size) for family in FAMILIES.values() for name, size in family.sizes.items()}

# Names under which the same weights are also known.
_ALSO = {"llama-30b": "llama-33b", "deberta-xxlarge": "deberta-v2-xxlarge"}
# What hubs put around a name without changing the architecture.
_BEFORE = ("meta-", "openai-")
_AFTER = ("-hf", "-instruct", "-chat", "-it", "-pt", "-base", "-instruct-2507", "-thinking-2507", "-chat-hf")


def published_names() -> list[str]:
    """All names, family by family."""
    return list(_SIZES)


def published_family(name: str) -> Family:
    """The family that a name belongs to. Raises UserError as `published_config` does."""
    return _find(name)[0]


def published_config(name: str, **more: Any) -> PreTrainedConfig:
    """transformers' configuration of a published model. more: values laid over it, such as num_labels.

    name: as in `published_names()`; a hub name like "meta-llama/Meta-Llama-3-8B-Instruct" means the same.
    Raises UserError for a name that is not here, with the nearest one.
    """
    from transformers import AutoConfig

    family, size = _find(name)
    return AutoConfig.for_model(family.model_type, **{**family.shared, **size.values, **more})


def known_name(text: str) -> str | None:
    """The name in `published_names()` that a text means, or None."""
    plain = text.rsplit("/", 1)[-1].lower()
    for start in ("", *_BEFORE):
        bare = plain.removeprefix(start)
        for end in ("", *_AFTER):
            candidate = bare.removesuffix(end)
            candidate = _ALSO.get(candidate, candidate)
            if candidate in _SIZES:
                return candidate
    return None


def _find(name: str) -> tuple[Family, Published]:
    known = known_name(name)
    if known is None:
        raise UserError(f"No published configuration is called {name!r}.{suggest(name.lower(), _SIZES)}")
    return _SIZES[known]

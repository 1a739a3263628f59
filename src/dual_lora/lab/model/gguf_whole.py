"""Whether transformers has read all of a GGUF file: it leaves out what it has no place for, and says nothing.

Also which tokens begin and end a text by the file: transformers before 5.20 takes others.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from dual_lora.lab.errors import UserError

_KEPT = ("gpt-oss",)  # whose scaling of positions transformers takes over
_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding"}


class _Held(NamedTuple):
    """What stands in a file: how its positions are scaled, if they are, the size of each tensor, and ids of tokens."""

    scaling: str
    sizes: dict[str, int]
    tokens: dict[str, int]


def check_whole(file: Path, model: Any, language: bool = True) -> None:
    """Raise UserError if the model that was read from a GGUF file lacks what stands in it.

    A language model has as many weights as the file, and what stands below another head as many as the file without
    its own; long-context factors of positions (Llama 3.1 and later) are a tensor or a field of their own.
    """
    held = _read(file, file.stat().st_mtime_ns)
    way_out = "transformers leaves that out, and the model would be another one: use the model's folder of safetensors."
    if held.scaling:
        raise UserError(f"{file} scales its positions ({held.scaling}); {way_out}")
    # Where tied, a head of its own in the file, as Bloom's have, is a copy.
    headless = not language or model.config.tie_word_embeddings
    wanted = sum(size for name, size in held.sizes.items() if not (headless and name == "output.weight"))
    read = sum(p.numel() for p in (model if language else model.base_model).parameters())
    if wanted != read:
        raise UserError(f"{file} holds {wanted:,} weights, of which the model that was read has {read:,}; {way_out}")


def set_special_tokens(file: Path, tokenizer: Any) -> None:
    """Give a tokenizer that was read from a GGUF file the special tokens that the file names."""
    for name, id in _read(file, file.stat().st_mtime_ns).tokens.items():
        if getattr(tokenizer, f"{name}_id") != id:
            setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(id))


@lru_cache(maxsize=8)
def _read(file: Path, changed: int) -> _Held:
    """Takes a second or two, most of it for the vocabulary: a study's runs read the same file. changed: its time."""
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    sizes = {tensor.name: int(tensor.n_elements) for tensor in reader.tensors}
    scaling = [name for name in sizes if name.startswith("rope_f")]
    if not scaling and architecture not in _KEPT and field(f"{architecture}.rope.scaling.type") not in (None, "none"):
        scaling = ["rope.scaling.type"]
    ids = {name: field(f"tokenizer.ggml.{theirs}_token_id") for name, theirs in _TOKENS.items()}
    return _Held(", ".join(scaling), sizes, {name: int(id) for name, id in ids.items() if id is not None})

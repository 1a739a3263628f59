"""Whether transformers has read all of a GGUF file: it leaves out what it has no place for, and says nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dual_lora.lab.errors import UserError

_KEPT = ("gpt-oss",)  # whose scaling of positions transformers takes over


def check_whole(file: Path, model: Any) -> None:
    """Raise UserError if the model that was read from a GGUF file lacks what stands in it.

    A language model has as many weights as the file; long-context factors of its positions (Llama 3.1 and later) are a
    tensor or a field of their own.
    """
    from gguf import GGUFReader

    reader = GGUFReader(file)

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    architecture = field("general.architecture")
    scaled = field(f"{architecture}.rope.scaling.type") not in (None, "none") and architecture not in _KEPT
    factors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_f")]
    way_out = "transformers leaves that out, and the model would be another one: use the model's folder of safetensors."
    if scaled or factors:
        raise UserError(f"{file} scales its positions ({', '.join(factors) or 'rope.scaling.type'}); {way_out}")
    tied = model.config.tie_word_embeddings  # then a head of its own in the file, as Bloom's have, is a copy
    counted = [tensor for tensor in reader.tensors if not (tied and tensor.name == "output.weight")]
    held, read = sum(int(tensor.n_elements) for tensor in counted), sum(p.numel() for p in model.parameters())
    if held != read:
        raise UserError(f"{file} holds {held:,} weights, of which the model that was read has {read:,}; {way_out}")

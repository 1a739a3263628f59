"""Load a merged model that is compared with an adapter."""

from pathlib import Path
from typing import Any, get_args

from dual_lora.lab.errors import UserError, described
from dual_lora.lab.model.load import load_tokenizer, quiet
from dual_lora.lab.model.location import Location, check_settings, classes_of, locate
from dual_lora.lab.model.opened import Tuned, load_plain
from dual_lora.lab.model.own_code import unasked
from dual_lora.lab.recipe.schema import Precision
from dual_lora.lab.verify.logprobs import Probe

PRECISIONS = get_args(Precision)


def load_candidate(path: str, classes: list[str]) -> tuple[Tuned, Any]:
    """A merged model in its own precision, and its tokenizer, None if it has none. classes: of a classifier."""
    from transformers import AutoConfig

    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(f"{path} is an adapter: give it by --adapter.")
    location = locate(path)
    check_settings(location)
    dtype = "float32"
    if location.gguf_file is None:
        try:
            with unasked():
                config = AutoConfig.from_pretrained(location.name, **location.arguments())
            dtype = str(getattr(config, "dtype", None) or dtype).removeprefix("torch.")
        except Exception as error:  # whatever a foreign config.json makes transformers raise
            raise UserError(
                f"The model {path!r} could not be loaded: {described(error, OSError, ValueError, lines=1)}"
            ) from error
    if dtype not in PRECISIONS:
        dtype = "float32"
    if classes:
        _check_same_classes(path, location, classes)
    loaded = load_plain(path, dtype, classes)
    with quiet():
        return Tuned(loaded.model, loaded.tokenizer, path, classes=classes), load_tokenizer(path)


def in_vocabulary(probes: list[Probe], model: Any, candidate: str) -> list[Probe]:
    size, largest = model.get_input_embeddings().num_embeddings, max(max(p.ids) for p in probes)
    if largest >= size:
        raise UserError(
            f"{candidate} knows {size:,} tokens, the adapter's prompts hold number {largest}: it is another model."
        )
    return probes


def _check_same_classes(path: str, location: Location, classes: list[str]) -> None:
    """Raise UserError for what is no classifier with these classes, in this order."""
    if location.gguf_file is not None or (found := classes_of(path)) == []:
        raise UserError(f"{path} is no classifier that names its classes: give the merged model's folder.")
    if found != classes:
        raise UserError(f"The classes of {path} are {', '.join(found)}, and the adapter's {', '.join(classes)}.")

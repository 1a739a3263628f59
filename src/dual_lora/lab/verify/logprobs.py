"""Log-probabilities of given tokens, and the same with the base's weights rounded."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from dual_lora.lab.data.batches import accepted_arguments, left_padded, row_by_row, to_device, unwrapped

ROWS_AT_ONCE = 8
INT4_BLOCK, INT4_LEVELS = 32, 7  # llama.cpp's Q4_0: 32 weights share a scale, whole numbers from -7 to 7


SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})  # how vocabularies write blanks and line ends
Text = Annotated[str, Field(max_length=512)]


def text_of_token(tokenizer: Any, token: int) -> str:
    """A token's text with the blank that it begins with, which SentencePiece's decoding of one token leaves out."""
    text, piece = str(tokenizer.decode([token])), tokenizer.convert_ids_to_tokens(token)
    begins = isinstance(piece, str) and len(piece) > 1 and piece[0] == "▁"
    return " " + text if begins and text == piece[1:] else text


@dataclass(frozen=True)
class Probe:
    """A sequence of token ids. The tokens at `places` (each > 0) are scored, each after all that stands before it.

    texts: how the tokenizer writes each token, in a fingerprint. start: where the answer begins; 0 where the beginning
    of the prompt was cut off. first: what the adapter answers first, if that is known. messages: the conversation that
    the prompt was written from by the chat template; () where there is none. The bounds are those of a file, which
    pydantic holds it to when one is read.
    """

    ids: Annotated[tuple[Annotated[int, Field(ge=0, lt=1 << 31)], ...], Field(min_length=2, max_length=4096)]
    places: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=64)]
    texts: Annotated[tuple[Text, ...], Field(max_length=4096)] = ()
    start: Annotated[int, Field(ge=0)] = 0
    first: Text | None = None
    messages: Annotated[tuple[dict[str, Any], ...], Field(max_length=8)] = ()


class ClassProbe(Probe):
    """A text for a classifier, with a place for each class."""


def asks_classes(probes: Sequence[Probe]) -> bool:
    """Whether these are a classifier's."""
    return bool(probes) and isinstance(probes[0], ClassProbe)


def score(model: Any, probes: Sequence[Probe]) -> Tensor:
    """Natural log-probabilities [places of all probes] in the probes' order, fp64, on the CPU."""
    if asks_classes(probes):
        return torch.cat([_score_classes(model, probe) for probe in probes])
    accepts = accepted_arguments(model)
    found: dict[int, Tensor] = {}
    order = sorted(range(len(probes)), key=lambda i: len(probes[i].ids))
    rows = 1 if row_by_row(model) else ROWS_AT_ONCE
    for first in range(0, len(order), rows):
        part = order[first : first + rows]
        batch: dict[str, Any] = left_padded([list(probes[i].ids) for i in part], 0)
        if "position_ids" not in accepts:
            batch.pop("position_ids")
        batch = to_device(model, batch)
        if "logits_to_keep" in accepts:
            batch["logits_to_keep"] = max(len(probes[i].ids) - min(probes[i].places) for i in part) + 1
        with torch.inference_mode():
            logits = model(**batch).logits
        for row, i in enumerate(part):
            probe = probes[i]
            # Counted from the end: padding stands in front, and the tokens that prompt tuning adds, too.
            before = torch.tensor([place - len(probe.ids) - 1 for place in probe.places], device=logits.device)
            tokens = torch.tensor([probe.ids[place] for place in probe.places], device=logits.device)
            logs = logits[row, before].float().log_softmax(-1)
            found[i] = logs.gather(1, tokens[:, None])[:, 0].double().cpu()
    return torch.cat([found[i] for i in range(len(probes))])


def _score_classes(model: Any, probe: Probe) -> Tensor:
    """Log-probabilities [classes] of one text, by itself: padding would move positions."""
    with torch.inference_mode():
        logits: Tensor = model(**to_device(model, {"input_ids": torch.tensor([probe.ids])})).logits
    return logits[0].float().log_softmax(-1).double().cpu()


def rows_of(probes: Sequence[Probe]) -> Tensor:
    """The number of the probe that each score belongs to."""
    return torch.cat([torch.full((len(probe.places),), i) for i, probe in enumerate(probes)])


def base_parameters(model: Any) -> dict[str, nn.Parameter]:
    """The base's parameters by the names that they have without an adapter."""
    return {name: parameter for name, parameter in _weights(model).items() if ".modules_to_save." not in name}


def _weights(model: Any) -> dict[str, nn.Parameter]:
    """The same, and those of modules that the adapter brings whole."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    plain = unwrapped(model)
    layers: list[Any] = [layer for layer in plain.modules() if isinstance(layer, BaseTunerLayer)]
    held = (named for layer in layers for named in layer.named_parameters())
    added = {id(parameter) for name, parameter in held if not name.startswith("base_layer.")}
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): parameter
        for name, parameter in plain.named_parameters()
        if id(parameter) not in added
    }


@contextlib.contextmanager
def other_weights(model: Any, change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """The model with the weights that `change(name, weight)` makes of its own, but for those that an adapter adds to
    layers; afterwards the very tensors are back."""
    from dual_lora import composed_weights

    # Not the packed ones of a 4-bit base: bitsandbytes rearranges them in a forward pass.
    named = {name: p for name, p in _weights(model).items() if p.is_floating_point()}
    kept = [(parameter, parameter.data) for parameter in named.values()]
    try:
        for name, parameter in named.items():
            parameter.data = change(name, parameter.data)
        composed_weights.clear()  # it does not see what is written through `.data`
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data
        composed_weights.clear()


@contextlib.contextmanager
def as_bf16(model: Any) -> Iterator[None]:
    """An fp32 model that rounds as bf16 does: its weights, and what every module puts out. Any processor can do it.

    A model that is in a half precision itself computes in fp32 meanwhile, which tells the same difference.
    """
    half = any(p.dtype in (torch.bfloat16, torch.float16) for p in base_parameters(model).values())
    if half:
        with other_weights(model, lambda _, weight: weight.float()):
            yield
        return

    def rounded(module: nn.Module, arguments: Any, output: Any) -> Any:
        return output.bfloat16().float() if isinstance(output, Tensor) and output.dtype == torch.float32 else output

    hooks = [module.register_forward_hook(rounded) for module in model.modules()]
    try:
        with other_weights(model, lambda _, weight: weight.bfloat16().to(weight.dtype)):
            yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def as_int4(model: Any, least: bool = False) -> Iterator[None]:
    """The model with its matrices, but for embeddings and head, rounded to four bits.

    least: blocks have a least value, as llama.cpp's Q4_1 and its K formats have them.
    """
    plain = unwrapped(model)
    spared = {id(module.weight) for module in plain.modules() if isinstance(module, nn.Embedding)}
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    spared |= {id(weight) for weight in [getattr(head, "weight", None)] if weight is not None}
    named = _weights(model)

    def change(name: str, weight: Tensor) -> Tensor:
        return weight if weight.ndim != 2 or id(named[name]) in spared else int4(weight, least)

    with other_weights(model, change):
        yield


@contextlib.contextmanager
def merged(model: Any) -> Iterator[None]:
    """The model with its adapter merged. Raises whatever a method without a merge does."""
    from dual_lora import composed_weights

    kept = [(parameter, parameter.data.clone()) for parameter in base_parameters(model).values()]
    try:
        model.merge_adapter()
        yield
    finally:
        with contextlib.suppress(Exception):  # what failed has merged nothing, or only some
            model.unmerge_adapter()
        for parameter, data in kept:
            parameter.data = data
        composed_weights.clear()


def int4(weight: Tensor, least: bool = False) -> Tensor:
    """[O, I] rounded to whole multiples of the largest entry of each block, divided by 7; or to 16 values from its
    least entry to its largest."""
    flat = weight.float().flatten()
    padded = nn.functional.pad(flat, (0, -len(flat) % INT4_BLOCK)).view(-1, INT4_BLOCK)
    low = padded.amin(1, keepdim=True) if least else torch.zeros(1)
    levels = 2 * INT4_LEVELS + 1 if least else INT4_LEVELS
    step = ((padded - low).abs().amax(1, keepdim=True) / levels).clamp(min=torch.finfo(torch.float32).tiny)
    return (((padded - low) / step).round() * step + low).flatten()[: len(flat)].view_as(weight).to(weight.dtype)

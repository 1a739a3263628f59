"""A small file next to an adapter that says what it gives: `verify` needs neither data nor base model with it.

Twenty tokens with the log-probabilities of base and adapter and of the adapter with the usual faults, and hashes of a
sample of the base's weights, of the tokenizer and of the chat template. The prompts are built in and the answers are
the adapter's own: no record of the training data is published with an adapter. A file of somebody else is data: it is
read up to a size, and every field is checked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from dual_lora.lab.errors import UserError, described
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.model.weights import folder_digest, weights_changed
from dual_lora.lab.progress import console
from dual_lora.lab.read import regular
from dual_lora.lab.verify.diagnose import Known
from dual_lora.lab.verify.guesses import FOUR_BITS, FOUR_BITS_MERGED, ModelGuesses, adapted_layers, known_of, parts
from dual_lora.lab.verify.logprobs import Probe, Text, base_parameters, rows_of, text_of_token
from dual_lora.lab.verify.prompts import base_and_adapter_scores, built_in_probes, by_difference
from dual_lora.lab.verify.texts import hash_of_template, hash_of_tokenizer, plain_counts

FILE = "fingerprint.json"
LARGEST = 1 << 20  # bytes of a file that is read
TOKENS, PROMPTS = 20, 5
SAMPLED = 64  # tensors of the base, of which the first and the last numbers count
STRENGTHS = (0.25, 0.5, 0.75, 1.5, 2.0, 3.0, 4.0)
LOST = ("the first half of the blocks", "the second half of the blocks")

_Number = Annotated[float, Field(allow_inf_nan=False)]
_Column = Annotated[list[_Number], Field(min_length=1, max_length=512)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


def _check_probe(probe: Probe) -> Probe:
    """Check of a probe in a file what the bounds of its single fields leave open. Raises ValueError."""
    if max(probe.places) >= len(probe.ids) or len(probe.texts) != len(probe.ids) or probe.start > len(probe.ids):
        raise ValueError("places or texts do not fit ids")
    texts = [message.get(key) for message in probe.messages for key in ("role", "content")]
    if not all(isinstance(text, str) and len(text) <= 512 for text in texts):
        raise ValueError("messages are no short texts of roles")
    return probe


class Fingerprint(BaseModel):
    """An adapter's outputs, as they were saved. Columns are log-probabilities in the order of the probes' places."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    format: Literal[1] = 1
    method: Text
    base: Text  # name of the base model
    dtype: Text
    base_sample: _Hash
    tokenizer: _Hash
    chat_template: _Hash | None = None
    probes: Annotated[list[Annotated[Probe, AfterValidator(_check_probe)]], Field(min_length=1, max_length=64)]
    columns: Annotated[dict[Text, _Column], Field(max_length=32)]
    rounding: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    rounded_strength: Annotated[float, Field(ge=-10, le=10)] = 1.0
    warms_up: bool = False
    weights: Annotated[dict[Text, Text], Field(max_length=64)] = {}  # a print of the adapter that it is of
    plain: Annotated[dict[Text, Annotated[int, Field(ge=1)]], Field(max_length=8)] = {}  # text: number of its tokens

    @model_validator(mode="after")
    def _columns_fit(self) -> Fingerprint:
        tokens = sum(len(probe.places) for probe in self.probes)
        if not {"base", "tuned"} <= set(self.columns) or any(len(c) != tokens for c in self.columns.values()):
            raise ValueError(f"columns do not hold base and tuned for {tokens} tokens")
        return self

    def known(self) -> Known:
        base, tuned = (torch.tensor(self.columns[name], dtype=torch.float64) for name in ("base", "tuned"))
        return Known(base, tuned, rows_of(self.probes), self.rounding, self.rounded_strength, self.warms_up)

    def texts(self) -> dict[int, str]:
        """Return how the adapter's tokenizer writes the probes' tokens, by their ids."""
        return {token: text for probe in self.probes for token, text in zip(probe.ids, probe.texts, strict=True)}


class StoredGuesses:
    """The faults that were computed when the fingerprint was made; strengths between them by interpolation."""

    def __init__(self, fingerprint: Fingerprint):
        self.columns = {name: torch.tensor(c, dtype=torch.float64) for name, c in fingerprint.columns.items()}
        known = {0.0: self.columns["base"], 1.0: self.columns["tuned"]}
        known |= {s: self.columns[f"× {s}"] for s in STRENGTHS if f"× {s}" in self.columns}
        self.known = dict(sorted(known.items()))

    def scaled(self, strength: float) -> Tensor | None:
        """Interpolate by cubics that stay between their ends, as a polynomial through all would not; beyond the last
        its own."""
        from scipy.interpolate import PchipInterpolator

        if len(self.known) < 4:
            return None
        at = list(self.known)
        through = PchipInterpolator(at, torch.stack([*self.known.values()]).numpy())
        return torch.from_numpy(through(min(max(strength, at[0]), at[-1])))

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        yield from ((name, column) for name, column in self.columns.items() if name in LOST)

    def coarse(self) -> dict[str, Tensor]:
        return {name: self.columns[name] for name in (FOUR_BITS, *FOUR_BITS_MERGED) if name in self.columns}


def make(tuned: Tuned) -> Fingerprint:
    """The fingerprint of a model that is loaded, with its adapter."""
    config = tuned.model.peft_config["default"]
    found = built_in_probes(tuned)
    probes = _most_different_tokens(found, *base_and_adapter_scores(tuned, found))
    known, guesses = known_of(tuned, probes), ModelGuesses(tuned.model, probes)
    columns = {"base": known.base, "tuned": known.tuned}
    if adapted_layers(tuned.model):
        columns |= {f"× {s}": pattern for s in STRENGTHS if (pattern := guesses.scaled(s)) is not None}
        columns |= {name: guesses.without(lost) for name, lost in parts(tuned.model).items() if name in LOST}
    columns |= guesses.coarse()
    return Fingerprint(
        method=str(getattr(config.peft_type, "value", config.peft_type)),
        base=str(config.base_model_name_or_path or ""),
        dtype=str(next(iter(base_parameters(tuned.model).values())).dtype).removeprefix("torch."),
        base_sample=hash_of_base(tuned.model),
        tokenizer=hash_of_tokenizer(tuned.tokenizer),
        chat_template=hash_of_template(tuned.tokenizer),
        probes=[_with_texts(probe, tuned.tokenizer) for probe in probes],
        columns={name: [round(float(x), 6) for x in column] for name, column in columns.items()},
        rounding=known.rounding,
        rounded_strength=max(-10.0, min(10.0, known.rounded_strength)),
        warms_up=known.warms_up,
        plain=plain_counts(tuned.tokenizer),
    )


def write_for_run(tuned: Tuned, folder: Path) -> None:
    """Write the fingerprint of what was just trained into its folder, where it can be made; never fail for it."""
    if not can_be_made(tuned):
        return
    try:
        with quiet():
            write(make(tuned).model_copy(update={"weights": folder_digest(folder)}), folder)
    except Exception as error:  # whatever a method of PEFT does not support: the adapter itself is saved
        console.print(f"No fingerprint was written ({described(error)}).", markup=False, soft_wrap=True)


def write(fingerprint: Fingerprint, folder: Path) -> None:
    text = json.dumps(fingerprint.model_dump(mode="json"), indent=1, ensure_ascii=False)
    (folder / FILE).write_text(text + "\n", encoding="utf-8")


def read(folder: Path) -> Fingerprint | None:
    """The fingerprint in an adapter's folder, None if there is none. Raises UserError for one that cannot be used."""
    file = folder / FILE
    if not file.is_file():
        return None
    try:
        return Fingerprint.model_validate_json(regular(file, LARGEST).read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file} is no fingerprint of an adapter ({at}: {first['msg']}): remove it.") from None
    except ValueError as error:
        raise UserError(f"{file} is no fingerprint of an adapter ({error}): remove it.") from None


def check_is_of(saved: Fingerprint | None, folder: Path | None) -> None:
    """Raise UserError where the adapter next to a fingerprint is another one by now."""
    if saved is not None and folder is not None and weights_changed(saved.weights, folder_digest(folder)):
        raise UserError(
            f"{folder / FILE} is the fingerprint of other weights than the folder holds now (`dual-lora verify` "
            "without another option compares the two): put them back, or remove the fingerprint to go by the weights."
        )


def can_be_made(tuned: Tuned) -> bool:
    """Whether the base is what its name says: some starts of LoRA (PiSSA, LoRA-GA, …) change the base's weights."""
    from dual_lora.method.lora_fields import keeps_base

    if not tuned.adapted or tuned.classes:
        return False
    return keeps_base(tuned.model.peft_config.get("default"))


def hash_of_base(model: Any) -> str:
    """Hash the first and last numbers, in bf16, of some tensors by name: a copy in another precision hashes alike."""
    named = sorted(base_parameters(model).items())
    total = hashlib.sha256()
    for name, parameter in named[:: max(1, len(named) // SAMPLED)]:
        flat = parameter.detach().flatten()
        sample = torch.cat([flat[:32], flat[-32:]]).cpu()
        if sample.is_floating_point():
            sample = sample.bfloat16().view(torch.int16)
        total.update(name.encode() + str(tuple(parameter.shape)).encode() + sample.numpy().tobytes())
    return total.hexdigest()


def _most_different_tokens(probes: list[Probe], base: Tensor, tuned: Tensor) -> list[Probe]:
    """Return a few prompts with the tokens on which the two differ most, and a third on which they agree."""
    prompts = sorted(by_difference(probes, base, tuned)[:PROMPTS])
    each = TOKENS // max(1, len(prompts))
    apart = (tuned - base).abs().split([len(probe.places) for probe in probes])
    chosen = []
    for i in prompts:
        own = sorted(zip(apart[i].tolist(), probes[i].places, strict=True))
        agree, most = own[: each // 3], own[each // 3 :][-(each - each // 3) :]
        kept = tuple(sorted({place for _, place in agree + most}))
        chosen.append(replace(probes[i], places=kept))
    return chosen


def _with_texts(probe: Probe, tokenizer: Any) -> Probe:
    texts = tuple(text_of_token(tokenizer, token)[:512] for token in probe.ids)
    return replace(probe, texts=texts, first=texts[probe.start] if 0 < probe.start < len(texts) else None)

"""Verify an adapter, or what is served of it: the reference, the candidate, the verdict."""

import json
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dual_lora.lab.errors import UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.model.opened import Tuned, open_tuned
from dual_lora.lab.read import read_object
from dual_lora.lab.verify import fingerprint as fingerprints
from dual_lora.lab.verify.candidate import PRECISIONS, in_vocabulary, load_candidate
from dual_lora.lab.verify.classes import check_classes, find_texts
from dual_lora.lab.verify.diagnose import Finding, Guesses, Known, judge
from dual_lora.lab.verify.endpoint import Endpoint
from dual_lora.lab.verify.fingerprint import Fingerprint, StoredGuesses
from dual_lora.lab.verify.guesses import ModelGuesses, known_of, strength_notes
from dual_lora.lab.verify.logprobs import Probe, base_parameters, score, text_of_token
from dual_lora.lab.verify.prompts import base_and_adapter_scores, choose, find_probes
from dual_lora.lab.verify.texts import (
    OTHER,
    PLAIN,
    compare_hashes,
    compare_server,
    compare_tokenizers,
    plain_counts,
    shortened,
)


@dataclass
class Report:
    """A verdict with what it was found by."""

    source: str
    candidate: str
    prompts: str
    finding: Finding
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    unit: str = "token"  # as in `Known`
    asks: str = "prompts"

    @property
    def good(self) -> bool:
        return self.finding.good

    def summary(self) -> dict[str, Any]:
        """Plain values, for ``--json``."""
        found = asdict(self.finding)
        word = found.pop("word")
        return {
            "source": self.source, "candidate": self.candidate, "verdict": word, "good": self.good, **found,
            "asked": self.prompts, "notes": self.notes, "seconds": round(self.seconds, 2),
        }  # fmt: skip


@dataclass
class Reference:
    """The adapter's own outputs: from the loaded model, or from its fingerprint."""

    probes: list[Probe]
    known: Known
    guesses: Guesses
    texts: dict[int, str]  # how its tokenizer writes the probes' tokens, by their ids
    plain: dict[str, int]
    where: str
    exact: bool
    tuned: Tuned | None = None
    saved: Fingerprint | None = None

    @property
    def classes(self) -> list[str]:
        """The classes, in the order of the outputs; [] for a language model."""
        return self.tuned.classes if self.tuned is not None else []

    @property
    def base_sample(self) -> str | None:
        """The hash of the base that it was computed with."""
        if self.tuned is not None:
            return fingerprints.hash_of_base(self.tuned.model)
        return self.saved.base_sample if self.saved is not None else None

    @property
    def conversations(self) -> list[Probe]:
        """The probes that a chat template has written."""
        return [probe for probe in self.probes if probe.messages]


def verify(
    source: str | Path,
    *,
    against: str | None = None,
    adapter: str | None = None,
    endpoint: str | None = None,
    model: str | None = None,
    prompts: str | None = None,
    base: str | None = None,
    dtype: str | None = None,
    timeout: float = 60.0,
) -> Report:
    """Compare what a candidate predicts with what the adapter in `source` predicts.

    against: a merged folder or a GGUF file. adapter: another adapter's folder. endpoint, model: an OpenAI-compatible
    server's URL and the name there. None of them: the adapter itself, loaded anew, against its fingerprint.
    prompts: see `find_probes`. Raises UserError for everything that a person can put right.
    """
    began = time.perf_counter()
    _check_options(against, adapter, endpoint, model)
    folder = _adapter_folder(Path(source))
    saved = fingerprints.read(folder) if folder else None
    if endpoint is not None or against is not None or adapter is not None:
        fingerprints.check_is_of(saved, folder)  # with nothing to compare, it is compared itself
    if endpoint is not None and model is not None:
        server = Endpoint(endpoint, model, timeout)
        own = _from_fingerprint(saved) if saved and prompts is None else _from_model(str(source), prompts, base, dtype)
        report = _verify_server(str(source), own, server)
    elif against is None and adapter is None:
        report = _verify_itself(str(source), saved, prompts, base, dtype)
    else:
        candidate = str(against or adapter)
        own = _reference(str(source), saved, prompts, base, dtype)
        report = _verify_files(str(source), own, candidate, folder, adapter is not None, base)
    report.seconds = time.perf_counter() - began
    return report


def _check_options(against: str | None, adapter: str | None, endpoint: str | None, model: str | None) -> None:
    given = [n for n, v in (("--against", against), ("--adapter", adapter), ("--endpoint", endpoint)) if v is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} name several candidates: give one.")
    if endpoint is not None and model is None:
        raise UserError("--endpoint needs --model NAME: the name by which the server knows what it serves.")
    if model is not None and endpoint is None:
        raise UserError("--model names a model of a server: give its --endpoint URL.")


def _adapter_folder(source: Path) -> Path | None:
    run = RunFolder(source)
    if run.is_run:
        return run.result
    return source if source.is_dir() else None


def _reference(
    source: str, saved: Fingerprint | None, prompts: str | None, base: str | None, dtype: str | None
) -> Reference:
    """The loaded model if there is one, else the fingerprint."""
    try:
        return _from_model(source, prompts, base, dtype)
    except UserError as error:
        if saved is None or prompts is not None:
            raise
        own = _from_fingerprint(saved)
        return replace(own, where=f"{own.where} ({error})")


def _from_model(source: str, prompts: str | None, base: str | None, dtype: str | None) -> Reference:
    tuned = _opened(source, base, dtype)
    probes, where = find_texts(tuned, prompts) if tuned.classes else find_probes(tuned, prompts)
    pair = base_and_adapter_scores(tuned, probes)
    kept = choose(probes, *pair)
    numbers = torch.arange(sum(len(p.places) for p in probes)).split([len(p.places) for p in probes])
    picked = torch.cat([numbers[i] for i in kept])
    probes = [probes[i] for i in kept]
    known = known_of(tuned, probes, (pair[0][picked], pair[1][picked]))
    texts = {token: text_of_token(tuned.tokenizer, token) for p in probes for token in p.ids}
    exact, plain = _dtype_of(tuned.model) == torch.float32, plain_counts(tuned.tokenizer)
    return Reference(probes, known, ModelGuesses(tuned.model, probes), texts, plain, where, exact, tuned)


def _opened(source: str, base: str | None, dtype: str | None) -> Tuned:
    tuned = open_tuned(source, base, dtype)
    check_classes(tuned)
    if "base" not in tuned.variants or "tuned" not in tuned.variants:
        raise UserError(f"{source} holds no adapter: name a run or an adapter folder, and a model by --against.")
    return tuned


def _from_fingerprint(saved: Fingerprint) -> Reference:
    answers, exact = (saved.known(), StoredGuesses(saved), saved.texts(), saved.plain), saved.dtype == "float32"
    return Reference(saved.probes, *answers, "the fingerprint's", exact, saved=saved)


def _verify_itself(
    source: str, saved: Fingerprint | None, prompts: str | None, base: str | None, dtype: str | None
) -> Report:
    """Verify an adapter by its fingerprint; if that agrees and prompts are given, or if there is none, by what it
    changes of its base."""
    if saved is not None:
        report = _verify_reloaded(source, saved, base, dtype)
        if prompts is None or not report.good:
            return report
    own = _from_model(source, prompts, base, dtype)
    finding = judge(own.known.tuned, own.known, own.guesses, exact=True)
    if finding.word == "undecided":
        finding = replace(finding, word="off", cause="with the adapter it gives what the base gives without it")
    notes = [] if saved else ["it has no fingerprint: whether it is the one that was trained was not checked"]
    notes += strength_notes(own.tuned)
    return Report(source, "the adapter itself", own.where, finding, notes, unit=own.known.unit, asks=own.known.asks)


def _verify_reloaded(source: str, saved: Fingerprint, base: str | None, dtype: str | None) -> Report:
    tuned = _opened(source, base, dtype or (saved.dtype if saved.dtype in PRECISIONS else None))
    own = _from_fingerprint(saved)
    with tuned.as_variant("tuned") as model:
        found = score(model, own.probes)
    exact = own.exact and _dtype_of(tuned.model) == torch.float32
    same_base = fingerprints.hash_of_base(tuned.model) == saved.base_sample
    finding = judge(found, own.known, own.guesses, exact, unpacked=exact and same_base)
    notes = strength_notes(tuned)
    finding = _with_text_differences(finding, _text_differences(own, tuned.tokenizer), notes)
    if not finding.good and not same_base:
        finding.cause += f"; the base's weights are not those that it was trained on ({saved.base or 'unnamed'})"
    return Report(source, "the adapter itself, loaded anew", own.where, finding, notes)


def _verify_files(
    source: str, own: Reference, candidate: str, folder: Path | None, adapter: bool, base: str | None
) -> Report:
    if adapter:
        other = open_tuned(candidate, base)
        if not other.adapted:
            raise UserError(f"{candidate} holds no adapter: a merged model is given by --against.")
        if other.classes != own.classes:
            raise UserError(f"{candidate} has other classes than {source}, or the same in another order.")
        tokenizer, notes = other.tokenizer, strength_notes(other)
    else:
        other, tokenizer = load_candidate(candidate, own.classes)
        notes = []
    exact = own.exact and _dtype_of(other.model) == torch.float32
    unpacked = adapter and exact and fingerprints.hash_of_base(other.model) == own.base_sample
    with other.as_variant(other.variants[-1]) as model:
        found = score(model, in_vocabulary(own.probes, model, candidate))
    del other, model
    finding = judge(found, own.known, own.guesses, exact, unpacked=unpacked)
    finding = _with_text_differences(finding, _text_differences(own, tokenizer), notes)
    if adapter and not finding.good and folder is not None:
        finding.cause = "; ".join([finding.cause, *_config_differences(folder, _adapter_folder(Path(candidate)))])
        if finding.word == "other scale" and any("warm-up" in note for note in notes):
            finding.word = "λ below 1"
    return Report(source, candidate, own.where, finding, notes, unit=own.known.unit, asks=own.known.asks)


def _config_differences(one: Path, other: Path | None) -> list[str]:
    """Fields of two adapters' configurations that differ."""
    if other is None:
        return []
    try:
        read = [read_object(folder / "adapter_config.json") for folder in (one, other)]
    except (OSError, ValueError):
        return []
    pair = [{name: _sorted_names(value) for name, value in config.items()} for config in read]
    names = [n for n in sorted({*pair[0], *pair[1]}) if pair[0].get(n) != pair[1].get(n) and n != "peft_version"]
    lines = [f"{n} is {_shown(pair[1].get(n))} there and {_shown(pair[0].get(n))} here" for n in names]
    return lines[:6]


def _shown(value: Any) -> str:
    return shortened(json.dumps(value))


def _sorted_names(value: Any) -> Any:
    """Sort names without an order of their own: PEFT has target modules in a set, which each process writes in
    another."""
    return sorted(value) if isinstance(value, list) and all(isinstance(each, str) for each in value) else value


def _with_text_differences(finding: Finding, wrong: Finding | None, notes: list[str], first: bool = False) -> Finding:
    """The verdict where the words may be wrong as well: on them if the weights are right, else they are a note.

    first: they count before wrong weights.
    """
    if wrong is None:
        return finding
    if finding.good or first:
        return replace(finding, word=wrong.word, cause=wrong.cause)
    notes.append(f"{wrong.word}: {wrong.cause}")
    return finding


def _text_differences(own: Reference, tokenizer: Any) -> Finding | None:
    if tokenizer is None:
        return None
    if own.tuned is not None:
        samples = [own.tuned.tokenizer.decode(p.ids, skip_special_tokens=True) for p in own.probes[:4]]
        return compare_tokenizers(own.tuned.tokenizer, tokenizer, [*PLAIN, *samples], own.conversations)
    assert own.saved is not None
    return compare_hashes((own.saved.tokenizer, own.saved.chat_template), tokenizer, bool(own.conversations))


def _verify_server(source: str, own: Reference, server: Endpoint) -> Report:
    if own.classes:
        raise UserError(f"{source} is a classifier, and --endpoint is for language models: give a folder by --against.")
    answer = server.score(own.probes, own.texts)
    finding = judge(answer.found, own.known, own.guesses, kept=answer.kept, floors=answer.floors)
    notes = (
        []
        if answer.echoed
        else [f"the server does not echo prompts: {len(answer.kept)} tokens were asked for one by one"]
    )
    wrong, more = compare_server(server, answer, own.texts, own.plain, own.conversations, finding.good)
    finding = _with_text_differences(finding, wrong, notes, first=wrong is not None and wrong.word == OTHER)
    return Report(source, f"{server.model} at {server.url}", own.where, finding, notes + more)


def _dtype_of(model: Any) -> torch.dtype:
    return next((p.dtype for p in base_parameters(model).values()), torch.float32)

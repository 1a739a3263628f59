"""Predictions for records without an answer: labels with their probabilities, or texts, in a file of results.

Results are written as they come, into a file next to the one that is asked for. After an interruption the next call
goes on where that file ends, if records, model and settings are the same.
"""

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dual_lora.lab.data.encode import VALUE, Prompter
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.questions import is_blank
from dual_lora.lab.data.records import Record
from dual_lora.lab.errors import NotFinite, UserError
from dual_lora.lab.files.folder import RunFolder
from dual_lora.lab.files.write import json_text
from dual_lora.lab.model.generate import check_writes, generate_all, search_of
from dual_lora.lab.model.load import quiet
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.model.weights import folder_digest, weights_digest
from dual_lora.lab.progress import Bar
from dual_lora.lab.read import has_second_name, parse_json, regular
from dual_lora.lab.recipe.schema import DataSection, EvaluateSection
from dual_lora.lab.run.choice import score_choice
from dual_lora.lab.run.results_file import check_columns, check_out, partial_file, write_rows
from dual_lora.lab.run.scoring import Asked, class_rows

Names = Sequence[str] | None
_TEXT, _LABEL = {"predicted"}, {"predicted", "probability", "probabilities"}  # fields of a result
LONGEST = 10_000_000  # characters of a result
_READ = {"adapter_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}  # next to the weights
BATCHES = 8  # at a time: their rows are sorted by length, computed, and then written


@dataclass
class Predicted:
    """The summary of a file of predictions. agree: of the records that have an answer of their own, how many get the
    same one."""

    source: str
    records: str
    file: str
    examples: int
    resumed_from: int  # results of an earlier session
    counts: dict[str, int]  # by label, where there are labels
    answered: int
    agree: int
    cut: int  # texts longer than data.max_length
    empty: int  # records without a text, whose results mean nothing
    seconds: float

    def summary(self) -> dict[str, Any]:
        return asdict(self)


def predict(
    tuned: Tuned,
    source: str,
    records: list[Record],
    examples: list[Example],
    out: Path,
    data: DataSection,
    spec: EvaluateSection,
    *,
    variant: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Predicted:
    """Write what the model says of each example to ``out`` (.jsonl or .csv), in the order of the records.

    records, examples: see `read_questions`. variant: "base" for the untrained model. overwrite: begin anew, and replace
    a file that is there. Raises UserError for a file that is there, and for a model that computes no numbers.
    """
    began = time.perf_counter()
    check_out(out, overwrite)
    check_columns(records, _result_columns(tuned, examples))
    unfinished = partial_file(out)
    told = _inputs_digest(tuned, records, data, spec, variant)
    if overwrite:
        unfinished.unlink(missing_ok=True)
    done = _earlier_results(unfinished, told, _names_of(tuned, data, examples))
    earlier = len(done)
    ask = _predictor(tuned, data, spec)
    size = spec.batch_size * BATCHES
    bar = Bar(f"predicting {out.name}", len(examples), progress, start=earlier)
    file = unfinished.open("a" if unfinished.exists() else "x", encoding="utf-8")
    with quiet(), tuned.as_variant(variant or tuned.variants[-1]) as model, bar, file:
        if not done:
            file.write(json_text({"of": told}) + "\n")
        for start in range(earlier, len(examples), size):
            try:
                rows = ask(model, examples[start : start + size], bar.advance)
            except NotFinite as error:
                raise UserError(f"{tuned.source} computes NaN or infinity {error}, and no result.") from error
            file.writelines(json_text(row) + "\n" for row in rows)
            file.flush()
            done += rows
    _keep(out, overwrite, unfinished, records, done, source)
    agree = [_is_same_answer(row, own) for row, e in zip(done, examples, strict=True) if (own := e.label or e.answer)]
    labels = [str(row["predicted"]) for row in done if "probability" in row]
    names, counts = [*tuned.classes, *sorted({*labels} - {*tuned.classes})], Counter(labels)
    return Predicted(
        source=tuned.source,
        records=source,
        file=str(out),
        examples=len(examples),
        resumed_from=earlier,
        counts={name: counts[name] for name in names} if labels else {},
        answered=len(agree),
        agree=sum(agree),
        cut=_count_truncated(tuned, examples, data),
        empty=sum(map(is_blank, examples)),
        seconds=round(time.perf_counter() - began, 3),
    )


def _keep(
    out: Path, overwrite: bool, unfinished: Path, records: list[Record], done: list[dict[str, Any]], source: str
) -> None:
    """Write the results, and remove the unfinished ones. Raises UserError for a file that has come meanwhile."""
    if out.exists() and not overwrite:
        raise UserError(
            f"{out} has come meanwhile, and is left as it is. The results are in {unfinished}: move that file away and "
            "give the same command again, which goes on from there."
        )
    write_rows(out, records, done, source)
    unfinished.unlink(missing_ok=True)


def _earlier_results(file: Path, told: str, expected: list[Names]) -> list[dict[str, Any]]:
    """The results of an earlier session; what a kill has cut off is removed from the file. Raises UserError for a file
    that no session has left.

    expected: of each record the names that its probabilities have.
    """
    if not file.exists() and not file.is_symlink():
        return []
    way_out = "give --overwrite to begin anew, or another --out"
    if file.is_symlink() or (file.is_file() and has_second_name(file)):
        raise UserError(f"{file} is a link: remove it.")
    begun, whole = json_text({"of": told}), 0
    rest: list[dict[str, Any]] = []
    try:
        # Line by line, and none that is longer than a result: a file may seem to be larger than the disk.
        with regular(file, largest=2**40).open(encoding="utf-8", newline="\n") as lines:
            first = lines.readline(LONGEST)
            if not first.endswith("\n") and not begun.startswith(first):
                raise ValueError("it was not begun here")
            same = not first.endswith("\n") or parse_json(first)["of"] == told
            while same and (line := lines.readline(LONGEST)).endswith("\n"):
                row = parse_json(line)
                if len(rest) == len(expected) or not _is_row(row, expected[len(rest)]):
                    raise ValueError("its results are none")
                rest.append(row)
                whole += len(line.encode())
            if same and len(line) == LONGEST:
                raise ValueError("a line has no end")
    except OSError as error:
        raise UserError(f"{file}, the results so far, cannot be read ({error}): {way_out}.") from None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{file}, the results so far, is damaged: {way_out}.") from None
    if not same:
        raise UserError(f"{file} holds results of other records, another model or other settings: {way_out}.")
    with file.open("r+", encoding="utf-8") as held:
        held.truncate(len(first.encode()) + whole if rest else 0)
    return rest


def _is_row(row: Any, names: Names) -> bool:
    """Whether a line of the file is a result, as `_predictor` makes it."""
    if not isinstance(row, dict) or {*row} != (_LABEL if names else _TEXT):
        return False
    said = row["predicted"]
    if names is None:
        return isinstance(said, float) and math.isfinite(said)
    if not names:
        return isinstance(said, str)
    numbers = [row["probability"], *row["probabilities"].values()]
    known = {*row["probabilities"]} == {*names} and said in names
    return known and all(isinstance(number, int | float) and 0 <= number <= 1 for number in numbers)


def _names_of(tuned: Tuned, data: DataSection, examples: list[Example]) -> list[Names]:
    """Return the class names of each record's probabilities, () for a text, None for a number."""
    if tuned.classes:
        return [None if tuned.classes == [VALUE] else tuned.classes] * len(examples)
    return [example.choices if data.choices else () for example in examples]


def _inputs_digest(
    tuned: Tuned, records: list[Record], data: DataSection, spec: EvaluateSection, variant: str | None
) -> str:
    """Return a digest of everything that the results depend on."""
    held = RunFolder(tuned.run).result if tuned.run else Path(tuned.source)
    how: dict[str, Any] = {"model": tuned.source, "base": weights_digest(tuned.part) if tuned.part else {}}
    if held is not None and held.is_dir():
        read = (file for file in sorted(held.iterdir()) if file.name in _READ)
        how |= {"weights": folder_digest(held)} | {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in read}
    how |= {"given": tuned.given, "variant": variant}
    how |= {"data": data.model_dump(mode="json"), "spec": spec.model_dump(mode="json")}
    text = json.dumps([how, [record.values for record in records]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


Predict = Callable[[Any, list[Example], Callable[[int], None]], list[dict[str, Any]]]


def _predictor(tuned: Tuned, data: DataSection, spec: EvaluateSection) -> Predict:
    """Return the function that predicts examples: labels or values, the likeliest choice, or texts."""
    prompter = Prompter(tuned.tokenizer, data.template)

    def classes(model: Any, examples: list[Example], advance: Callable[[int], None]) -> list[dict[str, Any]]:
        asked = Asked(model, examples, prompter, spec, tuned.classes, data.max_length, advance)
        rows = [row["values"] for row in class_rows(asked)]
        if not all(math.isfinite(value) for values in rows for value in values):
            raise NotFinite("on these texts")
        if tuned.classes == [VALUE]:
            return [{"predicted": values[0]} for values in rows]
        return [_labelled(tuned.classes, values) for values in rows]

    def choices(model: Any, examples: list[Example], advance: Callable[[int], None]) -> list[dict[str, Any]]:
        known = [replace(e, answer=e.choices[0], target=e.choices[0]) for e in examples]
        asked = Asked(model, known, prompter, spec, (), data.max_length, advance)
        rows = score_choice(asked)
        return [_labelled(e.choices, _softmax(row["scores"])) for e, row in zip(examples, rows, strict=True)]

    def texts(model: Any, examples: list[Example], advance: Callable[[int], None]) -> list[dict[str, Any]]:
        prompts = [prompter.prompt_ids(example.prompt, example.tools) for example in examples]
        how = spec.batch_size, spec.max_new_tokens, advance, search_of(spec)
        return [{"predicted": text.strip()} for text in generate_all(model, tuned.tokenizer, prompts, *how)]

    if tuned.classes:
        return classes
    if data.choices:
        return choices
    check_writes(tuned.model)
    return texts


def _labelled(names: Any, probabilities: list[float]) -> dict[str, Any]:
    best = max(range(len(probabilities)), key=probabilities.__getitem__)
    told = {name: round(p, 6) for name, p in zip(names, probabilities, strict=True)}
    return {"predicted": names[best], "probability": round(probabilities[best], 6), "probabilities": told}


def _softmax(scores: list[float]) -> list[float]:
    most = max(scores)
    if not math.isfinite(most):
        raise NotFinite("on these prompts")
    powers = [math.exp(score - most) for score in scores]
    total = sum(powers)
    return [power / total for power in powers]


def _result_columns(tuned: Tuned, examples: list[Example]) -> Iterator[str]:
    yield from ("predicted", "probability", "probabilities")
    yield from (f"p({name})" for name in (tuned.classes or (examples[0].choices if examples else ())))


def _is_same_answer(row: dict[str, Any], given: str) -> bool:
    said = row["predicted"]
    if isinstance(said, float):
        return False
    return str(said) == given.strip()


def _count_truncated(tuned: Tuned, examples: list[Example], data: DataSection) -> int:
    if not tuned.classes:
        return 0
    return sum(len(tuned.tokenizer(*e.text).input_ids) > data.max_length for e in examples)

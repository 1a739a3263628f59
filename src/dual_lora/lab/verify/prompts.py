"""The prompts of a verification: some on which base and adapter differ most, some on which they agree."""

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dual_lora.lab.data.batches import learns_prompts, left_padded, row_by_row, to_device
from dual_lora.lab.data.encode import IGNORED, Prompter
from dual_lora.lab.data.examples import load_split, read_examples
from dual_lora.lab.data.formats import Example
from dual_lora.lab.data.records import read_records
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.generate import ends_of, plain_search
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.read import opened
from dual_lora.lab.recipe.schema import DataSection
from dual_lora.lab.verify.guesses import without_adapter
from dual_lora.lab.verify.logprobs import Probe, score

ASKED = 24  # prompts that base and adapter are asked
DIFFERING, AGREEING = 10, 6  # of which so many are kept
LONGEST = 256  # tokens of a prompt with its answer
SCORED = 48  # tokens of an answer
CONTINUED = 16  # tokens that the adapter writes where a prompt comes without an answer

# For an adapter that comes without data.
BUILT_IN = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Translate to German: The cat sleeps on the chair.",
    "List three colours.",
    "What is 17 plus 25?",
    "Explain in one sentence why the sky is blue.",
    "Give me a short title for a story about a lost key.",
    "Is the following sentence positive or negative? I loved every minute of it.",
    "Set a timer for ten minutes.",
    "Write a Python function that adds two numbers.",
    "Summarise: The meeting was moved to Friday because the room was taken.",
    "Continue: Once upon a time there was a",
)


def find_probes(tuned: Tuned, prompts: str | None = None) -> tuple[list[Probe], str]:
    """Probes for a model, and where they come from in words.

    prompts: a file; lines of text, or records as `train` reads them. Left out: the run's own records, else built-in
    prompts. Prompts without an answer are answered by the adapter. Raises UserError where no prompt can be used.
    """
    data = tuned.recipe.data if tuned.recipe else DataSection()
    prompter = Prompter(tuned.tokenizer, data.template)
    examples: list[Example] = []
    questions: list[str] = []
    if prompts is not None:
        where = prompts
        examples, questions = _from_file(prompts, data)
    else:
        examples, where = own_records(data, "messages")
        where = where or ("built in: the run's own records were not found" if data.train else "built in")
        questions = [] if examples else list(BUILT_IN)
    chance = random.Random(0)
    found = [p for e in chance.sample(examples, min(len(examples), 4 * ASKED)) if (p := _probe_of_answer(prompter, e))][
        :ASKED
    ]
    if questions:
        found = _with_continuations(tuned, prompter, questions[:ASKED])
    if not found:
        raise UserError(
            f"None of the prompts ({where}) has an answer within {LONGEST} tokens: give others by --prompts FILE."
        )
    return found, where


def built_in_probes(tuned: Tuned) -> list[Probe]:
    """Probes that need no data and tell nothing of it but what the adapter answers to everybody."""
    prompter = Prompter(tuned.tokenizer, tuned.recipe.data.template if tuned.recipe else "auto")
    return _with_continuations(tuned, prompter, list(BUILT_IN))


def choose(probes: list[Probe], base: Tensor, tuned: Tensor) -> list[int]:
    """Indices of the probes that are kept: where the two differ most, and where they agree."""
    if len(probes) <= DIFFERING + AGREEING:
        return list(range(len(probes)))
    order = by_difference(probes, base, tuned)
    return sorted(order[:DIFFERING] + order[-AGREEING:])


def by_difference(probes: list[Probe], base: Tensor, tuned: Tensor) -> list[int]:
    """Indices of the probes by the mean distance of adapter and base on their tokens, the largest first."""
    apart = (tuned - base).abs().split([len(probe.places) for probe in probes])
    return sorted(range(len(probes)), key=lambda i: -float(apart[i].mean()))


def base_and_adapter_scores(tuned: Tuned, probes: list[Probe]) -> tuple[Tensor, Tensor]:
    """Log-probabilities of base and adapter."""
    with without_adapter(tuned, probes) as model:
        base = score(model, probes)
    with tuned.as_variant("tuned") as model:
        return base, score(model, probes)


def own_records(data: DataSection, field: str) -> tuple[list[Example], str]:
    """The run's own records that have this field, and which they are in words; [] and "" where there are none."""
    for split in ("test", "validation", "train"):
        try:
            if examples := [example for example in load_split(data, split) if getattr(example, field)]:
                return examples, f"the run's own {split} records"
        except UserError:  # not named, or no longer there
            continue
    return [], ""


def _from_file(path: str, data: DataSection) -> tuple[list[Example], list[str]]:
    if not Path(path).is_file():
        raise UserError(f"There is no file of prompts {path}.")
    if Path(path).suffix == ".txt":
        with opened(Path(path)) as text:
            lines = [line.strip() for line in text]
        if not any(lines):
            raise UserError(f"{path} holds no prompts: write one a line.")
        return [], [line for line in lines if line]
    records = read_records(path, data.columns)
    bare = [str(r.values["prompt"]) for r in records if set(r.values) == {"prompt"}]
    return ([], bare) if len(bare) == len(records) else (read_examples(path, data), [])


def _probe_of_answer(prompter: Prompter, example: Example) -> Probe | None:
    encoded = prompter.encode(example)
    places = [i for i, label in enumerate(encoded.labels) if label != IGNORED and i]
    last = example.messages[-1:]
    if not places or not last or len(encoded.input_ids) > LONGEST:
        return None
    start = 0 if example.whole else len(prompter.prompt_ids(example.prompt, example.tools))
    messages = example.prompt if prompter.kind == "chat" and not example.tools else ()
    kept = [place for place in places if place >= start][:SCORED] or places[:SCORED]
    return Probe(tuple(encoded.input_ids), tuple(kept), start=start, messages=tuple(messages))


def _with_continuations(tuned: Tuned, prompter: Prompter, questions: list[str]) -> list[Probe]:
    """The prompts with what the adapter writes after them."""
    asked = [({"role": "user", "content": question},) for question in questions]
    whole = [prompter.prompt_ids(messages) for messages in asked]
    prompts = [ids[-LONGEST + CONTINUED :] for ids in whole]
    ends = ends_of(tuned.model, tuned.tokenizer)
    # Any answer will do: of prompt learning the base's, as its own `generate` does not give its own.
    variant = tuned.variants[0 if learns_prompts(tuned.model) else -1]
    rows: list[list[int]] = []
    with tuned.as_variant(variant) as model, torch.inference_mode(), plain_search(model):
        for part in [[prompt] for prompt in prompts] if row_by_row(tuned.model) else [prompts]:
            batch = left_padded(part, tuned.tokenizer.pad_token_id or 0)
            batch.pop("position_ids")  # generate counts positions itself
            out = model.generate(
                **to_device(model, batch),
                max_new_tokens=CONTINUED, do_sample=False,
                eos_token_id=ends or None, pad_token_id=tuned.tokenizer.pad_token_id,
            )  # fmt: skip
            rows += out[:, batch["input_ids"].shape[1] :].tolist()
    probes = []
    for prompt, uncut, messages, row in zip(prompts, whole, asked, rows, strict=True):
        end = next((i + 1 for i, token in enumerate(row) if token in ends), len(row))
        ids = tuple(prompt + row[:end])
        shown: tuple[dict[str, Any], ...] = messages if prompter.kind == "chat" else ()
        places = tuple(range(max(1, len(prompt)), len(ids)))
        probes.append(Probe(ids, places, start=len(prompt) if prompt == uncut else 0, messages=shown))
    return probes

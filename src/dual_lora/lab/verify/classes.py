"""Verify a classifier: texts in place of prompts, the classes' log-probabilities in place of tokens'."""

import random

from dual_lora.lab.data.encode import VALUE
from dual_lora.lab.data.questions import read_questions
from dual_lora.lab.errors import UserError
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.recipe.schema import DataSection
from dual_lora.lab.verify.logprobs import ClassProbe, Probe
from dual_lora.lab.verify.prompts import ASKED, LONGEST, own_records


def check_classes(tuned: Tuned) -> None:
    """Raise UserError for what is neither a language model nor a classifier: a model of one value."""
    if tuned.classes == [VALUE] or not (tuned.classes or hasattr(tuned.model, "generate")):
        raise UserError(
            f"{tuned.source} gives numbers: verify is for language models and classifiers. Compare what `dual-lora "
            "predict` says of the same records with it and with the other model."
        )


def find_texts(tuned: Tuned, prompts: str | None) -> tuple[list[Probe], str]:
    """Texts for a classifier, and where they come from in words.

    prompts: a file of records, or of lines. Left out: the run's own records. Raises UserError where there are none.
    """
    data = tuned.recipe.data if tuned.recipe else DataSection()
    if prompts is not None:
        examples, where = read_questions(prompts, data, "classification")[1], prompts
    else:
        examples, where = own_records(data, "text")
        where = where or (f"the run's own, {data.train}, were not found" if data.train else "no records of the run")
    chosen = random.Random(0).sample(examples, min(len(examples), ASKED))
    longest = min(data.max_length, LONGEST)
    rows = [tuned.tokenizer(*e.text, truncation=True, max_length=longest).input_ids for e in chosen]
    places = tuple(range(1, len(tuned.classes) + 1))
    found: list[Probe] = [ClassProbe(tuple(ids), places) for ids in rows if len(ids) > 1]
    if not found:
        raise UserError(f"There is no text to ask ({where}): give some by --prompts FILE.")
    return found, where

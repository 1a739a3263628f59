"""Answer prompts, many at once or one piece by piece; where an answer ends, and what of it is text."""

import contextlib
import math
import re
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from dual_lora.lab.data.batches import (
    check_padding,
    kind_of_unmasked,
    learns_prompts,
    left_padded,
    longest_first,
    to_device,
    unwrapped,
)
from dual_lora.lab.data.encode import Prompter
from dual_lora.lab.errors import NotFinite, UserError
from dual_lora.lab.model.opened import Tuned
from dual_lora.lab.recipe.schema import EvaluateSection


def ends_of(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the model's makers name (of a turn, often)."""
    named = getattr(unwrapped(model).generation_config, "eos_token_id", None)
    named = [] if named is None else torch.as_tensor(named).flatten().tolist()  # a number, or several
    return sorted({tokenizer.eos_token_id, *named} - {None})


def check_writes(model: Any) -> None:
    """Raise UserError for PEFT's prompt learning, whose `generate` writes other tokens than its forward pass says."""
    if learns_prompts(model):
        raise UserError(
            "A model with prompt tuning, prefix tuning or p-tuning generates no text here: with this PEFT and "
            "transformers the text would not be the trained model's. Measure loss or choice (evaluate.tasks)."
        )


def texts_of(rows: list[list[int]], tokenizer: Any, ends: list[int]) -> list[str]:
    """Return the texts before the first end, without special tokens, and with their blanks as they are: a tokenizer may
    ask for "red ?" to be shown as "red?"."""
    cut = [row[: next((i for i, token in enumerate(row) if token in ends), None)] for row in rows]
    texts: list[str] = tokenizer.batch_decode(cut, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return texts


def specials_of(tokenizer: Any) -> re.Pattern[str]:
    """The special tokens, which `texts_of` leaves out, as they stand in a text that answers are compared with."""
    added = tokenizer.added_tokens_decoder.values()  # some have no role, and are special all the same
    tokens = {*tokenizer.all_special_tokens, *(str(token) for token in added if token.special)}
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))))


@contextlib.contextmanager
def plain_search(model: Any) -> Iterator[None]:
    """Remove what the model's makers set for `generate` (repetition_penalty, num_beams, ...): all count alike here."""
    base = unwrapped(model)
    own, base.generation_config = base.generation_config, GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


def generate_all(
    model: Any, tokenizer: Any, prompts: list[list[int]], batch_size: int, max_new_tokens: int,
    advance: Callable[[int], None] = lambda _: None, search: dict[str, Any] | None = None,
) -> list[str]:  # fmt: skip
    """Continuations of token-id prompts as text, without special tokens; greedy, unless ``search`` says otherwise.

    Raises NotFinite where the likeliest token would be that of NaN or infinity.
    """
    check_writes(model)
    texts, ends, search = [""] * len(prompts), ends_of(model, tokenizer), {**(search or {})}
    once, numbers = search.pop(NO_REPEAT, 0), _NotFiniteWatch()
    for part in longest_first([len(p) for p in prompts], batch_size):
        check_padding(kind_of_unmasked(model), [len(prompts[i]) for i in part])
        batch = left_padded([prompts[i] for i in part], tokenizer.pad_token_id)
        batch.pop("position_ids")  # generate counts positions itself
        width = batch["input_ids"].shape[1]
        search["logits_processor"] = [numbers, *([_NoRepeat(once, width)] if once else [])]
        with torch.inference_mode(), plain_search(model):
            out = model.generate(
                **to_device(model, batch),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=ends or None,
                pad_token_id=tokenizer.pad_token_id,
                **search,
            )
        for i, text in zip(part, texts_of(out[:, width:].tolist(), tokenizer, ends), strict=True):
            texts[i] = text
        if numbers.bad:
            raise NotFinite("where it writes")
        advance(len(part))
    return texts


NO_REPEAT = "no_repeat_ngram"


class _NotFiniteWatch(LogitsProcessor):
    """Notes whether a logit was NaN or infinite: the token with it is written like any other, and may be right."""

    bad: Any = False

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        self.bad = self.bad | ~(scores < math.inf).all()  # stays on the device: nobody waits for it at each token
        return scores


class _NoRepeat(LogitsProcessor):
    """Forbid an n-gram twice in an answer, as LoRA's own code has it; transformers' setting forbids the prompt's as
    well."""

    def __init__(self, size: int, width: int):
        self.rule, self.width = NoRepeatNGramLogitsProcessor(size), width

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return self.rule(input_ids[:, self.width :], scores)


class _StopOnRequest(StoppingCriteria):
    """Ends an answer when somebody asks for it."""

    def __init__(self, stop: threading.Event):
        self.stop = stop

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def search_of(spec: EvaluateSection) -> dict[str, Any]:
    """The search for an answer in the terms of ``generate_all``; empty for a greedy one."""
    given: dict[str, Any] = {"num_beams": spec.beams, "length_penalty": spec.length_penalty} if spec.beams > 1 else {}
    return given | ({NO_REPEAT: spec.no_repeat_ngram} if spec.no_repeat_ngram else {})


def generate(
    tuned: Tuned,
    prompt: str,
    *,
    system: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    variant: str | None = None,
) -> Iterator[str]:
    """The answer in pieces as they come. variant: "base" for the untrained model. Written as the run's prompts were."""
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    return answer_to(
        tuned, [*messages, {"role": "user", "content": prompt}], max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, variant=variant,
    )  # fmt: skip


def _conversation_ids(tuned: Tuned, messages: Sequence[dict[str, Any]]) -> torch.Tensor:
    """The conversation's tokens [1, T], where the model writes text and reads so many."""
    if tuned.classes:
        raise UserError(f"{tuned.source} is a classifier, it writes no text: use `dual-lora predict`.")
    check_writes(tuned.model)
    prompter = Prompter(tuned.tokenizer, tuned.recipe.data.template if tuned.recipe else "auto")
    ids = torch.tensor([prompter.prompt_ids(tuple(messages))])
    known = getattr(unwrapped(tuned.model).config.get_text_config(), "max_position_embeddings", None)
    if isinstance(known, int) and 0 < known <= ids.shape[1]:
        raise UserError(
            f"The conversation has {ids.shape[1]:,} tokens, but the model reads at most {known:,}: ask less, or clear "
            "it."
        )
    return ids


def answer_to(
    tuned: Tuned,
    messages: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    variant: str | None = None,
) -> Generator[str, None, None]:
    """The answer to a conversation, in pieces as they come. Closed before its end, it stops the model.

    Raises UserError for options out of range, a model that writes no text or computes NaN, and more than it can read.
    """
    if temperature < 0:
        raise UserError(f"temperature is {temperature}, expected 0 or more.")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {max_new_tokens}, expected at least 1.")
    ids = _conversation_ids(tuned, messages)
    choice: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if temperature:
        choice = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}  # of all tokens
    shown = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    streamer = TextIteratorStreamer(tuned.tokenizer, skip_prompt=True, **shown)
    failed: list[BaseException] = []
    stop, numbers = threading.Event(), _NotFiniteWatch()

    def work(model: Any) -> None:
        try:
            torch.manual_seed(seed)
            ends = ends_of(model, tuned.tokenizer) or None  # which the makers' settings name
            with torch.inference_mode(), plain_search(model):
                model.generate(
                    input_ids=ids.to(model.device),
                    attention_mask=torch.ones_like(ids).to(model.device),
                    max_new_tokens=max_new_tokens,
                    streamer=streamer,
                    logits_processor=[numbers],
                    stopping_criteria=StoppingCriteriaList([_StopOnRequest(stop)]),
                    eos_token_id=ends,
                    pad_token_id=tuned.tokenizer.pad_token_id,
                    **choice,
                )
        except BaseException as error:
            failed.append(error)
            streamer.end()

    with tuned.as_variant(variant or tuned.variants[-1]) as model:
        thread = threading.Thread(target=work, args=(model,), daemon=True)
        thread.start()
        try:
            yield from streamer
        finally:
            stop.set()  # where nobody waits for the rest
            thread.join()
    if numbers.bad:
        raise UserError(f"{tuned.source} computes NaN or infinity where it writes: its answer means nothing.")
    if failed:
        raise failed[0]

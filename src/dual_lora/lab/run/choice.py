"""The task `choice`: which of a question's answers a model finds likeliest. A prompt is read once for all of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import log_softmax

from dual_lora._warning import warn
from dual_lora.lab.data.batches import (
    accepted_arguments,
    check_padding,
    kind_of_unmasked,
    learns_prompts,
    left_padded,
    longest_first,
    to_device,
)
from dual_lora.lab.data.formats import Example
from dual_lora.lab.errors import UserError
from dual_lora.lab.run.scoring import Asked, Rows

MOST_CHOICES = 2000  # of one question, which are read at once
MOST_CHARACTERS = 2_000_000  # of their answers together


def score_choice(asked: Asked) -> Rows:
    """The choice with the largest log-likelihood, and all of them. A prompt is read once for all of its choices."""
    examples, prompter, spec = asked.examples, asked.prompter, asked.spec
    prompts: list[list[int]] = []
    answers: list[list[list[int]]] = []
    for example in examples:
        _check_size(example)
        if example.target not in example.choices:
            raise UserError(
                f"{example.where}: the answer {example.target!r} is not among the choices "
                f"{', '.join(example.choices) or '(none)'}: set data.choices, or give the records a field choices."
            )
        prompts.append(prompter.prompt_ids(example.prompt, example.tools))
        answers.append([prompter.answer_ids(example.answer_with(choice), end=False) for choice in example.choices])

    if not spec.per_token and (hidden := _never_chosen(examples, answers)):
        warn(hidden, stacklevel=2)
    rows: Rows = [{}] * len(examples)
    at_a_time = max(1, spec.batch_size // max((len(_contexts(own)) for own in answers), default=1))
    for part in longest_first([len(prompt) for prompt in prompts], at_a_time):
        own = [prompts[i] for i in part], [answers[i] for i in part]
        scores = _log_likelihoods(asked.model, *own, asked.tokenizer.pad_token_id)
        for i, sums in zip(part, scores, strict=True):
            values = [x / len(a) if spec.per_token else x for x, a in zip(sums, answers[i], strict=True)]
            chosen = examples[i].choices[max(range(len(values)), key=values.__getitem__)]
            right = examples[i].target
            rows[i] = {"correct": chosen == right, "predicted": chosen, "expected": right, "scores": values}
        asked.advance(len(part))
    distinct = [r["scores"] for r, e in zip(rows, examples, strict=True) if len(set(e.choices)) == len(e.choices)]
    if even := sum(sorted(scores)[-2:-1] == [max(scores)] for scores in distinct):
        coarse = getattr(asked.model, "dtype", torch.float32) != torch.float32
        warn(
            f"In {even} of {len(rows)} questions the two best choices are equally likely, and the first of them counts."
            + (" This precision is coarse: --dtype float32 tells them apart." if coarse else ""),
            stacklevel=2,
        )
    return rows


def _check_size(example: Example) -> None:
    """Raise UserError for more choices, each with the answer around it, than a record may make of a few letters."""
    count = len(example.choices)
    written = count * len(example.answer) + sum(map(len, example.choices))
    if count > MOST_CHOICES or written > MOST_CHARACTERS:
        raise UserError(
            f"{example.where}: {count:,} choices are {written:,} characters, each written into the answer; at most "
            f"{MOST_CHOICES:,} of {MOST_CHARACTERS:,} in all are read: give fewer, or shorter answers."
        )


def _never_chosen(examples: Sequence[Example], answers: Sequence[list[list[int]]]) -> str:
    """Warn where a choice's tokens continue another choice's: its summed log-likelihood is always the smaller."""
    for example, own in zip(examples, answers, strict=True):
        for k, long in enumerate(own):
            for short, text in zip(own, example.choices, strict=True):
                if len(short) < len(long) and long[: len(short)] == short:
                    return (
                        f"{example.where}: the choice {example.choices[k]!r} begins, in tokens, with the choice "
                        f"{text!r}, so that no model can prefer it. Give evaluate.per_token: true, or other choices."
                    )
                if long == short and example.choices[k] != text:
                    return (
                        f"{example.where}: the choices {text!r} and {example.choices[k]!r} are the same tokens "
                        "here, so that no model can tell them apart, and the first of them counts. Give other choices."
                    )
    return ""


def _log_likelihoods(
    model: Any, prompts: list[list[int]], answers: list[list[list[int]]], pad: int
) -> list[list[float]]:
    """The log-likelihood of each answer's tokens after its prompt. Answers that differ in their last token alone
    stand in the same logits."""
    contexts = [(i, context) for i, own in enumerate(answers) for context in _contexts(own)]
    row_of = {context: row for row, context in enumerate(contexts)}
    with torch.inference_mode():
        logs = log_softmax(_logits_after(model, prompts, contexts, pad).float(), -1)
    sums: list[list[float]] = []
    for i, own in enumerate(answers):
        sums.append([])
        for answer in own:
            index = torch.tensor(answer, device=logs.device)
            steps = torch.arange(len(answer), device=logs.device)
            sums[-1].append(float(logs[row_of[i, tuple(answer[:-1])], steps, index].sum()))
    return sums


def _contexts(answers: list[list[int]]) -> list[tuple[int, ...]]:
    """The different beginnings of a prompt's answers, each without the last token, which nothing follows."""
    return list(dict.fromkeys(tuple(answer[:-1]) for answer in answers))


# Layers of a cache whose rows can be chosen; those of Mamba and its kin hold a state as well.
_ROW_BY_ROW = {"DynamicLayer", "DynamicSlidingWindowLayer"}


def _logits_after(
    model: Any, prompts: list[list[int]], contexts: list[tuple[int, tuple[int, ...]]], pad: int
) -> torch.Tensor:
    """Logits [contexts, 1 + longest, vocabulary] after a prompt and after each further token of a context.

    contexts: (the prompt's index, tokens). Without a cache that can be taken apart, prompts are read with each context.
    """
    accepts = accepted_arguments(model)
    owners = torch.tensor([i for i, _ in contexts], device=model.device)
    longest = max(len(tokens) for _, tokens in contexts)
    padded = torch.tensor([[*tokens, *[pad] * (longest - len(tokens))] for _, tokens in contexts], device=model.device)

    def read(batch: dict[str, Any], keep: int, **more: Any) -> Any:
        known = {k: v for k, v in batch.items() if k != "position_ids" or k in accepts}
        return model(**known, **({"logits_to_keep": keep} if "logits_to_keep" in accepts else {}), **more)

    if learns_prompts(model):  # a cache would have their virtual tokens twice, and padding would follow them
        rows = []
        for i, tokens in contexts:
            ids = torch.tensor([[*prompts[i], *tokens]], device=model.device)
            found = read({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, len(tokens) + 1).logits[0]
            rows.append(torch.nn.functional.pad(found[-len(tokens) - 1 :], (0, 0, 0, longest - len(tokens))))
        return torch.stack(rows)
    check_padding(kind_of_unmasked(model), [len(prompt) for prompt in prompts])
    batch = to_device(model, left_padded(prompts, pad))
    alone = read(batch, 1, use_cache=True)
    first: torch.Tensor = alone.logits[owners, -1:]
    if longest == 0:
        return first
    name = "cache" if "cache" in accepts else "past_key_values"
    cache: Any = alone.get(name)
    layers = getattr(cache, "layers", None)
    if not layers or any(type(layer).__name__ not in _ROW_BY_ROW for layer in layers):
        whole = [prompts[i] + tokens for i, tokens in zip(owners.tolist(), padded.tolist(), strict=True)]
        logits: torch.Tensor = read(to_device(model, left_padded(whole, pad)), longest + 1).logits
        return logits[:, -longest - 1 :]
    cache.batch_select_indices(owners)
    follow = {
        "input_ids": padded,
        "attention_mask": torch.cat([batch["attention_mask"][owners], torch.ones_like(padded)], 1),
        "position_ids": batch["position_ids"][owners, -1:] + torch.arange(1, longest + 1, device=model.device),
    }
    return torch.cat([first, read(follow, longest, **{name: cache}).logits], 1)

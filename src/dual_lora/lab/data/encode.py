"""Examples to token ids, with labels on the answer's tokens only."""

import datetime
import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dual_lora._warning import warn
from dual_lora.lab.data.formats import Example, answer_of, text_of
from dual_lora.lab.data.values import as_whole
from dual_lora.lab.errors import UserError, described

IGNORED = -100  # the label that losses of PyTorch leave out

ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{prompt}\n\n### Response:\n"
)
_I = " " * 16
# Alpaca's text as LLM-Adapters (finetune.py, generate_prompt) and DoRA after it feed it to the model: with the
# indentation that its lines have in their source. Their evaluation leaves some blanks out; here both are the same.
LLM_ADAPTERS = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{_I}### Instruction:\n{_I}{{prompt}}\n{_I}\n{_I}### Response:\n{_I}"
)


_DATE = datetime.date(2024, 7, 26)  # which Llama's template takes where it is told none
_TODAY = re.compile(r"""\bstrftime_now\(\s*(['"])([^'"]*)\1\s*\)""")


@dataclass(frozen=True)
class Encoded:
    """Token ids and labels of equal length, or one class or value; ``where`` names the record.

    token_types: which text of a pair each token is of, where the tokenizer tells its texts apart.
    """

    where: str
    input_ids: list[int]
    labels: list[int] | list[float]
    token_types: list[int] | None = None

    @property
    def label_tail(self) -> int:
        """Length of the end of the sequence that holds every label."""
        first = next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))
        return len(self.labels) - first


def fixed_date(tokenizer: Any) -> dict[str, Any]:
    """Arguments for a chat template that writes the day's date into a prompt: one that is the same tomorrow."""
    template = tokenizer.chat_template
    more: dict[str, Any] = {"date_string": _DATE.strftime("%d %b %Y")} if "date_string" in str(template) else {}
    if isinstance(template, str) and (dated := _TODAY.sub(lambda m: repr(_DATE.strftime(m[2])), template)) != template:
        more["chat_template"] = dated
    return more


def rows_digest(rows: Iterable[Encoded]) -> str:
    """A print of what is learned from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(repr((row.input_ids, row.labels, row.token_types)).encode())
    return digest.hexdigest()[:16]


MOST_WRITTEN = 250_000  # messages of one record, those before each answer counted again: five hundred answers


@dataclass(frozen=True)
class Prompter:
    """Writes prompts by a template: "chat", "alpaca", "llm-adapters", "plain", or "auto" (chat if the tokenizer has a
    template). learn_prompt: the prompt's tokens are labels too."""

    tokenizer: Any
    template: str = "auto"
    learn_prompt: bool = False

    @property
    def kind(self) -> str:
        if self.template == "auto":
            return "chat" if self.tokenizer.chat_template else "plain"
        if self.template == "chat" and not self.tokenizer.chat_template:
            raise UserError("data.template is chat, but this tokenizer has no chat template: use alpaca or plain.")
        return self.template

    def prompt_text(self, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...] = ()) -> str:
        """The prompt as text, up to where the answer begins."""
        kind = self.kind
        if tools and (kind != "chat" or "tools" not in str(self.tokenizer.chat_template)):
            warn(
                f"Records hold tools, which the {kind} template does not write into a prompt: say in the messages what "
                "can be called.",
                stacklevel=2,
            )
        if kind == "chat":
            from dual_lora.verify.template import rendered  # which imports PEFT

            more = {**fixed_date(self.tokenizer), **({"tools": list(tools)} if tools else {})}
            try:
                return rendered(self.tokenizer, messages, add_generation_prompt=True, **more)
            except Exception as error:  # a template is a program of the model's makers, which raises what it likes
                raise UserError(
                    f"The model's chat template does not take these messages ({described(error)}): their roles are "
                    f"{', '.join(str(m.get('role')) for m in messages)[:200]}."
                ) from error
        body = "\n".join(text_of(message, "A prompt") for message in messages)
        written = {"alpaca": ALPACA, "llm-adapters": LLM_ADAPTERS}.get(kind, "{prompt}\n")
        return written.format(prompt=body)

    def prompt_ids(self, messages: tuple[dict[str, Any], ...], tools: tuple[Any, ...] = ()) -> list[int]:
        """The prompt as token ids; a template writes its special tokens itself. Raises UserError for an empty one."""
        text = self.prompt_text(messages, tools)
        ids: list[int] = self.tokenizer(text, add_special_tokens=self.kind != "chat").input_ids
        if ids and ids[-1] == self.tokenizer.eos_token_id and self.kind != "chat":
            ids = ids[:-1]
        if not ids:
            way_out = "use another template (data.template)" if self.kind == "chat" else "give it a text"
            raise UserError(
                f"The {self.kind} template makes an empty prompt of these messages, so there is nothing to answer: "
                f"their roles are {', '.join(str(m.get('role')) for m in messages)[:200]}. Look at the model's chat "
                f"template and at the records, or {way_out}."
            )
        return ids

    def answer_ids(self, answer: str, end: bool = True) -> list[int]:
        """The answer as token ids, with the token that ends it."""
        ids = self.tokenizer(answer, add_special_tokens=False).input_ids
        return [*ids, self.tokenizer.eos_token_id] if end else ids

    def encode(self, example: Example) -> Encoded:
        """Prompt and answers; in a longer conversation every assistant's turn is learned, nothing else.

        The tokenizer's end is what each answer is taught to end with. Where the template ends a turn with another token
        (Gemma's, Phi's), later turns are read after that one. Raises UserError for a template that rewrites a turn.
        """
        if example.whole:
            return self.pieces(example, None)[0]
        if (count := sum(i for i, m in enumerate(example.messages) if m["role"] == "assistant")) > MOST_WRITTEN:
            raise UserError(
                f"{example.where}: each answer of the conversation is read after all that is before it, which makes "
                f"{count:,} messages, at most {MOST_WRITTEN:,} are written: cut it into shorter records."
            )
        ids: list[int] = []
        labels: list[int] = []
        written = ""
        for i, message in enumerate(example.messages):
            if message["role"] != "assistant":
                continue
            last = i == len(example.messages) - 1
            if not written:
                context = self.prompt_ids(example.messages[:i], example.tools)
            else:
                text = self.prompt_text(example.messages[:i], example.tools)
                if self.kind != "chat" or not text.startswith(written) or text == written:
                    raise UserError(
                        f"{example.where}: the {self.kind} template rewrites earlier turns, so a conversation of "
                        "several answers cannot be learned at once; give each answer a record of its own."
                    )
                context = self.tokenizer(text[len(written) :], add_special_tokens=False).input_ids
            taught = list(context) if self.learn_prompt else [IGNORED] * len(context)
            if written:
                taught[:1] = [self.tokenizer.eos_token_id]  # of the answer before
            if message.get("weight") == 0:
                raise UserError(
                    f"{example.where}: a message of the assistant has weight 0, and every answer of a conversation is "
                    "learned: end the record before it, or give the answers records of their own."
                )
            answer_text = answer_of(message, example.where)
            answer = self.answer_ids(answer_text, end=last)
            ids += context + answer
            labels += taught + answer
            if not last:
                written = self.prompt_text(example.messages[:i], example.tools) + answer_text
        labels[:1] = [IGNORED]  # nothing stands before it; in a padded row that would be padding
        return Encoded(example.where, ids, labels)

    def pieces(self, example: Example, length: int | None) -> list[Encoded]:
        """A text without a prompt, all of it learned, in rows of at most so many tokens; other examples as they are."""
        if not example.whole:
            return [self.encode(example)]
        begin: list[int] = self.tokenizer("").input_ids  # what this tokenizer puts before every text
        begin = begin[:-1] if begin and begin[-1] == self.tokenizer.eos_token_id else begin
        ids = [*begin, *self.answer_ids(example.answer)]
        size = length or len(ids)
        parts = [ids[i : i + size] for i in range(0, len(ids), size)]
        kept = [part for part in parts if len(part) > 1]  # nothing stands before a token alone
        return [Encoded(example.where, part, [IGNORED, *part[1:]]) for part in kept]


def encode_all(
    examples: list[Example], prompter: Prompter, max_length: int, pairs: bool = False
) -> tuple[list[Encoded], int]:
    """Encoded training examples and how many were longer than ``max_length`` tokens and left out.

    Texts without a prompt are cut into rows instead. pairs: both answers are trained on, so the longer one counts.
    Raises UserError if none is left.
    """
    encoded = [
        (row, max(len(row.input_ids), rejected_length(example, prompter) if pairs else 0))
        for example in examples
        for row in prompter.pieces(example, max_length)
    ]
    kept = [row for row, length in encoded if length <= max_length]
    if not kept:
        shortest, length = min(encoded, key=lambda pair: pair[1])
        raise UserError(
            f"All {len(encoded)} examples are longer than data.max_length = {max_length} tokens; "
            f"the shortest, {shortest.where}, has {length}."
        )
    return kept, len(encoded) - len(kept)


def rejected_length(example: Example, prompter: Prompter) -> int:
    """Tokens of a record's prompt with its worse answer; 0 where it has none."""
    if not example.rejected:
        return 0
    return len(prompter.prompt_ids(example.prompt, example.tools)) + len(prompter.answer_ids(example.rejected))


VALUE = "(value)"  # in place of classes: the label is a number, and so is what the model tells


def class_names(examples: list[Example]) -> list[str]:
    """The labels that occur, numbers in their order."""
    names = {example.label for example in examples}
    if twice := sorted(name for name in names if as_whole(name) != name and as_whole(name) in names):
        raise UserError(
            f"The labels {as_whole(twice[0])} and {twice[0]} are one number and would be two classes: write it "
            "in one way."
        )
    alike: dict[str, list[str]] = {}
    for name in sorted(names):
        alike.setdefault(" ".join(name.casefold().split()), []).append(name)
    if spelled := [repr(name) for same in alike.values() if len(same) > 1 for name in same]:
        warn(
            f"The labels {', '.join(spelled[:6])} differ in case or blanks alone, and each is a class of its own: "
            "write a class in one way.",
            stacklevel=2,
        )
    # The name decides between 1 and 1.0: a set's own order is another one in every process.
    return sorted(names, key=lambda name: (0, float(name), name) if _is_number(name) else (1, 0.0, name))


def encode_texts(
    examples: list[Example], tokenizer: Any, max_length: int, classes: list[str]
) -> tuple[list[Encoded], int]:
    """Texts (or pairs) with class numbers (classes [VALUE]: values), and how many had to be cut to ``max_length``."""
    numbers = {name: i for i, name in enumerate(classes)}
    result: list[Encoded] = []
    cut = 0
    for example in examples:
        if classes == [VALUE]:
            if not _is_number(example.label):
                comma = " Write it with a point." if "," in str(example.label) else ""
                raise UserError(
                    f"{example.where}: label {example.label!r} is no number, but model.head is regression.{comma}"
                )
        elif example.label not in numbers:
            raise UserError(f"{example.where}: label {example.label!r} is none of the classes {', '.join(classes)}.")
        tokens = tokenizer(*example.text)
        if len(tokens.input_ids) > max_length:
            cut += 1
            tokens = tokenizer(*example.text, truncation=True, max_length=max_length)
        types = tokens.get("token_type_ids") or []
        label = [float(example.label)] if classes == [VALUE] else [numbers[example.label]]
        result.append(Encoded(example.where, tokens.input_ids, label, types if any(types) else None))
    return result, cut


def _is_number(name: str) -> bool:
    try:
        return math.isfinite(float(name))
    except ValueError:
        return False

"""An Ollama Modelfile for a GGUF file: where the weights are, how conversations are written, where an answer ends.

Ollama's templates are Go's, tokenizers' are Jinja. Taken over is what a template writes around a message of each role,
read off conversations that it renders. The result is compared with the tokenizer's own on other conversations. Raises
an error for a template that does more than that (dates, trimming).
"""

from __future__ import annotations

from typing import Any

from dual_lora.lab.errors import UserError

_ROLES = ("system", "user", "assistant")
_MARK = {role: f"⟦{role} says⟧" for role in _ROLES}


def modelfile(tokenizer: Any, weights: str, adapter: str | None = None) -> str:
    """The text of a Modelfile. weights: the base's or merged GGUF file. adapter: a LoRA's GGUF file.

    Raises UserError where the tokenizer's template is not a fixed text around each message.
    """
    lines = [f"FROM {weights}"] + ([f"ADAPTER {adapter}"] if adapter else [])
    if getattr(tokenizer, "chat_template", None):
        around, default, start = _pieces(tokenizer)
        _check(tokenizer, around, default, start)
        texts = [*(text for pair in around.values() for text in pair), default, start]
        if any(sign in text for text in texts for sign in ('"""', "{{", "}}")):
            raise UserError(
                "The chat template holds signs that a Modelfile gives a meaning: write its TEMPLATE by hand."
            )
        branches = "".join(
            f'{{{{ {"if" if i == 0 else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for i, (role, (before, after)) in enumerate(around.items())
        )
        lines.append(f'TEMPLATE """{{{{- range .Messages }}}}{branches}{{{{ end }}}}{{{{- end }}}}{start}"""')
        if default:
            lines.append(f'SYSTEM """{default}"""')
    if tokenizer.eos_token:
        lines.append(f'PARAMETER stop "{tokenizer.eos_token}"')
    return "\n".join(lines) + "\n"


def _render(tokenizer: Any, messages: list[tuple[str, str]], start: bool = False) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    try:
        text: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=start)
    except Exception as error:  # a template's own refusals, of a role or an order
        raise UserError(f"The chat template cannot be written for Ollama: {error}") from error
    # Where the tokenizer puts a first token, llama.cpp does as well.
    puts_first = tokenizer.bos_token and tokenizer("x").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if puts_first else text


def _pieces(tokenizer: Any) -> tuple[dict[str, tuple[str, str]], str, str]:
    """({role: (text before, text after)}, the system message that it writes unasked, the start of an answer)."""
    whole = _render(tokenizer, [(role, _MARK[role]) for role in _ROLES])
    if any(whole.count(mark) != 1 for mark in _MARK.values()):
        raise UserError("The chat template does not write each message once; it cannot be written for Ollama.")
    two = _render(tokenizer, [("system", _MARK["system"]), ("user", _MARK["user"])])
    one = _render(tokenizer, [("system", _MARK["system"])])
    before, after = one.split(_MARK["system"])
    around = {"system": (before, after)}
    for role, shorter, longer in (("user", one, two), ("assistant", two, whole)):
        if not longer.startswith(shorter) or _MARK[role] not in longer[len(shorter) :]:
            raise UserError("The chat template writes a message differently when more follow; Ollama's cannot.")
        left, right = longer[len(shorter) :].split(_MARK[role])
        around[role] = (left, right)
    start = _render(tokenizer, [("system", _MARK["system"])], start=True)[len(one) :]
    alone = _render(tokenizer, [("user", _MARK["user"])])
    unasked = alone.removesuffix(_MARK["user"].join(around["user"]))
    default = unasked.removeprefix(before).removesuffix(after) if unasked.startswith(before) else ""
    return around, default, start


def _check(tokenizer: Any, around: dict[str, tuple[str, str]], default: str, start: str) -> None:
    """Raise UserError unless the pieces give what the tokenizer gives, for conversations that were not used above."""
    for chat in (
        [("user", "One line.")],
        [("user", " spaces around \n"), ("assistant", " Yes.\n"), ("user", 'A "quoted" question?')],
        [("system", " Be brief.\n"), ("user", "Why?"), ("assistant", "So."), ("user", "And then?")],
    ):
        whole = chat if chat[0][0] == "system" or not default else [("system", default), *chat]
        own = "".join(content.join(around[role]) for role, content in whole) + start
        if own != _render(tokenizer, chat, start=True):
            raise UserError(
                "The chat template does more than to write a fixed text around each message, which is all that a "
                "Modelfile can be given here: write its TEMPLATE by hand."
            )
